"""The cost model: fits, and learning from steps that differ from the profile."""

from __future__ import annotations

import random
from statistics import median

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisp.core.protocol.step import Slice
from wisp.core.verify.cost import Coefficients, CostModel, Load, _row, errors, fit, load_of
from wisp.engines.emulated import hardware

TRUTH = Coefficients(step=40.0, token=0.3, cached=2e-4, attention=2e-5)
KNEED = Coefficients(step=40.0, token=0.1, cached=2e-4, attention=1e-5, beyond=0.4, knee=96)


def steps(n: int, seed: int = 0) -> list[Load]:
    """Steps of a server: some dozen sessions verify or decode, with an occasional prefill chunk."""
    source = random.Random(seed)
    loads = []
    for _ in range(n):
        load = Load()
        for _ in range(source.randint(1, 60)):
            load = load.plus(source.choice((1, 1, 3, 5, 8)), source.randint(20, 600))
        if source.random() < 0.3:
            load = load.plus(source.randint(32, 256), source.choice((0, 0, 256)))
        loads.append(load)
    return loads


def noisy(ms: float, source: random.Random, sigma: float = 0.03) -> float:
    return ms * float(np.exp(source.gauss(0.0, sigma)))


def variances(model: CostModel) -> np.ndarray:
    """Of the coefficients that it has learned."""
    return np.array([line[i] for i, line in enumerate(model._p)])


def test_the_load_of_a_step_counts_new_cached_and_attended_tokens() -> None:
    batch = [Slice(1, 0, 100, [7] * 5, n_draft=4), Slice(2, 1, 0, [7] * 30, sample=False)]
    assert load_of(batch) == Load(new=35, attention=5 * 105 + 30 * 30, cached=100, slices=2)
    assert load_of(batch) == Load().plus(5, 100).plus(30, 0)


def test_a_fit_recovers_the_coefficients_that_made_the_times() -> None:
    loads = steps(200)
    for truth in (TRUTH, slower(TRUTH, 7.0)):
        found = fit(loads, [truth.ms(load) for load in loads], paper=True)
        for name in ("step", "token", "cached", "attention"):
            assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6)
        assert (found.beyond, found.knee) == (0.0, 0)


def test_an_engine_that_takes_each_slice_by_itself_is_learned_from_scratch() -> None:
    truth = Coefficients(step=1.0, token=25.0, attention=0.01, slice=60.0)
    loads = steps(300)
    times = [truth.ms(load) for load in loads]
    assert fit(loads, times).slice == pytest.approx(60.0, rel=1e-3)
    assert fit(loads, times, paper=True).slice == 0.0
    model, source, off = CostModel(), random.Random(3), []
    for load, ms in zip(loads, times, strict=True):
        off.append(abs(model.ms(load) / ms - 1.0))
        model.observe(load, noisy(ms, source))
    assert median(off[-100:]) < 0.05


def test_a_fit_through_noise_is_near_and_its_errors_say_so() -> None:
    source = random.Random(5)
    loads = steps(400)
    times = [noisy(TRUTH.ms(load), source) for load in loads]
    found = fit(loads[:280], times[:280])
    judged = errors(found, loads[280:], times[280:])
    assert 0.015 < judged.mape < 0.035  # the noise, no more: the mean of |N(0, 3 %)| is 2.4 %
    assert judged.r2 > 0.95
    assert found.step == pytest.approx(TRUTH.step, rel=0.1)


def test_the_knee_is_found_where_there_is_one_and_a_line_misses() -> None:
    loads = steps(300)
    times = [KNEED.ms(load) for load in loads]
    with_knee = fit(loads, times)
    assert abs(with_knee.knee - KNEED.knee) <= 8
    assert errors(with_knee, loads, times).mape < 0.003
    assert errors(fit(loads, times, paper=True), loads, times).mape > 0.03


def test_no_knee_is_seen_in_a_little_noise() -> None:
    """A dozen noisy times always fit better with some knee, which would fail on others."""
    for seed in range(10):
        source = random.Random(seed)
        loads = steps(13, seed)
        few = fit(loads, [noisy(TRUTH.ms(load), source, 0.2) for load in loads])
        others = steps(100, 99)
        assert errors(few, others, [TRUTH.ms(load) for load in others]).mape < 0.22


def test_without_a_knee_the_coefficient_beyond_does_not_count() -> None:
    """Prediction and learning must use the same regressors, or learning never converges."""
    odd = Coefficients(step=1.0, token=1.0, beyond=5.0, knee=0)
    assert odd.ms(Load(10)) == 11.0
    model = CostModel(odd)
    assert model.token_ms(Load(10)) == 1.0


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_profile_wrong_by_a_factor_of_two_heals_within_300_steps(factor: float, seed: int) -> None:
    profile = hardware("a100-qwen3-32b")
    source = random.Random(seed)
    loads = steps(300, seed)
    truth = [profile.step_ms(load) for load in loads]
    model = CostModel(slower(fit(loads, truth), factor))
    off = []
    for load, ms in zip(loads, truth, strict=True):
        took = noisy(ms, source)
        off.append(abs(model.ms(load) / took - 1.0))
        model.observe(load, took)
    assert off[0] > 0.3  # it was wrong
    assert median(off[150:]) < 0.10
    assert median(off[-50:]) < 0.05
    assert 1.0 <= model.margin <= 2.0


def test_a_machine_that_slows_down_is_followed() -> None:
    source = random.Random(2)
    model = CostModel(TRUTH)
    slow = slower(TRUTH, 1.6)
    for load in steps(300, 1):
        model.observe(load, noisy(TRUTH.ms(load), source))
    for load in steps(300, 2):
        model.observe(load, noisy(slow.ms(load), source))
    off = [abs(model.ms(load) / slow.ms(load) - 1.0) for load in steps(100, 3)]
    assert median(off) < 0.05


def test_an_occasional_outlier_changes_little() -> None:
    source = random.Random(3)
    model = CostModel(TRUTH)
    for i, load in enumerate(steps(600, 4)):
        ms = noisy(TRUTH.ms(load), source)
        model.observe(load, ms * 20 if i % 50 == 49 else ms)
    off = [abs(model.ms(load) / TRUTH.ms(load) - 1.0) for load in steps(100, 5)]
    assert median(off) < 0.05


def test_the_margin_holds_nine_times_out_of_ten() -> None:
    source = random.Random(8)
    model = CostModel(TRUTH)
    kept = []
    for i, load in enumerate(steps(2000, 6)):
        ms = noisy(TRUTH.ms(load), source, 0.1)
        if i > 500:
            kept.append(ms <= model.ms(load) * model.margin)
        model.observe(load, ms)
    assert 0.85 < sum(kept) / len(kept) < 0.95


def test_the_covariance_stays_bounded_over_a_hundred_thousand_steps_of_the_same_kind() -> None:
    """Without new information, forgetting lets it grow, and one odd step could then change every coefficient."""
    source = random.Random(4)
    model = CostModel(TRUTH)
    load = Load().plus(5, 100)
    most = np.array([40.0, 0.3, 2e-4, 2e-5, 0.0, 1e-2]) ** 2
    for i in range(100_000):
        model.observe(load, noisy(TRUTH.ms(load), source))
        if i % 5000 == 0:
            assert (variances(model) <= np.maximum(most, 1.0) * (1 + 1e-9)).all()
    assert (variances(model) <= np.maximum(most, 1.0) * (1 + 1e-9)).all()
    assert (variances(model) >= 0.0).all()
    assert model.ms(load) == pytest.approx(TRUTH.ms(load), rel=0.05)
    big = Load().plus(400, 0)
    model.observe(big, TRUTH.ms(big))
    assert model.ms(load) == pytest.approx(TRUTH.ms(load), rel=0.25)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.integers(0, 100_000), st.floats(-1.0, 1e5)),
        min_size=1,
        max_size=80,
    )
)
def test_no_coefficient_is_ever_negative_or_not_a_number(seen: list[tuple[int, int, float]]) -> None:
    for start in (None, TRUTH, KNEED):
        model = CostModel(start)
        for new, cached, ms in seen:
            model.observe(Load().plus(new, cached), ms)
            now = model.now
            values = (now.step, now.token, now.cached, now.attention, now.beyond)
            assert all(0.0 <= v < float("inf") for v in values)
            assert np.isfinite(variances(model)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(0, 4000), st.floats(0.1, 1e3)), min_size=3, max_size=30
    )
)
def test_a_fit_is_never_negative_and_no_worse_than_its_best_constant(
    seen: list[tuple[int, int, float]],
) -> None:
    loads = [Load().plus(new, cached) for new, cached, _ in seen]
    ms = np.array([m for *_, m in seen])
    found = fit(loads, ms.tolist())
    assert min(found.step, found.token, found.cached, found.attention, found.beyond) >= 0.0
    relative = np.array([found.ms(load) for load in loads]) / ms - 1.0
    constant = float((1 / ms).sum() / (1 / ms**2).sum())
    assert (relative**2).sum() <= ((constant / ms - 1.0) ** 2).sum() * (1 + 1e-6) + 1e-9


def slower(c: Coefficients, factor: float) -> Coefficients:
    """The same machine, `factor` times as slow."""
    times = ("step", "token", "cached", "attention", "beyond", "slice")
    return msgspec.structs.replace(c, **{name: getattr(c, name) * factor for name in times})


def test_the_error_is_the_median_of_how_far_predictions_were_off() -> None:
    model = CostModel(Coefficients(step=10.0, token=1.0))
    model.observe(Load(10, 100, 0, 1), 30.0)  # 20 were predicted
    assert model.error == pytest.approx(0.5)


class Reference:
    """Recursive least squares as `CostModel._learn` has them, by matrices."""

    def __init__(self, start: Coefficients | None) -> None:
        model = CostModel(start)
        self.theta, self.p = np.array(model._theta), np.array(model._p)
        self.most = np.array(model._most)

    def learn(self, row: np.ndarray, error: float, noise: float, forgetting: float) -> None:
        p = self.p / forgetting
        fixed = np.zeros(6, bool)
        before = self.theta
        while True:
            free = np.where(fixed, 0.0, row)
            onto = np.where(fixed, 0.0, p @ free)
            share = noise * noise + row @ onto
            theta = before + onto * error / share
            below = theta < 0.0
            if not below.any():
                break
            error += row[below] @ before[below]
            before = np.where(below, 0.0, before)
            fixed |= below
        p = np.where(np.outer(~fixed, ~fixed) | np.eye(6, dtype=bool), p, 0.0) - np.outer(onto, onto) / share
        shrink = np.sqrt(np.minimum(1.0, self.most / np.maximum(p.diagonal(), 1e-300)))
        self.theta, self.p = theta, p * np.outer(shrink, shrink)


@pytest.mark.parametrize("start", [None, TRUTH, KNEED])
@pytest.mark.parametrize("seed", range(3))
def test_learning_is_recursive_least_squares(start: Coefficients | None, seed: int) -> None:
    """Also where coefficients are held at 0, and where variances reach their bounds."""
    source = random.Random(seed)
    model, reference = CostModel(start), Reference(start)
    held = 0
    for load in steps(150, seed):
        ms = noisy(KNEED.ms(load), source, 0.3)
        row = np.array(_row(load, model.knee)) / ms
        steps_, ratio = model.steps + 1, ms / model.ms(load)
        model.observe(load, ms)
        assert model.steps == steps_
        assert model._errors[-1] == ratio
        noise = max(1.5 * model._spread, 0.02 + 0.5 / model.steps)
        most = 3.0 * max(noise, model._bias)
        error = float(np.clip(1.0 - row @ reference.theta, -most, most))
        reference.learn(row, error, noise, 0.93 if model._bias > 2.0 * noise else 0.99)
        held += (reference.theta == 0.0).any()
        assert model._theta == pytest.approx(reference.theta, rel=1e-6, abs=1e-12)
        assert np.array(model._p) == pytest.approx(reference.p, rel=1e-5, abs=1e-12)
        assert (np.array(model._p) == np.array(model._p).T).all()
    assert start is TRUTH or held
