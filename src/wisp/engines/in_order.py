"""Steps in flight on engines: the tokens that a step takes from the step before it, and a queue for engines that run
one step at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from wisp.core.errors import StepLostError
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.events import Run, StepDone

LOST = "a step before this one failed, and all KV with it"
GONE = "the slice before this one failed, and the KV of its slot with it"


class Runs(Protocol):
    """What runs a step: see `engines.base.TargetEngine`."""

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]: ...

    def copy(self, copy: Copy) -> None: ...


class InOrder:
    """Runs steps one after another.

    It fills in tokens that an earlier step has chosen (`Slice.after`). A slice that builds on one that failed, in its
    own slot or in the one that was copied, fails as well, and does not disturb the others.
    """

    def __init__(self, engine: Runs) -> None:
        self._engine = engine
        self._epoch = 0
        self._chosen: dict[int, tuple[int, int]] = {}  # slot -> (step, the last token that it chose)
        self._broken: set[int] = set()  # slots whose last slice failed

    def run(self, run: Run) -> list[SliceResult]:
        """Results in the order of the slices. Raises EngineError if the step failed; StepLostError if one before it has
        failed since it was planned."""
        if run.epoch < self._epoch:
            raise StepLostError(LOST)
        try:
            return self._run(run)
        except Exception:
            self._epoch = run.epoch + 1
            self._chosen.clear()
            self._broken.clear()
            raise

    def _run(self, run: Run) -> list[SliceResult]:
        broken = self._broken
        for copy in run.copies:
            if copy.source in broken and copy.tokens:
                broken.add(copy.target)
            else:
                self._engine.copy(copy)
                broken.discard(copy.target)
        known = [self._filled(s) for s in run.slices]
        batch = [s for s in known if s is not None]
        found = iter(self._engine.run(batch) if batch else ())
        results = []
        for s, able in zip(run.slices, known, strict=True):
            result = next(found) if able is not None else SliceResult(s.session, error=GONE)
            if result.error:
                broken.add(s.slot)
            elif result.tokens:
                self._chosen[s.slot] = (run.step, result.tokens[-1])
            results.append(result)
        return results

    def _filled(self, s: Slice) -> Slice | None:
        """The slice with all its tokens; None if what it builds on has failed."""
        if s.slot in self._broken:
            if s.start:
                return None
            self._broken.discard(s.slot)
        if s.after < 0:
            return s
        step, token = self._chosen.get(s.slot, (-1, 0))
        if step != s.after:
            return None
        return msgspec.structs.replace(s, tokens=[token, *s.tokens[1:]], after=-1)


class OneAtATime:
    """StepQueue of an engine that runs one step at a time: the others wait here, and run when they are collected."""

    def __init__(self, engine: Runs, depth: int = 1, now: Callable[[], float] = time.perf_counter) -> None:
        self.depth = depth
        self._in_order = InOrder(engine)
        self._runs: deque[Run] = deque()
        self._now = now

    def submit(self, run: Run) -> None:
        self._runs.append(run)

    def collect(self) -> StepDone:
        run, started = self._runs.popleft(), self._now()
        results = self._in_order.run(run)
        return StepDone(results, (self._now() - started) * 1e3, step=run.step)
