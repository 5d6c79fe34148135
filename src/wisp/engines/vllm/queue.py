"""Steps of vLLM in flight: one is launched while the one before it runs.

    submit    the host's part: slices become a batch, blocks are taken, and the workers are told. A GPU works later,
              and no launch waits for it
    collect   waits for an event behind the copy of the step's answers, and says what they mean for slots

So nothing that a step needs may depend on answers that were not collected. A token that the step before chooses
(`Slice.after`) goes from one to the other on the device (`worker.Hooks`). What else follows from answers is rolled
back when they are collected: rejected drafts, and slices that build on one that failed.

On a CPU vLLM computes in the thread that launches. So that thread is left to it there, and another prepares steps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from wisp.core.errors import EngineDeadError, EngineError, StepLostError
from wisp.core.protocol.step import SliceResult
from wisp.core.verify.events import Run, StepDone
from wisp.engines.base import OwnThread
from wisp.engines.in_order import GONE, LOST
from wisp.engines.vllm.slots import Slots
from wisp.engines.vllm.stepping import Flight, Steps

DEAD = "a worker process of vLLM has died; start the verifier again"


def failure(error: Exception) -> EngineError:
    """What to say of an error of vLLM's."""
    return EngineError(f"vLLM failed: {str(error).strip() or repr(error)}")


class _Step:
    """A step that was submitted.

    able:   which of its slices could be launched; flight: of those
    error:  what went wrong
    at:     when all of it was launched, seconds
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.able: list[bool] = []
        self.flight: Flight | None = None
        self.error: Exception | None = None
        self.at = 0.0


class VllmQueue:
    """StepQueue of a `VllmTarget`. `dead`: has a worker ended? `own`: whose thread launches best, None: any other."""

    def __init__(
        self, steps: Steps, slots: Slots, depth: int, dead: Callable[[], bool], own: OwnThread | None
    ) -> None:
        self.depth = depth
        self._steps, self._slots, self._dead, self._own = steps, slots, dead, own
        self._lock = threading.Lock()  # of slots and of vLLM's blocks
        self._submitted: deque[_Step] = deque()
        self._epoch = 0
        self._ended = 0.0  # when the last step was back

    def occupy(self, main: Callable[[], None]) -> Callable[[], None]:
        """Run `main`, which submits, in the thread where that disturbs least. Returns a function that waits for its
        end."""
        if self._own is not None:
            return self._own.occupy(main)
        thread = threading.Thread(target=main, name="vllm-host", daemon=True)
        thread.start()
        return thread.join

    def submit(self, run: Run) -> None:
        """See StepQueue."""
        step = _Step(run)
        try:
            with self._lock:
                if run.epoch >= self._epoch:
                    self._launch(step)
        except Exception as error:
            step.error = error
        step.at = time.perf_counter()
        self._submitted.append(step)

    def collect(self) -> StepDone:
        """See StepQueue."""
        step = self._submitted.popleft()
        error = step.error
        if error is None and step.flight is not None:
            try:
                step.flight.wait()
            except Exception as reason:
                error = reason
        now = time.perf_counter()
        engine_ms, self._ended = (now - max(step.at, self._ended)) * 1e3, now
        with self._lock:
            if step.run.epoch < self._epoch:
                raise StepLostError(LOST)
            if error is not None:
                raise self._failed(step.run, error) from error
            return StepDone(self._results(step), engine_ms, step=step.run.step)

    def _launch(self, step: _Step) -> None:
        run, slots = step.run, self._slots
        for copy in run.copies:
            if copy.tokens and slots.is_broken(copy.source):
                slots.all[copy.target].broken = True
            else:
                slots.copy(copy)
        step.able = [s.start == 0 or not slots.is_broken(s.slot) for s in run.slices]
        some = [s for s, able in zip(run.slices, step.able, strict=True) if able]
        step.flight = self._steps.launch(some, step=run.step, keep=True)

    def _results(self, step: _Step) -> list[SliceResult]:
        assert step.flight is not None
        self._steps.take(step.flight)
        tasks = iter(step.flight.tasks)
        return [
            next(tasks).result() if able else SliceResult(s.session, error=GONE)
            for s, able in zip(step.run.slices, step.able, strict=True)
        ]

    def _failed(self, run: Run, error: Exception) -> EngineError:
        """What to raise where a step failed as a whole."""
        self._epoch = run.epoch + 1
        if self._dead():
            return EngineDeadError(DEAD)
        self._slots.clear()
        return error if isinstance(error, EngineError) else failure(error)
