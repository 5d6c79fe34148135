"""The engine's own thread: steps go in, results come back to the event loop, which never blocks.

An engine that has a thread of its own anyway (vLLM) runs its steps there, so that none changes threads twice.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable

from wisp.core.errors import EngineDeadError
from wisp.core.verify.events import Run, StepDone
from wisp.engines.base import OwnThread, TargetEngine

log = logging.getLogger("wisp.engine")


class EngineThread:
    """Runs one step at a time. `done` is called on the loop with what became of it.

    dead: why the engine will not run again, once that is so
    """

    def __init__(
        self, engine: TargetEngine, loop: asyncio.AbstractEventLoop, done: Callable[[StepDone], None]
    ) -> None:
        self.engine = engine
        self._loop = loop
        self._done = done
        self.dead: EngineDeadError | None = None
        self._steps: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._wait = _started(engine, self._main)

    def submit(self, step: Run) -> None:
        """Start a step. The caller waits for its `done` before the next."""
        self._steps.put(step)

    def stop(self, *, hung: bool = False) -> None:
        """Finish the step in progress, end the thread and close the engine. One that is `hung` is left alone: it ends
        with the process."""
        self._steps.put(None)
        if hung:
            return
        self._wait()
        self.engine.close()

    def _main(self) -> None:
        while (step := self._steps.get()) is not None:
            done = self._run(step)
            try:
                self._loop.call_soon_threadsafe(self._done, done)
            except RuntimeError:  # the loop has closed: nobody waits for this
                return

    def _run(self, step: Run) -> StepDone:
        started = time.perf_counter()
        try:
            for copy in step.copies:
                self.engine.copy(copy)
            results = self.engine.run(step.slices)
        except Exception as error:  # whatever it is, sessions must hear of it and the server go on
            log.exception("a step of %d slices failed", len(step.slices))
            if isinstance(error, EngineDeadError):
                self.dead = error
            return StepDone([], (time.perf_counter() - started) * 1e3, error=str(error) or repr(error))
        return StepDone(results, (time.perf_counter() - started) * 1e3)


def _started(engine: TargetEngine, main: Callable[[], None]) -> Callable[[], None]:
    """Runs `main` in the engine's thread, or in a new one. Returns a function that waits for its end."""
    if isinstance(engine, OwnThread):
        return engine.occupy(main)
    thread = threading.Thread(target=main, name="engine", daemon=True)
    thread.start()
    return thread.join
