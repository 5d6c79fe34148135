"""The predictor in numpy, its file form, and its calibration on the device."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from wisp.core.draft.policies import Judgement, Odds
from wisp.core.draft.predictor import FEATURES, Calibration, Predictor, features
from wisp.core.draft.signals import Signal
from wisp.core.errors import ConfigError

N = len(FEATURES)


def small_net() -> Predictor:
    """Reads the first feature (mean 1, scale 2) and the second; two hidden units."""
    mean, scale = [1.0] + [0.0] * (N - 1), [2.0] + [1.0] * (N - 1)
    w = [[0.0, 0.0] for _ in range(N)]
    w[0], w[1] = [0.5, -1.0], [0.25, 0.0]
    return Predictor(
        mean, scale, [(w, [0.1, 0.2]), ([[2.0], [-3.0]], [0.5])], {"kind": "mlp", "threshold": 0.7}
    )


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def test_a_small_net_by_hand() -> None:
    x = [3.0, 4.0] + [7.0] * (N - 2)  # (3 - 1) / 2 = 1
    hidden = math.tanh(0.5 * 1.0 + 0.25 * 4.0 + 0.1), math.tanh(-1.0 * 1.0 + 0.2)
    assert small_net().logit(x) == pytest.approx(2.0 * hidden[0] - 3.0 * hidden[1] + 0.5)


def test_a_single_layer_is_a_logistic_regression() -> None:
    net = Predictor([0.0] * N, [1.0] * N, [([[float(i)] for i in range(N)], [-1.0])])
    assert net.logit([1.0] * N) == pytest.approx(sum(range(N)) - 1.0)


def test_rows_are_judged_as_they_are_one_by_one() -> None:
    x = np.random.default_rng(0).normal(size=(5, N))
    net = small_net()
    assert net.logits(x).tolist() == pytest.approx([net.logit(row) for row in x])


def test_features_of_an_extreme_signal_are_finite_and_in_order() -> None:
    for signal in (Signal(), Signal(1.0, 0.0, 1.0, 0.0, -5.0), Signal(1.0, 12.0, 1.0, 1e6, 1e6)):
        for temperature in (0.0, 0.7):
            x = features(signal, 0, 0.5, temperature)
            assert len(x) == N
            assert all(map(math.isfinite, x))
    named = dict(zip(FEATURES, features(Signal(0.5, 1.2, 0.3, 2.0, 4.0), 3, 0.6, 0.7), strict=True))
    assert named["logit_confidence"] == pytest.approx(0.0)
    assert (named["entropy"], named["margin"], named["recent"], named["sampled"]) == (1.2, 0.3, 0.6, 1.0)
    assert named["log_depth"] == pytest.approx(math.log(4.0))
    assert named["log_lead_sampled"] == named["log_lead"] == pytest.approx(math.log(4.0))


def test_temperature_tells_the_doubles_apart() -> None:
    greedy = dict(zip(FEATURES, features(Signal(0.9, 1.0, 0.3, 2.0, 4.0), 0, 0.6, 0.0), strict=True))
    assert (greedy["sampled"], greedy["logit_confidence_sampled"], greedy["log_lead_sampled"]) == (0, 0, 0)


def test_written_and_read_again_it_says_the_same() -> None:
    net = small_net()
    again = Predictor.from_dict(json.loads(json.dumps(net.to_dict())))
    x = np.random.default_rng(1).normal(size=(20, N))
    assert np.array_equal(net.logits(x), again.logits(x))
    assert again.about == {"kind": "mlp", "threshold": 0.7}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": None},
        {"features": [*FEATURES[:-1], "zodiac"]},
        {"features": list(reversed(FEATURES))},
        {"features": []},
    ],
)
def test_another_version_or_other_features_are_refused_with_advice(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="wisp train"):
        Predictor.from_dict(small_net().to_dict() | change)


@pytest.mark.parametrize("damage", [{"mean": None}, {"layers": 5}, {"layers": [[1]]}, {"scale": "wide"}])
def test_a_damaged_file_is_refused(damage: dict[str, object]) -> None:
    data = {k: v for k, v in (small_net().to_dict() | damage).items() if v is not None}
    with pytest.raises(ConfigError, match="damaged"):
        Predictor.from_dict(data)


# --- calibration


def calibration_error(outcomes: list[bool], p: list[float], bins: int = 10) -> float:
    error = 0.0
    for b in range(bins):
        inside = [i for i in range(len(p)) if min(int(p[i] * bins), bins - 1) == b]
        if inside:
            said = sum(p[i] for i in inside) / len(inside)
            was = sum(outcomes[i] for i in inside) / len(inside)
            error += len(inside) / len(p) * abs(said - was)
    return error


@pytest.mark.parametrize(("slope", "offset"), [(0.6, -1.0), (1.0, -1.5), (0.5, 0.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_shifted_domain_is_learned_within_a_few_hundred_observations(
    slope: float, offset: float, seed: int
) -> None:
    source, calibration = random.Random(seed), Calibration()
    z = [source.gauss(1.0, 2.5) for _ in range(2400)]
    outcomes = [source.random() < sigmoid(slope * x + offset) for x in z]
    for i in range(400):
        calibration.learn(z[i], outcomes[i])
    calibrated = []
    for i in range(400, 2400):
        calibrated.append(calibration.probability(z[i]))
        calibration.learn(z[i], outcomes[i])
    before = calibration_error(outcomes[400:], [sigmoid(x) for x in z[400:]])
    assert calibration_error(outcomes[400:], calibrated) < min(0.05, 0.5 * before)
    if offset:
        assert before > 0.1


def test_a_model_that_was_right_stays_right() -> None:
    source, calibration = random.Random(4), Calibration()
    for _ in range(2000):
        z = source.gauss(1.0, 2.0)
        calibration.learn(z, source.random() < sigmoid(z))
    for z in (-2.0, 0.0, 2.0, 4.0):
        assert calibration.probability(z) == pytest.approx(sigmoid(z), abs=0.1)


def test_it_starts_as_the_model_itself() -> None:
    for z in (-3.0, 0.0, 2.0):
        assert Calibration().probability(z) == pytest.approx(sigmoid(z))


def test_it_follows_when_the_domain_changes_again() -> None:
    source, calibration = random.Random(5), Calibration()
    for offset in (-2.0, 2.0, -2.0):
        for _ in range(1500):
            z = source.gauss(0.0, 1.5)
            calibration.learn(z, source.random() < sigmoid(z + offset))
        assert calibration.probability(0.0) == pytest.approx(sigmoid(offset), abs=0.1)


@pytest.mark.parametrize("outcomes", ["right", "wrong", "opposite", "random"])
@pytest.mark.parametrize("size", [0.0, 2.0, 1000.0])
def test_it_is_bounded_whatever_it_sees(outcomes: str, size: float) -> None:
    source, calibration = random.Random(6), Calibration()
    for _ in range(10_000):
        z = size * source.uniform(-1.0, 1.0)
        accepted = {
            "right": True,
            "wrong": False,
            "opposite": z < 0,
            "random": source.random() < 0.5,
        }[outcomes]
        calibration.learn(z, accepted)
    assert 0.0 < calibration.a <= 3.0
    assert abs(calibration.b) < 50.0
    for z in (-1e4, -1.0, 0.0, 1.0, 1e4):
        assert 0.0 <= calibration.probability(z) <= 1.0
    assert calibration.probability(5.0) >= calibration.probability(-5.0)


def test_precision_stays_finite_and_learning_quick_after_100k_observations() -> None:
    source, calibration = random.Random(7), Calibration()
    for _ in range(100_000):
        z = source.gauss(0.0, 2.0)
        calibration.learn(z, source.random() < sigmoid(z))
    parameters = (calibration.a, calibration.b, calibration._paa, calibration._pab, calibration._pbb)
    assert all(abs(v) < 1e4 for v in parameters)
    assert calibration._paa * calibration._pbb > calibration._pab**2
    for _ in range(400):  # it has not settled for good
        calibration.learn(0.0, False)
    assert calibration.probability(0.0) < 0.15


# --- what a verdict tells


def judgement(calibration: Calibration | None, counts: Calibration | None = None) -> Judgement:
    return Judgement(small_net(), calibration, counts, 0.0)


class Recorder(Calibration):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, bool]] = []

    def learn(self, z: float, accepted: bool) -> None:
        self.seen.append((z, accepted))
        super().learn(z, accepted)


ODDS = [Odds(0.9, 2.0), Odds(0.8, 1.5), Odds(0.7, 1.0), Odds(0.6, 0.5)]


def test_a_draft_accepted_whole_adds_successes_only() -> None:
    recorder = Recorder()
    judgement(recorder).observe(ODDS, 4)
    assert recorder.seen == [(2.0, True), (1.5, True), (1.0, True), (0.5, True)]


def test_the_first_rejection_is_the_only_failure_and_nothing_behind_it_counts() -> None:
    recorder = Recorder()
    judgement(recorder).observe(ODDS, 1)
    assert recorder.seen == [(2.0, True), (1.5, False)]


def test_an_empty_draft_teaches_nothing() -> None:
    recorder = Recorder()
    judged = judgement(recorder)
    before = judged.recent.value
    judged.observe([], 0)
    assert recorder.seen == []
    assert judged.recent.value == before


def test_recent_acceptance_is_read_for_the_next_judgement() -> None:
    judged = judgement(None)
    for _ in range(40):
        judged.observe(ODDS, 0)
    assert judged.recent.value < 0.1
    reads = Predictor([0.0] * N, [1.0] * N, [([[1.0 if f == "recent" else 0.0] for f in FEATURES], [0.0])])
    judged.predictor = reads
    assert judged.judge(Signal(0.5), []).p == pytest.approx(sigmoid(judged.recent.value))


def test_ngrams_have_their_own_odds_and_their_own_calibration() -> None:
    model, counts = Recorder(), Recorder()
    judged = judgement(model, counts)
    odds = judged.judge(Signal(confidence=0.75, counted=True), [])
    assert odds.p == pytest.approx(0.75)
    assert odds.counted
    judged.observe([odds, Odds(0.9, 2.0)], 1)
    ((z, accepted),) = counts.seen
    assert z == pytest.approx(math.log(3.0))
    assert accepted
    assert model.seen == [(2.0, False)]


def test_the_judgement_of_a_token_is_the_calibrated_model() -> None:
    calibration = Calibration()
    calibration.a, calibration.b = 0.5, -1.0
    signal = Signal(0.6, 1.0, 0.2, 3.0, 1.0)
    z = small_net().logit(features(signal, 2, 0.8, 0.0))
    odds = judgement(calibration).judge(signal, [0.9, 0.8])
    assert odds.z == pytest.approx(z)
    assert odds.p == pytest.approx(sigmoid(0.5 * z - 1.0))
