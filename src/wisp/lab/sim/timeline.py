"""SimPy's environment with less between two events: what happens after a delay is a function, not a process.

A run is hundreds of thousands of events, most of them a draft step of a few microseconds' work here, so what an event
itself costs matters. Order is SimPy's: by time, and as they were scheduled where times are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop
from typing import Any

import simpy


class Later:
    """As much of an event as an environment asks for."""

    __slots__ = ("callbacks",)
    _ok = True

    def __init__(self, do: Callable[[Any], None]) -> None:
        self.callbacks: list[Callable[[Any], None]] | None = [do]


class Timeline(simpy.Environment):
    """Time of a fleet."""

    now: float = 0.0  # an attribute, where SimPy has a property: it is read several times an event

    def after(self, delay: float, do: Callable[[Any], None]) -> Later:
        """Call `do` with the event, which is returned, once so many seconds have passed."""
        event = Later(do)
        self.schedule(event, delay=delay)  # type: ignore[arg-type]
        return event

    def run(self, until: Any = None) -> None:
        """Let what is due before `until` (seconds) happen. An exception comes out, with time where it was raised."""
        queue = self._queue
        while queue and queue[0][0] < until:
            at, _, _, event = heappop(queue)
            self.now = self._now = at
            callbacks, event.callbacks = event.callbacks, None  # type: ignore[assignment]
            for callback in callbacks:
                callback(event)
        self.now = self._now = until
