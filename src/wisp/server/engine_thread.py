"""The engine's own threads: steps go in, results come back to the event loop, which never blocks.

One thread collects what steps gave; an engine that runs one at a time runs them there. An engine that has a thread of
its own anyway (vLLM) collects in that one, so that no step changes threads twice. With several steps in flight another
thread submits them, since the engine's host then works on one step while the device runs the one before; it is that
thread then that an engine may have of its own.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

import msgspec

from wisp.core.errors import EngineDeadError, StepLostError
from wisp.core.verify.events import Run, StepDone
from wisp.engines.base import OwnThread, TargetEngine

log = logging.getLogger("wisp.engine")

STOP_LOOK_S = 0.5  # between two looks whether an engine hangs that is to end


class EngineThread:
    """Runs up to `depth` steps at a time. `done` is called on the loop with what became of each, in their order.

    dead: why the engine will not run again, once that is so
    """

    def __init__(
        self,
        engine: TargetEngine,
        loop: asyncio.AbstractEventLoop,
        done: Callable[[StepDone], None],
        *,
        depth: int = 1,
    ) -> None:
        self.engine = engine
        self._loop = loop
        self._done = done
        self._queue = engine.queue(depth)
        self.dead: EngineDeadError | None = None
        # With host_ms, and why the engine did not take it.
        self._in_flight: queue.SimpleQueue[tuple[Run, float, Exception | None] | None] = queue.SimpleQueue()
        self._planned: queue.SimpleQueue[tuple[Run, float] | None] | None = None  # with the time of planning
        if depth > 1:
            self._planned = queue.SimpleQueue()
            self._waits = [  # for the ends of the threads
                _started(self._queue, self._submit, "engine-host"),
                _started(None, self._collect, "engine"),
            ]
        else:
            self._waits = [_started(engine, self._collect, "engine")]

    def submit(self, step: Run, planned: float) -> None:
        """Start a step, which was planned at `planned` by the loop's clock. At most `depth` are under way at a time."""
        if self._planned is not None:
            self._planned.put((step, planned))
        else:
            self._queue.submit(step)
            self._in_flight.put((step, 0.0, None))

    def stop(self, hung: Callable[[], bool] = lambda: False) -> None:
        """Finish the steps in progress, end the threads and close the engine. Blocks.

        An engine that is `hung`, or is found to be, is left alone: it ends with the process.
        """
        (self._in_flight if self._planned is None else self._planned).put(None)
        closed: Future[None] = Future()
        threading.Thread(target=self._close, args=(closed,), name="engine-end", daemon=True).start()
        while not hung():
            if wait((closed,), STOP_LOOK_S).done:
                closed.result()
                return

    def _close(self, closed: Future[None]) -> None:
        try:
            for ended in self._waits:
                ended()
            self.engine.close()
            closed.set_result(None)
        except BaseException as error:
            closed.set_exception(error)

    def _submit(self) -> None:
        assert self._planned is not None
        while (item := self._planned.get()) is not None:
            step, planned = item
            failure: Exception | None = None
            try:
                self._queue.submit(step)
            except Exception as error:  # a fault of the engine's queue; this thread has to go on
                failure = error
            self._in_flight.put((step, (self._loop.time() - planned) * 1e3, failure))
        self._in_flight.put(None)

    def _collect(self) -> None:
        while (item := self._in_flight.get()) is not None:
            done = self._collected(*item)
            try:
                self._loop.call_soon_threadsafe(self._done, done)
            except RuntimeError:  # the loop has closed: nobody waits for this
                return

    def _collected(self, step: Run, host_ms: float, failure: Exception | None) -> StepDone:
        started = time.perf_counter()
        try:
            if failure is not None:
                raise failure
            return msgspec.structs.replace(self._queue.collect(), host_ms=host_ms)
        except Exception as error:  # whatever it is, sessions must hear of it and the server go on
            if isinstance(error, StepLostError):
                log.warning("a step of %d slices is lost: %s", len(step.slices), error)
            else:
                log.exception("a step of %d slices failed", len(step.slices))
            if isinstance(error, EngineDeadError):
                self.dead = error
            took_ms = (time.perf_counter() - started) * 1e3
            return StepDone([], took_ms, error=str(error) or repr(error), step=step.step)


def _started(owner: object, main: Callable[[], None], name: str) -> Callable[[], None]:
    """Runs `main` in the thread of its `owner`, or in a new one. Returns a function that waits for its end."""
    if isinstance(owner, OwnThread):
        return owner.occupy(main)
    thread = threading.Thread(target=main, name=name, daemon=True)
    thread.start()
    return thread.join
