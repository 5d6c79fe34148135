"""SimPy's environment with less between two events: what happens after a delay is a function, not a process.

A run is hundreds of thousands of events, most of them a draft step of a few microseconds' work here, so what an event
itself costs matters. Order is SimPy's: by time, and as they were scheduled where times are equal. SimPy's own events
work as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy
from simpy import Event


class Timeline(simpy.Environment):
    """Time of a fleet."""

    __slots__ = ("now",)  # SimPy has a property, and this is read several times an event
    now: float

    def __init__(self, initial_time: float = 0.0) -> None:
        super().__init__(initial_time)
        self.now = initial_time

    def after(self, delay: float, do: Callable[[int], None]) -> int:
        """Have something done once so many seconds have passed. Returns its number, which `do` is given."""
        number = next(self._eid)
        heappush(self._queue, (self.now + delay, 1, number, do))  # type: ignore[misc]
        return number

    def run(self, until: Any = None) -> None:
        """Let what is due before `until` (seconds) happen. An exception comes out, with time where it was raised."""
        queue: list[Any] = self._queue
        while queue and queue[0][0] < until:
            at, _, number, event = heappop(queue)
            self.now = self._now = at
            if isinstance(event, Event):
                _happen(event)
            else:
                event(number)
        self.now = self._now = until


def _happen(event: Any) -> None:
    """What SimPy does with an event of its own."""
    callbacks, event.callbacks = event.callbacks, None
    for callback in callbacks:
        callback(event)
    if not event._ok and not hasattr(event, "_defused"):
        raise event._value
