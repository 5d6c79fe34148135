"""Slices of sessions, for the tests of what engines do with them, and what every queue of steps does with some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.events import Run
from wisp.engines.base import StepQueue, TargetEngine
from wisp.engines.in_order import GONE

PROMPT = [11, 12, 13, 14, 15]
SAMPLING = Sampling(temperature=1.0, seed=4)


class Target(TargetEngine, Protocol):
    """An engine that tells what it holds."""

    def held(self, slot: int) -> int: ...
    def clear(self) -> None: ...
    def run(self, batch: Sequence[Slice]) -> list[SliceResult]: ...


def other(token: int) -> int:
    return token - 1 if token else 1


def verify(slot: int, draft: list[int], *, start: int = 0, **more: Any) -> Slice:
    return Slice(1, slot, start, PROMPT[start:] + draft, len(draft), sampling=SAMPLING, **more)


def first(slot: int = 0, tokens: list[int] = PROMPT, start: int = 0) -> Slice:
    return Slice(slot, slot, start, tokens, sampling=SAMPLING)


def follower(step: int, position: int, slot: int = 0) -> Slice:
    """The next token of the session whose slice in `step` has not come back."""
    return Slice(slot, slot, len(PROMPT) + position - 1, [0], 0, True, position, SAMPLING, after=step)


def check_slices_after_a_failed_slice_fail_alone(queue: StepQueue) -> None:
    queue.submit(Run([], [first(0, start=9), first(1)], 1))  # nothing to start from
    copied = Slice(2, 2, 3, [8], 0, True, 1, SAMPLING)
    queue.submit(Run([Copy(0, 2, 3)], [follower(1, 1, 0), follower(1, 1, 1), copied], 2))
    failed, fine = queue.collect().results
    assert "holds 0 tokens" in failed.error
    assert not fine.error
    gone, goes_on, gone_too = queue.collect().results
    assert gone.error == gone_too.error == GONE
    assert goes_on.tokens
    queue.submit(Run([], [first(0), first(2)], 3))  # both slots are begun anew
    assert not any(r.error for r in queue.collect().results)
