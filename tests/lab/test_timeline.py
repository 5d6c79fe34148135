"""Virtual time: in SimPy's order, and with SimPy's own events."""

from __future__ import annotations

import random

import pytest
import simpy

from wisp.sim.timeline import Timeline


def played(env: simpy.Environment, seed: int) -> list[tuple[float, int]]:
    """A run in which what happens makes more happen, at times that often coincide."""
    source, seen = random.Random(seed), []

    def happen(n: int) -> None:
        seen.append((env.now, n))
        for i in range(source.randrange(3) if len(seen) < 200 else 0):
            later(source.choice([0.0, 0.5, 1.0]), 10 * n + i)

    def later(delay: float, n: int) -> None:
        if isinstance(env, Timeline) and n % 2:
            env.after(delay, lambda: happen(n))
        else:
            env.timeout(delay).callbacks.append(lambda _: happen(n))

    for i in range(5):
        later(i / 4, i + 1)
    for until in (0.75, 2.0, 50.0):
        env.run(until=until)
        assert env.now == until
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_simpys(seed: int) -> None:
    assert played(Timeline(), seed) == played(simpy.Environment(), seed)


def test_what_is_due_at_the_end_of_a_run_happens_in_the_next() -> None:
    env, seen = Timeline(), []
    env.after(1.0, lambda: seen.append(env.now))
    env.run(until=1.0)
    assert not seen
    assert env.peek() == 1.0
    env.run(until=1.5)
    assert seen == [1.0]


def test_time_stands_where_an_exception_was_raised() -> None:
    env = Timeline()

    def fail() -> None:
        raise ValueError("here")

    env.after(0.25, fail)
    with pytest.raises(ValueError, match="here"):
        env.run(until=1.0)
    assert env.now == 0.25
    seen: list[float] = []
    env.after(0.0, lambda: seen.append(env.now))  # whoever goes on is not forgotten
    env.run(until=1.0)
    assert seen == [0.25]


def test_processes_run_on_it_too() -> None:
    env, seen = Timeline(), []

    def process() -> object:
        yield env.timeout(1.0)
        seen.append(env.now)

    env.process(process())
    env.run(until=2.0)
    assert seen == [1.0]

    def failing() -> object:
        yield env.timeout(1.0)
        raise ValueError("nobody waits for it")

    env.process(failing())
    with pytest.raises(ValueError, match="nobody"):
        env.run(until=5.0)
