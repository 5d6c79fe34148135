"""Steps in flight before an engine: in order, tokens filled in, and failures that take along what builds on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from slices import PROMPT, SAMPLING, check_slices_after_a_failed_slice_fail_alone, first, follower
from wisp.core.errors import EngineError
from wisp.core.protocol.step import Slice, SliceResult
from wisp.core.verify.events import Run
from wisp.engines.base import StepQueue
from wisp.engines.emulated import EmulatedTarget, VirtualClock, hardware
from wisp.engines.in_order import GONE, LOST, OneAtATime

Make = Callable[[EmulatedTarget, VirtualClock], StepQueue]


def target(clock: VirtualClock, name: str = "h200-qwen3-8b") -> EmulatedTarget:
    return EmulatedTarget(name, hardware(name), now=clock.now, sleep=clock.sleep)


def one_at_a_time(engine: EmulatedTarget, clock: VirtualClock) -> StepQueue:
    return OneAtATime(engine, 2, clock.now)


def device(engine: EmulatedTarget, clock: VirtualClock) -> StepQueue:
    return engine.queue(2)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.mark.parametrize("make", [one_at_a_time, device])
def test_a_chain_of_steps_says_what_plain_decoding_says(make: Make, clock: VirtualClock) -> None:
    plain, text = target(clock), []
    [result] = plain.run([first()])
    for position in range(1, 9):
        text += result.tokens
        [result] = plain.run(
            [Slice(0, 0, len(PROMPT) + position - 1, text[-1:], 0, True, position, SAMPLING)]
        )
    queue, found = make(target(clock), clock), []
    queue.submit(Run([], [first()], 1))
    for position in range(1, 9):
        queue.submit(Run([], [follower(position, position)], position + 1))
        done = queue.collect()
        assert done.step == position
        found += done.results[0].tokens
    assert found == text


@pytest.mark.parametrize("make", [one_at_a_time, device])
def test_a_failed_step_takes_along_those_planned_before_it_was_known(make: Make, clock: VirtualClock) -> None:
    queue = make(target(clock), clock)
    queue.submit(Run([], [first(), first()], 1))  # two slices in one slot
    queue.submit(Run([], [first(1)], 2))
    with pytest.raises(EngineError, match="same slot"):
        queue.collect()
    queue.submit(Run([], [first(1)], 3, epoch=1))
    with pytest.raises(EngineError, match=LOST):
        queue.collect()
    assert queue.collect().results[0].tokens


@pytest.mark.parametrize("make", [one_at_a_time, device])
def test_slices_after_a_failed_slice_fail_alone(make: Make, clock: VirtualClock) -> None:
    check_slices_after_a_failed_slice_fail_alone(make(target(clock), clock))


@pytest.mark.parametrize("make", [one_at_a_time, device])
def test_a_step_of_which_nothing_is_left_does_not_reach_the_engine(make: Make, clock: VirtualClock) -> None:
    engine = target(clock)
    choose, batches = engine.choose, []

    def count(batch: Sequence[Slice]) -> list[SliceResult]:
        batches.append(len(batch))
        return choose(batch)

    engine.choose = count  # type: ignore[method-assign]
    queue = make(engine, clock)
    queue.submit(Run([], [first(start=9)], 1))  # nothing to start from
    queue.submit(Run([], [follower(1, 1)], 2))
    assert queue.collect().results[0].error
    assert queue.collect().results[0].error == GONE
    assert batches == [1]


def test_the_device_runs_one_step_while_the_host_prepares_the_next(clock: VirtualClock) -> None:
    engine = target(clock)
    host_s = engine.profile.host_s(1)
    queue = engine.queue(2)
    queue.submit(Run([], [first()], 1))
    assert clock.seconds == pytest.approx(host_s)  # nobody waits for the device
    queue.submit(Run([], [follower(1, 1)], 2))
    assert clock.seconds == pytest.approx(2 * host_s)
    one = queue.collect().engine_ms / 1e3
    assert clock.seconds == pytest.approx(host_s + one)
    two = queue.collect().engine_ms / 1e3
    assert clock.seconds == pytest.approx(host_s + one + two)


def test_one_at_a_time_the_device_waits_for_the_host(clock: VirtualClock) -> None:
    engine = target(clock)
    queue = engine.queue(1)
    queue.submit(Run([], [first()], 1))
    assert clock.seconds == 0.0
    queue.collect()
    took = clock.seconds
    assert took > engine.profile.host_s(1) + 4e-3
    queue.submit(Run([], [Slice(0, 0, 3, [9], 0, True, 1, SAMPLING)], 2))
    queue.collect()
    assert clock.seconds > 1.8 * took
