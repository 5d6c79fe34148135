"""Two watchdogs: of a step that does not end, and of an event loop that does not turn.

Both count looks instead of reading a clock: a process that was stopped, or whose machine slept, has not waited
meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable

from wisp.core.verify.cost import CostModel, load_of
from wisp.core.verify.events import Run

log = logging.getLogger("wisp.host")

LOOK_S = 5.0  # between two looks at a step
LEAST_S = 60.0  # no step is given up sooner, whatever the cost model thinks
TOKEN_S = 0.25  # more for each token fed: the slowest machine that is of any use reads four a second
TIMES = 20.0  # or so many times the predicted time
FIRST_S = 600.0  # more for the first step, which may compile
LOOP_S = 60.0  # an event loop that has not turned for so long serves nobody
EXIT_HUNG = 70  # exit status, of sysexits' "internal software error"


def patience_s(step: Run, cost: CostModel) -> float:
    """Seconds that a step may take: far more than any that ends."""
    load = load_of(step.slices)
    compiling = 0.0 if cost.steps else FIRST_S
    return compiling + max(LEAST_S + TOKEN_S * load.new, TIMES * cost.ms(load) / 1e3)


class StepWatch:
    """Looks at the step in the engine every moment, on the event loop. `hung` is called with how long one has taken
    that does not end."""

    def __init__(
        self,
        running: Callable[[], Run | None],
        patience: Callable[[Run], float],
        hung: Callable[[float], None],
    ) -> None:
        self._running = running
        self._patience = patience
        self._hung = hung
        self._step: Run | None = None
        self._waited_s = 0.0

    def look(self, every_s: float = LOOK_S) -> None:
        """`every_s` seconds have passed since the last look, as far as this process was awake."""
        step = self._running()
        if step is None or step is not self._step:
            self._step, self._waited_s = step, 0.0
            return
        self._waited_s += every_s
        if self._waited_s >= self._patience(step):
            self._hung(self._waited_s)


class LoopWatch:
    """A thread that ends the process once its event loop has stood still: nobody else could say so."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        abort: Callable[[], None] | None = None,
        *,
        every_s: float = 1.0,
        limit_s: float = LOOP_S,
    ) -> None:
        self._loop = loop
        self._abort = abort or _abort
        self._every_s = every_s
        self._limit_s = limit_s
        self._turned = True
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _main(self) -> None:
        waited_s = 0.0
        while not self._over.wait(self._every_s):
            waited_s = 0.0 if self._turned else waited_s + self._every_s
            if waited_s >= self._limit_s:
                self._abort()
                return
            if self._turned:
                self._turned = False
                with contextlib.suppress(RuntimeError):  # it has closed
                    self._loop.call_soon_threadsafe(self._turn)

    def _turn(self) -> None:
        self._turned = True


def _abort() -> None:
    """Say where every thread is, and end. Saying so may block, too: it may be what the event loop waits for."""
    say = threading.Thread(target=faulthandler.dump_traceback, args=(sys.__stderr__,), daemon=True)
    say.start()
    say.join(5.0)
    os._exit(EXIT_HUNG)
