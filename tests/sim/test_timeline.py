"""Virtual time: calls happen in the order of their times, and those of one time in the order they were scheduled."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from wisp.sim.timeline import Timeline


@pytest.mark.parametrize("seed", range(5))
def test_calls_happen_by_time_and_then_by_order_of_scheduling(seed: int) -> None:
    """A run in which calls schedule more calls, at times that often coincide."""
    env, source, numbers = Timeline(), random.Random(seed), itertools.count()
    scheduled: list[tuple[float, int]] = []
    happened: list[tuple[float, int]] = []

    def later(delay: float) -> None:
        call = (env.now + delay, next(numbers))
        scheduled.append(call)
        env.after(delay, lambda: happen(call))

    def happen(call: tuple[float, int]) -> None:
        assert env.now == call[0]
        happened.append(call)
        for _ in range(source.randrange(3) if len(happened) < 200 else 0):
            later(source.choice([0.0, 0.5, 1.0]))

    for i in range(5):
        later(i / 4)
    for until in (0.75, 2.0, 50.0):
        env.run(until=until)
        assert env.now == until
    assert happened == sorted(scheduled)
    assert env.next == math.inf
    assert not env.step()


def test_a_call_due_at_the_end_of_a_run_happens_in_the_next() -> None:
    env, seen = Timeline(), []
    env.after(1.0, lambda: seen.append(env.now))
    env.run(until=1.0)
    assert not seen
    assert env.next == 1.0
    env.run(until=1.5)
    assert seen == [1.0]


def test_a_cancelled_call_does_not_happen() -> None:
    env, seen = Timeline(), []
    cancel = env.at(1.0, lambda: seen.append("cancelled"))
    env.at(0.5, lambda: seen.append("kept"))
    cancel()
    env.run(until=2.0)
    assert seen == ["kept"]
    env.at(0.5, lambda: seen.append("at once"))  # that time has passed
    assert env.step()
    assert (env.now, seen[-1]) == (2.0, "at once")


@pytest.mark.parametrize("stepping", [True, False])
def test_time_stands_where_an_exception_was_raised(stepping: bool) -> None:
    env = Timeline()

    def fail() -> None:
        raise ValueError("here")

    env.after(0.25, fail)
    with pytest.raises(ValueError, match="here"):
        env.step() if stepping else env.run(until=1.0)
    assert env.now == 0.25
    seen: list[float] = []
    env.after(0.0, lambda: seen.append(env.now))  # calls after the exception still happen
    env.run(until=1.0)
    assert seen == [0.25]
