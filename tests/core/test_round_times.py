"""What an edge measures of itself, its link and its verifier, and what it concludes from that."""

from __future__ import annotations

import math
import random

import pytest

from wisp.core.draft.round_times import TYPICAL, Line, Mean, RoundTimes


def test_a_mean_starts_at_the_first_measurement_and_follows_a_change() -> None:
    mean = Mean(0.0, 0.1)
    mean.add(50.0)
    assert mean.value == 50.0
    for _ in range(100):
        mean.add(20.0)
    assert mean.value == pytest.approx(20.0, abs=0.1)


def test_answers_taken_in_together_count_like_each_by_itself() -> None:
    for prior in (0, 10):
        together, each = Mean(0.8, 0.03, prior), Mean(0.8, 0.03, prior)
        for yes, n in ((3, 4), (0, 1), (2, 2), (0, 0), (5, 9)):
            together.add_each(yes, n)
            for i in range(n):
                each.add(1.0 if i < yes else 0.0)
            assert (together.n, together.value, together.deviation) == (each.n, each.value, each.deviation)


def test_a_start_that_is_worth_measurements_does_not_jump() -> None:
    mean = Mean(0.8, 0.03, prior=10)
    mean.add(0.0)
    assert mean.value == pytest.approx(0.8 * 10 / 11)


def test_deviation_tells_jitter_from_a_steady_wait() -> None:
    steady, jittery = Mean(0.0, 0.15), Mean(0.0, 0.15)
    for i in range(200):
        steady.add(40.0)
        jittery.add(40.0 + (10.0 if i % 2 else -10.0))
    assert steady.deviation == 0.0
    assert jittery.deviation == pytest.approx(10.0, rel=0.2)


def test_slope_and_intercept_of_a_noisy_line() -> None:
    source, line = random.Random(1), Line()
    for _ in range(300):
        x = source.randint(0, 8)
        line.add(x, 30.0 + 2.5 * x + source.gauss(0.0, 1.0))
    assert line.slope == pytest.approx(2.5, abs=0.3)
    assert line.intercept == pytest.approx(30.0, abs=1.5)


def test_a_falling_line_has_no_slope() -> None:
    line = Line()
    for x in range(9):
        line.add(x, 100.0 - 5.0 * x)
    assert line.slope == 0.0
    assert line.intercept == pytest.approx(line.y / line.n)  # the mean


def test_drafts_that_never_vary_tell_nothing_of_the_slope() -> None:
    line = Line()
    for y in (20.0, 35.0, 28.0, 41.0, 30.0):
        line.add(4, y)
    assert line.slope == pytest.approx(0.0, abs=1e-9)


def test_steps_that_are_long_for_other_reasons_are_no_cost_of_drafts() -> None:
    """A crowd's steps: a fifth of them read a prompt. Few of this edge's tokens are in any."""
    slopes = []
    for seed in range(50):
        source, line = random.Random(seed), Line()
        for _ in range(100):
            x = source.choice([0, 0, 0, 0, 1, 1, 2, 5])
            line.add(x, source.choice([90.0, 100.0, 110.0, 120.0, 380.0]))
            slopes.append(line.slope)
        for _ in range(100):
            line.add(0, source.choice([90.0, 100.0, 110.0, 120.0, 380.0]))
        assert line.slope < 1.0
    assert sum(slopes) / len(slopes) < 1.0


def test_two_points_are_no_slope() -> None:
    line = Line()
    line.add(0, 90.0)
    line.add(3, 380.0)
    assert line.slope == 0.0


def test_nothing_is_known_before_the_first_point() -> None:
    assert (Line().slope, Line().intercept) == (0.0, 0.0)


def measured(draft_ms: float, wait_ms: float, token_ms: float, acceptance: float) -> RoundTimes:
    """Many verdicts of drafts of all lengths."""
    times = RoundTimes()
    times.draft.add(draft_ms)
    for i in range(120):
        k = i % 7
        times.verdict(k, wait_ms + token_ms * k, 3.0, 15.0 + token_ms * k)
    times.acceptance.value = acceptance
    return times


def expected_tokens(acceptance: float, k: int) -> float:
    """Of a draft of k: one token in any case, and token i of the draft if the first i are right."""
    return 1.0 + sum(acceptance**i for i in range(1, k + 1))


@pytest.mark.parametrize("draft_ms", [1.0, 15.0, 120.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("longest", [1, 5, 16])
def test_best_speed_is_that_of_the_best_fixed_length(
    draft_ms: float, acceptance: float, longest: int
) -> None:
    times = measured(draft_ms, 60.0, 2.0, acceptance)
    brute = max(expected_tokens(acceptance, k) / (k * draft_ms + 60.0 + 2.0 * k) for k in range(longest + 1))
    assert times.best_speed(longest) == pytest.approx(brute, rel=0.03)


def test_before_a_round_was_timed_no_speed_is_promised() -> None:
    """A wait of 0 because none was measured would promise an infinite speed, next to which no draft is worth its time;
    and without drafts none would ever be measured."""
    times = RoundTimes()
    for _ in range(50):
        times.drafted(10.0)
        times.verdict(3, None, 2.0, 60.0)  # sent ahead, so its wait says nothing
        times.round(3, 2, 70.0)
    assert times.best_speed(16) == 0.0
    assert times.speed(16) == pytest.approx(2 / 70.0, rel=0.01)


def test_certain_acceptance_gives_a_finite_speed() -> None:
    times = measured(10.0, 60.0, 0.0, 1.0)
    assert math.isfinite(times.best_speed(16))
    assert times.best_speed(16) > times.best_speed(4)


def test_waiting_is_told_apart_from_what_the_size_of_a_draft_explains() -> None:
    times = measured(10.0, 60.0, 2.0, 0.8)
    assert times.wait.value == pytest.approx(60.0, rel=0.03)
    assert times.wait_ms(10) - times.wait_ms(0) == pytest.approx(20.0, rel=0.1)


def test_speed_is_the_measured_one_where_that_is_better() -> None:
    times = measured(20.0, 100.0, 0.0, 0.8)
    for _ in range(30):
        times.round(5, 6, 60.0)  # drafting ahead hides time that the formula counts
    assert times.speed(16) == pytest.approx(0.1)
    assert times.speed(16) > times.best_speed(16)


def test_a_bad_habit_does_not_lower_the_speed_to_be_had() -> None:
    times = measured(5.0, 50.0, 0.5, 0.8)
    for _ in range(30):
        times.round(0, 1, 500.0)
    assert times.speed(8) == times.best_speed(8)


def test_the_speed_of_the_verifier_alone_is_guessed_until_it_was_seen() -> None:
    times = measured(10.0, 60.0, 2.0, 0.8)
    assert times.serve_ms == pytest.approx(15.0 + 3.0, rel=0.05)  # a step without drafts, and its queue
    for _ in range(40):
        times.decoded(2, 90.0)
    assert times.serve_ms == pytest.approx(45.0)


@pytest.mark.parametrize("believed", [0.1, 0.99])
def test_without_drafts_belief_goes_back_to_what_is_typical(believed: float) -> None:
    times = measured(10.0, 60.0, 2.0, believed)
    times.decoded(10, 200.0)
    once = times.acceptance.value
    assert abs(once - TYPICAL) < abs(believed - TYPICAL)
    for _ in range(30):
        times.decoded(10, 200.0)
    assert times.acceptance.value == pytest.approx(TYPICAL, abs=0.01)


def test_rounds_with_drafts_forget_nothing_of_acceptance() -> None:
    times = measured(10.0, 60.0, 2.0, 0.3)
    times.round(3, 1, 90.0)
    assert times.acceptance.value == 0.3
    times.round(0, 1, 60.0)
    assert times.acceptance.value > 0.3


def test_the_next_session_starts_from_what_was_measured_and_the_price_last_told() -> None:
    times = measured(10.0, 60.0, 2.0, 0.6)
    times.price = 0.4
    for _ in range(30):
        times.round(5, 6, 30.0)
    after = times.successor()
    assert after.price == 0.4  # the verifier's load outlasts an answer
    assert after.draft.value == 10.0
    assert after.acceptance.value == 0.6
    assert after.wait_ms(5) == times.wait_ms(5)
    for _ in range(6):
        after.round(1, 1, 100.0)
        times.round(1, 1, 100.0)
    assert after.speed(1) < times.speed(1)  # a new text may go otherwise: less weight on the last one's speed


def test_a_successor_measures_for_itself() -> None:
    times = measured(10.0, 60.0, 2.0, 0.6)
    after = times.successor()
    for _ in range(50):
        after.draft.add(99.0)
        after.acceptance.add(1.0)
    assert times.draft.value == 10.0
    assert times.acceptance.value == 0.6
