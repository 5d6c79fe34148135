"""Processes in virtual time: an asyncio event loop whose clock moves only when nothing is left to do.

All processes of a simulated system share one loop, but each has a life of its own (`Life`): a clock that began at any
time, callbacks that are held while it is frozen, and an end after which none of its callbacks runs. A context variable
says whose callback is running, so the code of the product needs to know nothing of this.

Callbacks run in the order of their times, and of their scheduling where times are equal. Nothing else decides the
order, so the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import secrets
import time
import traceback
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from heapq import heappop, heappush
from typing import Any, cast

TURNS = 50_000  # callbacks at one moment: more are a loop that never ends
RESOLUTION_S = 1e-9  # of clocks: who waits at all waits so long, or the clock might not move

_life: ContextVar[Life] = ContextVar("life")


class Restless(Exception):
    """Callbacks follow each other, and the clock never moves."""


class Life:
    """A process from its start to its end. `offset`: what its clock adds to the time of the simulation, seconds."""

    __slots__ = ("alive", "context", "frozen", "held", "name", "offset", "tasks")

    def __init__(self, name: str, offset: float = 0.0) -> None:
        self.name = name
        self.offset = offset
        self.alive = True
        self.frozen = False
        self.held: list[Handle] = []  # what it would have done meanwhile
        self.tasks: list[asyncio.Task[Any]] = []
        self.context = Context()
        self.context.run(_life.set, self)


_NOBODY = Life("nobody")  # of what outlives the simulation
_NOBODY.alive = False


def present_life() -> Life:
    """Whose code is running."""
    return _life.get()


class Handle:
    """A callback that is due."""

    __slots__ = ("args", "callback", "context", "done", "life", "time")

    def __init__(
        self,
        time_: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context,
        life: Life,
    ) -> None:
        self.time = time_  # by the life's own clock
        self.callback = callback
        self.args = args
        self.context = context
        self.life = life
        self.done = False

    def cancel(self) -> None:
        self.done = True

    def cancelled(self) -> bool:
        return self.done

    def when(self) -> float:
        return self.time


class VirtualLoop:
    """As much of an event loop as the product uses. `now`: seconds since the start of the simulation."""

    def __init__(self, trouble: Callable[[str], None]) -> None:
        """`trouble` is told of exceptions that nobody has caught."""
        self._loop = cast(asyncio.AbstractEventLoop, self)
        self.now = 0.0
        self.turns = 0  # callbacks that have run
        self._trouble = trouble
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._scheduled = 0
        self._moment = 0  # turns when the clock last moved
        self._over = False
        self.lives: list[Life] = []
        self.blocking_s: Callable[[], float] = lambda: 0.0  # what a call in an executor takes

    # --- lives

    def born(self, name: str, offset: float = 0.0) -> Life:
        """A process starts."""
        life = Life(name, offset)
        self.lives.append(life)
        return life

    def die(self, life: Life) -> None:
        """A process is gone. What its tasks would have done is not done, and nothing is cleaned up."""
        life.alive = False
        life.frozen = False
        life.held.clear()

    def freeze(self, life: Life) -> None:
        """It does nothing from now on, though its clock goes on."""
        life.frozen = life.alive

    def thaw(self, life: Life) -> None:
        """It does all that was due meanwhile."""
        life.frozen = False
        self._ready.extend(life.held)
        life.held.clear()

    def run_in(self, life: Life, callback: Callable[..., object], *args: Any, after_s: float = 0.0) -> Handle:
        """Have a process call something, `after_s` seconds from now."""
        handle = Handle(self.now + life.offset + after_s, callback, args, life.context, life)
        if after_s > 0.0:
            self._at(self.now + after_s, handle)
        else:
            self._ready.append(handle)
        return handle

    def spawn(self, life: Life, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of a process."""
        return self.create_task(coroutine, context=life.context.copy())

    # --- running

    def run(self, until: Callable[[], bool]) -> bool:
        """Go on until that is true, which is asked whenever the clock is about to move. False if nothing is left to
        do."""
        events._set_running_loop(self._loop)
        try:
            while True:
                while self._ready:
                    self._turn(self._ready.popleft())
                if until():
                    return True
                while self._timers and self._timers[0][2].done:
                    heappop(self._timers)
                if not self._timers:
                    return False
                time_, _, handle = heappop(self._timers)
                if time_ > self.now:
                    self.now, self._moment = time_, self.turns
                self._turn(handle)
        finally:
            events._set_running_loop(None)

    def _turn(self, handle: Handle) -> None:
        life = handle.life
        if handle.done or not life.alive:
            return
        if life.frozen:
            life.held.append(handle)
            return
        self.turns += 1
        if self.turns - self._moment > TURNS:
            raise Restless(f"{life.name} does not come to rest: {handle.callback!r}")
        try:
            handle.context.run(handle.callback, *handle.args)
        except Exception as error:
            self.call_exception_handler({"message": "a callback failed", "exception": error})

    def _at(self, time_: float, handle: Handle) -> None:
        self._scheduled += 1
        heappush(self._timers, (time_, self._scheduled, handle))

    def close(self) -> None:
        """Let go of everything. Tasks that are not over end here, and nothing that they do then has an effect."""
        self._over = True
        self._ready.clear()
        self._timers.clear()
        events._set_running_loop(self._loop)  # which a `finally` may ask for
        try:
            for life in self.lives:
                life.held.clear()
                for task in life.tasks:
                    if not task.done():
                        task._log_destroy_pending = False  # type: ignore[attr-defined]
                        with contextlib.suppress(Exception, asyncio.CancelledError):
                            life.context.copy().run(task.get_coro().close)
                life.tasks.clear()
            gc.collect()
        finally:
            events._set_running_loop(None)

    # --- what asyncio asks of a loop

    def time(self) -> float:
        life = _life.get(None)
        return self.now + life.offset if life is not None else self.now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        context = context or copy_context()
        life = context.get(_life, _NOBODY)
        handle = Handle(self.now + life.offset, callback, args, context, life)
        if not self._over:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        context = context or copy_context()
        life = context.get(_life, _NOBODY)
        handle = Handle(self.now + life.offset + delay, callback, args, context, life)
        if not self._over:
            self._at(self.now + (max(RESOLUTION_S, delay) if delay > 0.0 else 0.0), handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_later(when - self.time(), callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        context = context or copy_context()
        life = context.get(_life, _NOBODY)
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self._loop, name=name, context=context)
        tasks = life.tasks
        tasks.append(task)
        if len(tasks) > 64 and len(tasks) % 64 == 0:
            life.tasks = [t for t in tasks if not t.done()]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """The call is made at once, by this thread, and its result comes when it would be there."""
        future = self.create_future()
        try:
            result, error = func(*args), None
        except Exception as raised:
            result, error = None, raised

        def tell() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self.blocking_s(), tell)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._over:
            error = context.get("exception")
            where = "".join(traceback.format_tb(error.__traceback__)[-2:]) if error is not None else ""
            self._trouble(f"{context.get('message', 'an exception')}: {error!r}\n{where}")

    default_exception_handler = call_exception_handler

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._over


class NoThread:
    """In place of an executor: calls are made at once."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Nothing is started."""

    def submit(self, func: Callable[..., object], *args: Any) -> None:
        func(*args)

    def shutdown(self, **kwargs: object) -> None:
        """Nothing was started."""


class _Tracebacks(logging.Handler):
    """An exception in the log is one that nobody expected."""

    def __init__(self, trouble: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._trouble = trouble

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None and record.levelno >= logging.ERROR:
            error = record.exc_info[1]
            if not getattr(error, "injected", False):
                where = "".join(traceback.format_tb(error.__traceback__)[-2:])
                self._trouble(f"{record.name} logged {record.getMessage()!r}: {error!r}\n{where}")


@contextmanager
def virtual(loop: VirtualLoop, seed: int, swaps: list[tuple[object, str, object]]) -> Iterator[None]:
    """While this lasts, clocks, chance and the log are the simulation's; so is what `swaps` names: (module, name,
    replacement)."""
    names = random.Random(f"names {seed}")
    state, log = random.getstate(), logging.getLogger("wisp")
    level, propagate, handler = log.level, log.propagate, _Tracebacks(loop._trouble)
    swaps = [
        (time, "monotonic", loop.time),
        (time, "perf_counter", loop.time),
        (time, "time", lambda: 1.8e9 + loop.time()),
        (secrets, "token_hex", lambda n=16: names.randbytes(n).hex()),
        *swaps,
    ]
    former = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    collecting = gc.isenabled()
    gc.collect()  # the run before, or it would stay frozen for as long as there are runs
    gc.disable()  # it would end coroutines of dead processes at a moment of its own
    gc.freeze()
    for module, name, replacement in swaps:
        setattr(module, name, replacement)
    random.seed(seed)
    log.setLevel(logging.ERROR)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
        loop.close()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        random.setstate(state)
        for module, name, before in reversed(former):
            setattr(module, name, before)
        gc.unfreeze()
        if collecting:
            gc.enable()
