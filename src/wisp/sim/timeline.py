"""Virtual time: callbacks by second. Nothing waits for a real clock.

Callbacks run in the order of their times, and of their scheduling where times are equal. Those of one time are one
entry of the heap: the verdicts of a step reach many devices at the same moment, and a heap of single callbacks made
runs of hundreds of devices a quarter slower.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush


class Timeline:
    """A clock that stands still unless it is run. `now` is in seconds."""

    __slots__ = ("_moments", "_times", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._times: list[float] = []  # a heap of the keys of `_moments`
        self._moments: dict[float, deque[Callable[[], None]]] = {}

    def after(self, delay: float, do: Callable[[], None]) -> None:
        """Call `do` once `delay` seconds have passed."""
        at = self.now + delay
        moment = self._moments.get(at)
        if moment is None:
            self._moments[at] = deque((do,))
            heappush(self._times, at)
        else:
            moment.append(do)

    def soon(self, do: Callable[[], None]) -> None:
        """Call `do` at the present time, after all callbacks that are due by now."""
        self.after(0.0, do)

    def at(self, time: float, do: Callable[[], None]) -> Callable[[], None]:
        """Call `do` at `time`, or now if that has passed. Returns a function that cancels the call."""
        cancelled = False

        def cancel() -> None:
            nonlocal cancelled
            cancelled = True

        self.after(max(0.0, time - self.now), lambda: None if cancelled else do())
        return cancel

    @property
    def next(self) -> float:
        """Time of the next callback; infinite if there is none."""
        return self._times[0] if self._times else math.inf

    def step(self) -> bool:
        """Make the next call. False if there is none. An exception comes out; the other callbacks stay."""
        if not self._times:
            return False
        self.now = at = self._times[0]
        moment = self._moments[at]
        do = moment.popleft()
        try:
            do()
        finally:
            if not moment:
                heappop(self._times)
                del self._moments[at]
        return True

    def run(self, until: float) -> None:
        """Make all calls that are due before `until` (seconds)."""
        times, moments = self._times, self._moments
        while times and times[0] < until:
            self.now = at = times[0]
            moment = moments[at]
            try:
                while moment:
                    moment.popleft()()  # which may add to it
            finally:
                if not moment:
                    heappop(times)
                    del moments[at]
        self.now = until
