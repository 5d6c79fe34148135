"""SimPy's environment with less between two events: what happens after a delay is a function, not a process.

A run is hundreds of thousands of events, most of them a draft step of a few microseconds' work here, so what an event
itself costs matters. What is due at the same time is one entry in SimPy's queue: the answers of a step reach all
devices that are equally far away together, and they draft on in step. Order is SimPy's: by time, and as scheduled
where times are equal. SimPy's own events work as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy
from simpy import Event
from simpy.events import NORMAL, EventPriority


class Timeline(simpy.Environment):
    """Time of a fleet."""

    __slots__ = ("_moments", "now")  # SimPy has a property, and this is read several times an event
    now: float

    def __init__(self, initial_time: float = 0.0) -> None:
        super().__init__(initial_time)
        self.now = initial_time
        self._moments: dict[float, list[Callable[[], None]]] = {}  # what is to be done, by time

    def after(self, delay: float, do: Callable[[], None]) -> None:
        """Have something done once so many seconds have passed."""
        at, moments = self.now + delay, self._moments
        if at in moments:
            moments[at].append(do)
        else:
            moments[at] = moment = [do]
            heappush(self._queue, (at, NORMAL, next(self._eid), moment))  # type: ignore[misc]

    def schedule(self, event: Event, priority: EventPriority = NORMAL, delay: float = 0.0) -> None:
        """An event of SimPy's own. What is scheduled later for the same time comes behind it."""
        self._moments.pop(self.now + delay, None)
        super().schedule(event, priority, delay)

    def run(self, until: Any = None) -> None:
        """Let what is due before `until` (seconds) happen. An exception comes out, with time where it was raised."""
        queue: list[Any] = self._queue
        moments = self._moments
        while queue and queue[0][0] < until:
            at, _, _, due = heappop(queue)
            self.now = self._now = at
            if isinstance(due, list):
                try:
                    for do in due:  # which may add to it
                        do()
                finally:
                    if moments.get(at) is due:
                        del moments[at]
            else:
                _happen(due)
        self.now = self._now = until


def _happen(event: Any) -> None:
    """What SimPy does with an event of its own."""
    callbacks, event.callbacks = event.callbacks, None
    for callback in callbacks:
        callback(event)
    if not event._ok and not hasattr(event, "_defused"):
        raise event._value
