"""When those who wait for a verifier give up, on a clock that is made of numbers."""

from __future__ import annotations

import math

from wisp.core.draft.patience import BEAT_S, Patience


def awake(patience: Patience, start: float, until: float) -> float:
    """Beats as they come while nothing is the matter. Returns `until`."""
    now = start
    while now < until:
        patience.beat(now)
        now += BEAT_S
    patience.beat(until)
    return until


def test_it_gives_up_once_the_time_is_over() -> None:
    patience = Patience(30.0, 100.0)
    assert patience.left_s(100.0) == 30.0
    awake(patience, 100.0, 129.0)
    assert patience.left_s(129.0) == 1.0
    awake(patience, 129.0, 130.0)
    assert patience.left_s(130.0) == 0.0


def test_the_time_runs_from_the_loss_or_from_when_it_mattered() -> None:
    patience = Patience(30.0, 0.0)
    awake(patience, 0.0, 100.0)
    patience.lost(100.0)
    assert patience.left_s(100.0) == 30.0
    awake(patience, 100.0, 120.0)
    assert patience.left_s(120.0, since=patience.beat(110.0)) == 20.0


def test_time_asleep_does_not_count() -> None:
    patience = Patience(30.0, 0.0)
    awake(patience, 0.0, 20.0)
    assert patience.left_s(5000.0) == 10.0
    assert patience.left_s(5000.0) == 10.0
    awake(patience, 5000.0, 5010.0)
    patience.failed(patience.began(5010.0))
    assert patience.left_s(5010.0) == 0.0


def test_after_waking_it_gives_up_only_once_another_attempt_has_failed() -> None:
    patience = Patience(30.0, 0.0)
    awake(patience, 0.0, 29.0)
    before = patience.began(29.0)
    awake(patience, 1029.0, 1030.0)  # it slept while that attempt was under way
    assert patience.left_s(1030.0) > 0.0
    patience.failed(before)
    assert patience.left_s(1030.0) > 0.0
    patience.failed(patience.began(1031.0))
    assert patience.left_s(1031.0) == 0.0


def test_a_request_long_after_the_loss_fails_at_once() -> None:
    patience = Patience(30.0, 0.0)
    awake(patience, 0.0, 10_000.0)
    assert patience.left_s(10_000.0) == 0.0


def test_a_verifier_that_came_back_makes_up_for_all_sleep_before() -> None:
    patience = Patience(30.0, 0.0)
    awake(patience, 0.0, 10.0)
    awake(patience, 1000.0, 1010.0)
    patience.lost(1010.0)
    awake(patience, 1010.0, 1040.0)
    assert patience.left_s(1040.0) == 0.0


def test_a_busy_machine_is_not_asleep() -> None:
    patience = Patience(30.0, 0.0)
    for now in range(2, 31, 2):  # every beat comes a whole beat late
        patience.beat(float(now))
    assert patience.left_s(30.0) == 0.0


def test_a_rest_that_is_only_rounding_is_not_waited_for() -> None:
    patience = Patience(0.3, 0.1)
    for now in (math.nextafter(0.4, 0.0), 0.4 - 1e-9):
        assert 0.1 + 0.3 - now > 0.0
        assert patience.left_s(now) == 0.0
