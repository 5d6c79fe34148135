"""`wisp train`: from traces to a predictor of acceptance that an edge can afford.

Three kinds are fitted: logistic regression, a multilayer perceptron (the paper's), and gradient-boosted trees for
comparison only, since numpy cannot evaluate trees in microseconds. The file holds the better of the first two by
log loss on held-out prompts, cross-validated by prompt. Whole domains, and prompts of known domains, are held out for
the report.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from wisp import __version__
from wisp.calibrate.traces.format import Trace, TraceSet, trace_folder
from wisp.core.draft.predictor import FEATURES, Calibration, Predictor, features
from wisp.core.draft.round_times import Mean
from wisp.core.errors import ConfigError
from wisp.outputs import writable

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
HIDDEN = (24, 12)
NETS = 3  # their mean is steadier than any one of them
CUTS = 2  # times that training texts are cut into rounds
ROUNDS = (1, 12)  # a round in training drafts so many tokens at most, drawn evenly


@dataclass
class Examples:
    """Rows of features [n, len(FEATURES)], outcomes [n], and which trace each came from [n]; in trace order."""

    x: Floats
    y: Bools
    group: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


def examples(traces: Sequence[Trace], seed: int = 0) -> Examples:
    """The view of a policy along each trace, in rounds of random length: one row per judged token.

    A round ends at its length or its first rejection, as on an edge. Every position is judged once: drafting ahead
    judges even the positions that a correction or bonus settles.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[float]] = []
    outcomes: list[bool] = []
    groups: list[int] = []
    for number, trace in enumerate(traces):
        recent = Mean(0.8, 0.1)
        accepted = trace.accepted
        position = 0
        while position < len(trace):
            length = int(rng.integers(ROUNDS[0], ROUNDS[1] + 1))
            judged = []
            for depth in range(min(length, len(trace) - position)):
                at = position + depth
                rows.append(features(trace.signal(at), depth, recent.value, trace.sampling.temperature))
                judged.append(bool(accepted[at]))
                if not judged[-1]:
                    break
            for outcome in judged:
                recent.add(float(outcome))
            outcomes += judged
            groups += [number] * len(judged)
            position += len(judged)
    return Examples(np.array(rows), np.array(outcomes, bool), np.array(groups))


# --- measures


def auc(y: Bools, score: Floats) -> float:
    """Area under the ROC curve: the chance that an accepted token scores above a rejected one, ties half."""
    order = np.argsort(score, kind="stable")
    ranks = np.empty(len(score))
    ranks[order] = np.arange(1, len(score) + 1)
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.bincount(inverse, ranks) / counts
    ranks = mean_rank[inverse]
    positives = int(y.sum())
    negatives = len(y) - positives
    return float((ranks[y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def threshold_at_recall(y: Bools, score: Floats, recall: float) -> float:
    """The score that this share of accepted tokens reaches."""
    return float(np.quantile(score[y], 1.0 - recall))


def false_accept(y: Bools, score: Floats, recall: float) -> float:
    """Share of rejected tokens let through by the threshold that lets this share of accepted ones through."""
    return float((score[~y] >= threshold_at_recall(y, score, recall)).mean())


def calibration_error(y: Bools, p: Floats, bins: int = 10) -> float:
    """Expected calibration error: |mean p - acceptance| over equal bins of p, weighted by their share."""
    index = np.minimum((p * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            error += inside.mean() * abs(float(p[inside].mean()) - float(y[inside].mean()))
    return float(error)


def log_loss(y: Bools, p: Floats) -> float:
    """Mean negative log likelihood, nats."""
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return float(-np.where(y, np.log(p), np.log(1 - p)).mean())


def recalibrated(data: Examples, z: Floats) -> Floats:
    """Probabilities on a device: each is calibrated by the outcomes before it."""
    calibration = Calibration()
    out = np.empty(len(data))
    for i in range(len(data)):
        out[i] = calibration.probability(float(z[i]))
        calibration.learn(float(z[i]), bool(data.y[i]))
    return out


def sigmoid(z: Floats) -> Floats:
    """1 / (1 + e^-z)."""
    out: Floats = 1.0 / (1.0 + np.exp(-np.clip(z, -40, 40)))
    return out


def report(data: Examples, z: Floats) -> dict[str, float]:
    """All measures of logits `z` on `data`."""
    p = recalibrated(data, z)
    return {
        "n": len(data),
        "acceptance": round(float(data.y.mean()), 4),
        "auc": round(auc(data.y, z), 4),
        "false_accept_at_recall_80": round(false_accept(data.y, z, 0.80), 4),
        "false_accept_at_recall_90": round(false_accept(data.y, z, 0.90), 4),
        "log_loss": round(log_loss(data.y, sigmoid(z)), 4),
        "ece": round(calibration_error(data.y, sigmoid(z)), 4),
        "ece_recalibrated": round(calibration_error(data.y, p), 4),
    }


# --- fitting


def fit(data: Examples, kind: str, seed: int = 0) -> Predictor:
    """A logistic regression ("logistic") or a multilayer perceptron ("mlp") as numpy evaluates them."""
    _need_sklearn()
    mean, scale = data.x.mean(axis=0), data.x.std(axis=0) + 1e-9
    x = (data.x - mean) / scale
    if kind == "logistic":
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=1.0, max_iter=1000).fit(x, data.y)
        layers = [(model.coef_.T, model.intercept_)]
    else:
        from sklearn.neural_network import MLPClassifier

        options = {"activation": "tanh", "alpha": 0.1, "early_stopping": True, "n_iter_no_change": 15}
        models = [MLPClassifier(HIDDEN, random_state=seed + i, **options).fit(x, data.y) for i in range(NETS)]
        layers = _side_by_side([list(zip(m.coefs_, m.intercepts_, strict=True)) for m in models])
    return Predictor(mean, scale, layers)


def _side_by_side(nets: list[list[tuple[Floats, Floats]]]) -> list[tuple[Floats, Floats]]:
    """Networks of one shape as a single one with their mean logit."""
    layers = []
    for depth, parts in enumerate(zip(*nets, strict=True)):
        weights = [w for w, _ in parts]
        biases = np.concatenate([b for _, b in parts])
        if depth == 0:
            layers.append((np.concatenate(weights, axis=1), biases))
        elif depth < len(nets[0]) - 1:
            rows, columns = weights[0].shape
            block = np.zeros((rows * len(nets), columns * len(nets)))
            for i, w in enumerate(weights):
                block[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = w
            layers.append((block, biases))
        else:
            layers.append((np.concatenate(weights) / len(nets), biases[:1] * 0 + biases.mean()))
    return layers


def fit_trees(data: Examples, seed: int = 0) -> Any:
    """Gradient-boosted trees, for comparison. `predict_proba` as usual."""
    _need_sklearn()
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(max_iter=150, learning_rate=0.06, random_state=seed)
    return model.fit(data.x, data.y)


def cross_validated(data: Examples, kind: str, folds: int = 5) -> float:
    """Log loss on held-out prompts: every prompt is held out once."""
    losses = []
    for fold in range(folds):
        held_out = data.group % folds == fold
        model = fit(Examples(data.x[~held_out], data.y[~held_out], data.group[~held_out]), kind)
        losses.append(log_loss(data.y[held_out], sigmoid(model.logits(data.x[held_out]))))
    return float(np.mean(losses))


def train(traces: TraceSet, seed: int = 0) -> tuple[Predictor, dict[str, Any]]:
    """The predictor, and the report. Raises ConfigError where a split is missing."""
    splits = {name: traces.select(split=name) for name in ("train", "test_prompts", "test_domain")}
    for name, part in splits.items():
        if not len(part):
            raise ConfigError(f"these traces have no split {name!r}; record them from the shipped prompts")
    data = {name: examples(part.traces, seed) for name, part in splits.items()}
    # The same texts cut into other rounds: other depths and histories at the same places.
    data["train"] = _joined([examples(splits["train"].traces, seed + i) for i in range(CUTS)])
    _group_by_prompt(splits["train"], data["train"])
    losses = {kind: cross_validated(data["train"], kind) for kind in ("logistic", "mlp")}
    kind = min(losses, key=lambda k: losses[k])
    chosen = fit(data["train"], kind, seed)
    scores = {name: chosen.logits(part.x) for name, part in data.items()}
    trees = fit_trees(data["train"], seed)
    threshold = threshold_at_recall(data["train"].y, scores["train"], 0.8)
    about = {
        "kind": kind,
        "threshold": round(float(sigmoid(np.array(threshold))), 4),
        "wisp": __version__,
        "date": datetime.date.today().isoformat(),
        "models": [header.get("models") for header in traces.headers[:1]],
        "rows": len(data["train"]),
    }
    result = {
        "kind": kind,
        "held_out_log_loss": {k: round(v, 4) for k, v in losses.items()},
        "microseconds_per_prediction": round(_microseconds(chosen), 2),
        **{name: report(data[name], scores[name]) for name in data},
        "domains": _by_domain(splits["test_domain"], data["test_domain"], scores["test_domain"]),
        "trees": {name: report(part, _tree_logits(trees, part)) for name, part in data.items()},
    }
    return Predictor(chosen.mean, chosen.scale, chosen.layers, about), result


def save(predictor: Predictor, path: Path) -> None:
    """Write the file that `wisp edge --predictor` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(predictor.to_dict())) + "\n")


def _joined(parts: list[Examples]) -> Examples:
    return Examples(
        np.concatenate([p.x for p in parts]),
        np.concatenate([p.y for p in parts]),
        np.concatenate([p.group for p in parts]),
    )


def _group_by_prompt(traces: TraceSet, data: Examples) -> None:
    """Let folds hold out a prompt in all its samplings, not one trace of it."""
    ids = {prompt: i for i, prompt in enumerate(dict.fromkeys(t.prompt_id for t in traces))}
    data.group = np.array([ids[traces.traces[g].prompt_id] for g in data.group])


def _by_domain(traces: TraceSet, data: Examples, z: Floats) -> dict[str, dict[str, float]]:
    domains = np.array([traces.traces[g].domain for g in data.group])
    out = {}
    for name in sorted(set(domains)):
        inside = domains == name
        out[str(name)] = report(Examples(data.x[inside], data.y[inside], data.group[inside]), z[inside])
    return out


def _tree_logits(model: Any, data: Examples) -> Floats:
    p = np.clip(model.predict_proba(data.x)[:, 1], 1e-6, 1 - 1e-6)
    out: Floats = np.log(p / (1 - p))
    return out


def _microseconds(predictor: Predictor) -> float:
    """Median time of one prediction, without the statistics of the logits."""
    x = [0.5] * len(FEATURES)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        for _ in range(10):
            predictor.logit(x)
        times.append((time.perf_counter() - started) * 1e5)
    return float(np.median(times))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def _need_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError("training needs scikit-learn: pip install 'wisp-serve[sim]'") from None


# --- the command


def run_train(traces: Path, out: Path | None, *, seed: int, as_json: bool) -> None:
    """Train, write the predictor to `out` if given, and print the report."""
    if out is not None:
        writable(out)
    predictor, result = train(TraceSet.load(trace_folder(traces)), seed)
    if out is not None:
        save(predictor, out)
        result["file"] = str(out)
    print(json.dumps(result)) if as_json else _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['kind']}, {result['microseconds_per_prediction']} µs a prediction")
    columns = (
        "n",
        "acceptance",
        "auc",
        "false_accept_at_recall_80",
        "false_accept_at_recall_90",
        "ece_recalibrated",
    )
    table.add_column("held out")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    rows = {
        "training itself": result["train"],
        "prompts": result["test_prompts"],
        "domains": result["test_domain"],
    }
    rows |= {f"  {name}": measures for name, measures in result["domains"].items()}
    rows |= {f"trees, {k}": v for k, v in result["trees"].items() if k != "train"}
    for name, measures in rows.items():
        table.add_row(name, *(str(measures[c]) for c in columns))
    Console().print(table)
