"""The sampling rule against a slow one that spells it out, and against the distribution it promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wisp.core.protocol.sampling import (
    FAR,
    OCTAVE,
    WEIGHT,
    Sampling,
    distances,
    gumbels,
    hash32,
    keys,
    log_probability,
    reach,
    second_choice,
    target_token,
    uniforms,
    verify,
    weights,
)

PINNED = [1099511627776, 1099511582720, 872682929152, 549755793408, 549755813888, 8384330, 2, 1, 0]


def slow_distance(peak: float, logit: float, temperature: float) -> int:
    """One number at a time, in Python's floats, rounded to float32 after each operation."""
    below = np.float32(peak - logit)
    per_logit = np.float32(2**24 / (temperature * math.log(2.0)))
    return min(41 * 2**24, int(float(np.float32(float(below) * float(per_logit)))))


def slow_weight(distance: int) -> int:
    """Python's whole numbers."""
    octaves, part = divmod(distance, 2**24)
    power = 0
    for term in reversed(WEIGHT):
        power = term - (power * part >> 24)
    return power << 10 >> octaves


def slow_kept(logits: list[float], s: Sampling) -> list[int]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    away = [slow_distance(logits[order[0]], logit, s.temperature) for logit in logits]
    if s.top_k:
        order = order[: s.top_k]
    if s.top_p < 1.0:
        total = float(sum(slow_weight(away[i]) for i in order))
        reached, mass = [], 0
        for i in order:
            reached.append(i)
            mass += slow_weight(away[i])
            if float(mass) >= s.top_p * total:
                break
        order = reached
    if s.min_p > 0.0:
        order = [i for i in order if away[i] <= -(2**24) * math.log2(s.min_p)]
    return order


def slow_token(logits: np.ndarray, s: Sampling, position: int) -> int:
    if s.temperature == 0:
        return min(range(len(logits)), key=lambda i: (-logits[i], i))
    scores = [float(x) / s.temperature for x in logits]
    noise = gumbels(s.seed, position, np.arange(len(scores)))
    kept = slow_kept([float(x) for x in logits], s)
    return min(kept, key=lambda i: (-(scores[i] + noise[i]), i))


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**64 - 1),
)


@settings(max_examples=300, deadline=None)
@given(
    # Few distinct values, so that ties at every boundary are common.
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.integers(-40, 40).map(lambda i: i / 2)),
    samplings,
    st.integers(0, 5000),
)
def test_fast_path_is_the_rule_spelt_out(logits: np.ndarray, sampling: Sampling, position: int) -> None:
    assert target_token(logits, sampling, position) == slow_token(logits, sampling, position)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.1, 1.0, 4.0]), samplings)
def test_a_head_of_many_is_the_rule_spelt_out(seed: int, spread: float, sampling: Sampling) -> None:
    """More ids than are looked at first, so that what bounds them is at work."""
    logits = (spread * np.random.default_rng(seed).standard_normal(700)).astype(np.float32)
    assert target_token(logits, sampling, 3) == slow_token(logits, sampling, 3)


def test_weights_are_pinned() -> None:
    """Another weight would move edges of top-p, and so texts."""
    away = np.array(
        [0, 1, OCTAVE // 3, OCTAVE - 1, OCTAVE, 17 * OCTAVE + 12345, 39 * OCTAVE, 40 * OCTAVE, FAR]
    )
    assert weights(away).tolist() == [slow_weight(int(d)) for d in away]
    assert weights(away).tolist() == PINNED
    every = np.arange(0, FAR, 9973)
    exact = 2.0 ** (40 - every / OCTAVE)
    assert np.abs(weights(every) - exact).max() < 2.0**40 * 1e-7
    near = every < 20 * OCTAVE
    assert (np.abs(weights(every) / exact - 1.0)[near]).max() < 1.1e-6


def test_distances_are_whole_numbers_and_end() -> None:
    logits = np.array([3.0, 3.0 - math.log(2.0), -np.inf, -3e38, 2.9999998], np.float32)
    peak = logits.max()
    assert distances(logits, peak, 1.0).tolist() == [0, OCTAVE, FAR, FAR, 5]
    assert distances(logits, peak, 100.0).tolist()[4] == 0
    assert distances(logits, peak, 1e-5).tolist() == [0, FAR, FAR, FAR, 577078]
    assert [reach(p) for p in (0.0, 1e-300, 0.5, 1.0)] == [FAR, FAR, OCTAVE, 0]


@pytest.mark.parametrize(("p", "kept"), [(0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_an_edge_of_equal_weights_is_exact(p: float, kept: int) -> None:
    """Whatever the order of the ids, and how many others there are beside them."""
    for size in (4, 5000):
        logits = np.full(size, -60.0, np.float32)
        at = np.sort(np.random.default_rng(size).choice(size, 4, replace=False))
        logits[at] = 7.5
        said = {target_token(logits, Sampling(1.0, 0, p, seed=s), 0) for s in range(200)}
        assert said == set(at[:kept].tolist())


def test_keys_of_many_are_those_of_each() -> None:
    seeds, positions = [0, -1, 1 << 70, 2**64 - 1], np.array([0, 5, 123456, 7])
    ids = np.arange(10)
    some = keys(np.array([seed % 2**64 for seed in seeds], np.uint64), positions)
    for seed, position, key in zip(seeds, positions.tolist(), some.tolist(), strict=True):
        expected = [hash32(seed, position, int(i)) for i in ids]
        assert [hash_of(key, int(i)) for i in ids] == expected
        assert (uniforms(seed, position, ids) * 2.0**32 - 0.5).tolist() == expected


def hash_of(key: int, token: int) -> int:
    """SplitMix64's output function, by Python's whole numbers."""
    x = ((token + 1) * 0x9E3779B97F4A7C15 + key) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) >> 32


@pytest.mark.parametrize("scale", [0.5, 2.5, 8.0])
def test_pruning_is_exact_on_a_large_vocabulary(scale: float) -> None:
    rng = np.random.default_rng(1)
    ids = np.arange(150_000)
    for position in range(12):
        logits = (rng.normal(size=ids.size) * scale).astype(np.float32)
        sampling = Sampling(temperature=1.0, seed=position)
        best = logits.astype(np.float64) + gumbels(position, position, ids)
        assert target_token(logits, sampling, position) == int(np.argmax(best))


def test_noise_of_a_few_ids_is_the_noise_of_all() -> None:
    everything = uniforms(7, 3, np.arange(1000))
    some = np.array([999, 0, 512])
    assert np.array_equal(uniforms(7, 3, some), everything[some])
    assert 0.0 < everything.min() < everything.max() < 1.0


def test_the_hash_is_pinned() -> None:
    """Texts drawn with a seed must stay what they are from one release to the next."""
    ids = np.array([0, 1, 151_935])
    expected = [595752380, 4170851686, 1407602383]
    assert [int(u * 2**32) for u in uniforms(0, 0, ids)] == expected
    assert [hash32(0, 0, int(i)) for i in ids] == expected
    assert uniforms(-1, 0, ids).tolist() == uniforms(2**64 - 1, 0, ids).tolist()


def test_noise_differs_by_seed_position_and_id() -> None:
    values = {
        float(uniforms(s, p, np.array([i]))[0]) for s in range(10) for p in range(10) for i in range(10)
    }
    assert len(values) == 1000


def test_frequencies_are_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03])).astype(np.float32)
    n = 20_000
    counts = np.bincount([target_token(logits, Sampling(1.0, seed=s), 0) for s in range(n)], minlength=5)
    expected = n * np.exp(logits.astype(float))
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 23.5  # p = 1e-4 at 4 degrees of freedom


def test_coupled_drafters_agree_nearly_as_often_as_any_can() -> None:
    rng = np.random.default_rng(0)
    agree, optimum = 0, 0.0
    for seed in range(3000):
        p = rng.normal(size=40) * 2
        q = p + rng.normal(size=40) * 0.5
        s = Sampling(1.0, seed=seed)
        agree += target_token(p.astype(np.float32), s, 0) == target_token(q.astype(np.float32), s, 0)
        pp, qq = np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()
        optimum += float(np.minimum(pp, qq).sum())
    assert agree / 3000 > 0.93 * optimum / 3000


def test_verify_reads_no_further_than_the_first_disagreement() -> None:
    rows = [np.eye(5, dtype=np.float32)[i] for i in (3, 1, 4)]

    def reading() -> Iterator[np.ndarray]:
        yield rows[0]
        yield rows[1]
        raise AssertionError("read too far")

    assert verify(reading(), [3, 2, 0], Sampling(), 0) == (1, [3, 1])
    assert verify(rows, [3, 1], Sampling(), 0) == (2, [3, 1, 4])
    with pytest.raises(ValueError, match="need 4 rows"):
        verify(rows, [3, 1, 4], Sampling(), 0)


def test_log_probabilities_are_of_the_plain_softmax() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    value, top = log_probability(logits, 2, 2)
    assert value == pytest.approx(math.log(0.25))
    assert [i for i, _ in top] == [0, 1]  # the tie goes to the lower id
    assert top[0][1] == pytest.approx(math.log(0.5))


def test_log_probabilities_of_a_large_vocabulary() -> None:
    """Right to 1e-5 of float64, ties at the edge by lower id."""
    rng = np.random.default_rng(3)
    for spread in (0.0, 1.0, 8.0):
        logits = np.round(spread * rng.standard_normal(50_000), 1).astype(np.float32)
        scores = logits.astype(np.float64)
        log_z = float(np.log(np.exp(scores - scores.max()).sum()) + scores.max())
        order = np.lexsort((np.arange(logits.size), -scores))[:20]
        value, top = log_probability(logits, 77, 20)
        assert value == pytest.approx(scores[77] - log_z, abs=1e-5)
        assert [i for i, _ in top] == order.tolist()
        assert [v for _, v in top] == pytest.approx((scores[order] - log_z).tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [5e-324, 2.3e-308, 1e-300, 9.9e-6])
@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float, how: dict[str, Any]) -> None:
    logits = np.array([1.0, 3.0, 3.0, -2.0, 2.999999], np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert target_token(logits, Sampling(temperature, seed=4, **how), 0) == 1
        assert target_token(100 * logits, Sampling(1e-5, seed=4, **how), 0) in (
            1,
            2,
        )  # and this does not overflow


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_ids_that_end_a_generation_are_out_until_there_are_enough_tokens(
    temperature: float, how: dict[str, Any]
) -> None:
    logits = np.array([0.0, 9.0, 1.0, 9.5], np.float32)
    before = logits.copy()
    sampling = Sampling(temperature, seed=2, min_tokens=3, **how).ending([3, 1, 77])
    assert sampling.ends == (1, 3, 77)
    without = np.array([0.0, -np.inf, 1.0, -np.inf], np.float32)
    for position in range(3):
        token = target_token(logits, sampling, position)
        assert token == target_token(without, Sampling(temperature, seed=2, **how), position)
        assert token in (0, 2)
    assert target_token(logits, sampling, 3) == target_token(logits, Sampling(temperature, seed=2, **how), 3)
    assert np.array_equal(logits, before)  # log probabilities are of what the model said
    assert Sampling(seed=2).ending([3]) == Sampling(seed=2)


def test_out_of_range_parameters_are_named() -> None:
    assert Sampling(temperature=-1).problem() == ("temperature", "must be between 0 and 100")
    assert Sampling(temperature=float("nan")).problem() is not None
    assert Sampling(top_p=0.0).problem() is not None
    assert Sampling(0.7, 40, 0.9, 0.1, 5).problem() is None


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, seed=3), Sampling(temperature=1.0, top_p=0.9, seed=4)]
)
def test_a_second_choice_is_what_would_be_said_without_the_first(sampling: Sampling) -> None:
    """Nearly always: it looks at the likeliest ids only, and prunes none of them."""
    right = 0
    for position in range(200):
        logits = np.random.default_rng(position).normal(0.0, 4.0, 2000).astype(np.float32)
        token = target_token(logits, sampling, position)
        other = second_choice(logits, token, sampling, position)
        assert other != token
        logits[token] = -np.inf
        right += other == target_token(logits, sampling, position)
    assert right >= (200 if sampling.greedy else 180)
