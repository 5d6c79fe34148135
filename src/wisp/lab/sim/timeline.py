"""SimPy's environment with less between two events: what happens after a delay is a function, not a process.

A run is hundreds of thousands of events, most of them a draft step of a few microseconds' work here, so what an event
itself costs matters. Order is SimPy's: by time, and as they were scheduled where times are equal. SimPy's own events
work as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import msgspec
import simpy


class Later(msgspec.Struct):
    """Something to do, in the place of an event. `do` is given this."""

    do: Callable[[Any], None]


class Timeline(simpy.Environment):
    """Time of a fleet."""

    now: float = 0.0  # an attribute, where SimPy has a property: it is read several times an event

    def after(self, delay: float, do: Callable[[Any], None]) -> Later:
        """Have something done once so many seconds have passed."""
        later = Later(do)
        heappush(self._queue, (self.now + delay, 1, next(self._eid), later))  # type: ignore[misc]
        return later

    def run(self, until: Any = None) -> None:
        """Let what is due before `until` (seconds) happen. An exception comes out, with time where it was raised."""
        queue: list[Any] = self._queue
        while queue and queue[0][0] < until:
            at, _, _, event = heappop(queue)
            self.now = self._now = at
            if type(event) is Later:
                event.do(event)
                continue
            callbacks, event.callbacks = event.callbacks, None
            for callback in callbacks:
                callback(event)
            if not event._ok and not hasattr(event, "_defused"):
                raise event._value
        self.now = self._now = until
