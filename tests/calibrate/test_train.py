"""Training: measures by hand, what is learned from, the file that ships, and a training in small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from wisp.calibrate import train as training
from wisp.calibrate.traces.format import TraceSet
from wisp.calibrate.train import (
    Examples,
    auc,
    calibration_error,
    examples,
    false_accept,
    fit,
    log_loss,
    recalibrated,
    report,
    sigmoid,
    threshold_at_recall,
)
from wisp.core.draft.predictor import FEATURES, Predictor
from wisp.core.errors import ConfigError
from wisp.engines.build import read_predictor

TRACES = Path(__file__).parents[2] / "data" / "traces" / "qwen2.5-coder"


@pytest.fixture(scope="module")
def shipped() -> TraceSet:
    return TraceSet.load(TRACES)


def bools(*values: int) -> training.Bools:
    return np.array(values, bool)


# --- measures


@pytest.mark.parametrize(
    ("y", "score", "area"),
    [
        (bools(1, 1, 0, 0), [4.0, 3.0, 2.0, 1.0], 1.0),
        (bools(0, 0, 1, 1), [4.0, 3.0, 2.0, 1.0], 0.0),
        (bools(1, 0, 1, 0), [4.0, 3.0, 2.0, 1.0], 0.75),
        (bools(1, 1, 0, 0), [2.0, 1.0, 1.0, 0.0], 0.875),  # one tie in four pairs
        (bools(1, 0, 0, 1), [5.0, 5.0, 5.0, 5.0], 0.5),
        (bools(0, 1, 1, 0, 1), [1.0, 1.0, 2.0, 2.0, 2.0], 3.5 / 6.0),  # two ties in six
    ],
)
def test_auc(y: training.Bools, score: list[float], area: float) -> None:
    assert auc(y, np.array(score)) == pytest.approx(area)


def test_false_accepts_at_a_recall() -> None:
    y = bools(1, 1, 1, 1, 1, 0, 0, 0, 0)
    score = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 1.5, 1.9, 3.0])
    threshold = threshold_at_recall(y, score, 0.8)
    assert 1.0 < threshold <= 2.0
    assert (score[y] >= threshold).mean() == 0.8
    assert false_accept(y, score, 0.8) == 0.5
    assert false_accept(y, score, 1.0) == 0.75
    assert false_accept(y, score, 0.0) == 0.0


def test_false_accepts_count_ties_with_the_threshold() -> None:
    assert false_accept(bools(1, 1, 0, 0), np.array([2.0, 2.0, 2.0, 1.0]), 0.8) == 0.5


def test_calibration_error() -> None:
    assert calibration_error(bools(1, 0, 0, 0), np.array([0.95, 0.95, 0.15, 0.15])) == pytest.approx(0.3)
    assert calibration_error(bools(1, 1), np.array([1.0, 1.0])) == 0.0
    assert calibration_error(bools(1, 0), np.array([0.5, 0.5])) == 0.0
    assert calibration_error(bools(0, 0, 1), np.array([0.0, 0.0, 0.7]), bins=2) == pytest.approx(0.1)


def test_log_loss() -> None:
    expected = -(math.log(0.8) + math.log(0.6)) / 2
    assert log_loss(bools(1, 0), np.array([0.8, 0.4])) == pytest.approx(expected)
    assert math.isfinite(log_loss(bools(1, 0), np.array([0.0, 1.0])))


def test_recalibration_knows_nothing_of_what_comes_later() -> None:
    z = np.linspace(-2.0, 2.0, 40)
    data = Examples(np.zeros((40, 1)), z < 0, np.zeros(40, int))
    other = Examples(data.x, np.concatenate([data.y[:20], ~data.y[20:]]), data.group)
    first, second = recalibrated(data, z), recalibrated(other, z)
    assert first[0] == pytest.approx(float(sigmoid(z[:1])[0]))
    assert np.array_equal(first[:21], second[:21])
    assert not np.array_equal(first[21:], second[21:])


# --- what is learned from


def test_every_position_is_judged_once(shipped: TraceSet) -> None:
    traces = shipped.traces[::40]
    for seed in (0, 1):
        data = examples(traces, seed)
        assert len(data) == sum(map(len, traces))
        assert np.array_equal(data.y, np.concatenate([t.accepted for t in traces]))
        assert np.array_equal(data.group, np.repeat(np.arange(len(traces)), [len(t) for t in traces]))
        assert data.x.shape == (len(data), len(FEATURES))
        assert np.isfinite(data.x).all()


def test_a_round_ends_at_its_first_rejection(shipped: TraceSet) -> None:
    data = examples(shipped.traces[::40])
    depth = np.expm1(data.x[:, FEATURES.index("log_depth")]).round().astype(int)
    assert depth.max() == training.ROUNDS[1] - 1
    fresh = np.flatnonzero(~data.y)[:-1] + 1
    assert (depth[fresh] == 0).all()
    deeper = np.flatnonzero(depth > 0)
    assert data.y[deeper - 1].all()
    assert (depth[deeper] == depth[deeper - 1] + 1).all()


def test_other_seeds_cut_other_rounds(shipped: TraceSet) -> None:
    traces = shipped.traces[:5]
    assert np.array_equal(examples(traces, 3).x, examples(traces, 3).x)
    assert not np.array_equal(examples(traces, 3).x, examples(traces, 4).x)


# --- what ships


@pytest.mark.parametrize(("split", "most"), [("test_prompts", 0.20), ("test_domain", 0.30)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_shipped_predictor_on_what_it_was_not_trained_on(
    shipped: TraceSet, split: str, most: float, seed: int
) -> None:
    predictor = read_predictor()
    data = examples(shipped.select(split=split).traces, seed)
    measures = report(data, predictor.logits(data.x))
    assert measures["n"] > 3000
    assert measures["auc"] >= 0.85
    assert measures["false_accept_at_recall_80"] <= most
    assert measures["ece_recalibrated"] < 0.05


def test_the_shipped_predictor_says_where_it_comes_from() -> None:
    about = read_predictor().about
    assert about["kind"] in ("logistic", "mlp")
    assert 0.0 < about["threshold"] < 1.0
    assert about["models"]


def test_the_shipped_threshold_keeps_most_accepted_tokens(shipped: TraceSet) -> None:
    predictor = read_predictor()
    data = examples(shipped.select(split="train").traces[::4])
    p = sigmoid(predictor.logits(data.x))
    assert (p[data.y] >= predictor.about["threshold"]).mean() == pytest.approx(0.8, abs=0.04)


# --- training


def some(shipped: TraceSet) -> TraceSet:
    """Few of each split, in both samplings."""
    chosen = [
        t
        for s, n in (("train", 12), ("test_prompts", 12), ("test_domain", 8))
        for t in shipped.select(split=s).traces[::n]
    ]
    return TraceSet(chosen, shipped.headers)


def test_training_in_small(shipped: TraceSet, tmp_path: Path) -> None:
    predictor, result = training.train(some(shipped))
    assert result["kind"] == predictor.about["kind"]
    assert result["kind"] == min(result["held_out_log_loss"], key=result["held_out_log_loss"].get)
    for name in ("test_prompts", "test_domain"):
        assert result[name]["auc"] > 0.8
        assert result["trees"][name]["auc"] > 0.8
    assert sum(d["n"] for d in result["domains"].values()) == result["test_domain"]["n"]
    assert json.loads(json.dumps(result)) == result
    file = tmp_path / "new" / "predictor.json"
    training.save(predictor, file)
    again = read_predictor(file)
    x = examples(some(shipped).traces[:3]).x
    assert np.allclose(again.logits(x), predictor.logits(x), atol=1e-3)


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_numpy_says_what_scikit_learn_says(
    shipped: TraceSet, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    monkeypatch.setattr(training, "NETS", 1)
    data = examples(some(shipped).traces[:20])
    mine = fit(data, kind, seed=3)
    x = (data.x - data.x.mean(axis=0)) / (data.x.std(axis=0) + 1e-9)
    if kind == "logistic":
        theirs = LogisticRegression(max_iter=1000).fit(x, data.y)
    else:
        options = {"alpha": 0.1, "early_stopping": True, "n_iter_no_change": 15, "activation": "tanh"}
        theirs = MLPClassifier(training.HIDDEN, random_state=3, **options).fit(x, data.y)
    assert np.allclose(sigmoid(mine.logits(data.x)), theirs.predict_proba(x)[:, 1], atol=1e-6)


def test_nets_side_by_side_are_their_mean(shipped: TraceSet, monkeypatch: pytest.MonkeyPatch) -> None:
    data = examples(some(shipped).traces[:8])
    together = fit(data, "mlp", seed=5).logits(data.x)
    monkeypatch.setattr(training, "NETS", 1)
    alone = [fit(data, "mlp", seed=5 + i).logits(data.x) for i in range(3)]
    assert np.allclose(together, np.mean(alone, axis=0))


def test_a_missing_split_is_named(shipped: TraceSet) -> None:
    with pytest.raises(ConfigError, match="test_domain"):
        training.train(TraceSet([t for t in shipped if t.split != "test_domain"], shipped.headers))


def test_a_file_that_is_no_predictor_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "predictor.json"
    with pytest.raises(ConfigError, match="cannot read"):
        read_predictor(file)
    file.write_text("not json")
    with pytest.raises(ConfigError, match="cannot read"):
        read_predictor(file)
    file.write_text(json.dumps(Predictor([], [], []).to_dict() | {"version": 0}))
    with pytest.raises(ConfigError, match="wisp train"):
        read_predictor(file)
