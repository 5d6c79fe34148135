"""The time that an edge waits for a lost verifier. Time asleep does not count, and a device that wakes tries once more.

When a closed laptop, a paused container or a stopped process wakes, all deadlines have passed in its sleep. No event
reports the sleep. It shows in a beat that comes far too late.
"""

from __future__ import annotations

GIVE_UP_S = 30.0  # without a verifier, where nobody says otherwise
BEAT_S = 1.0  # between two beats
_SLEPT_S = 3 * BEAT_S  # without a beat: not even a busy machine is as late as that
_LEAST_S = 1e-3  # of a wait: event loops round to milliseconds, and a shorter one would end at once for ever


class Patience:
    """The patience of one connection to a verifier, from the time when it was `lost` or first sought.

    The host calls `beat` every BEAT_S, and `began` and `failed` around each attempt to connect. Times are seconds of
    one monotonic clock, which may go on while the process does not.
    """

    def __init__(self, give_up_s: float, now: float) -> None:
        self.give_up_s = give_up_s
        self._seen = now
        self._asleep = 0.0  # seconds in all
        self._sleeps = 0
        self._tried = 0  # sleeps before the last attempt that failed
        self._lost = now

    def beat(self, now: float) -> float:
        """Time awake: `now` without the time asleep. All times here are kept and compared in it."""
        gap = now - self._seen
        if gap > 0.0:
            self._seen = now
        if gap > _SLEPT_S:
            self._asleep += gap
            self._sleeps += 1
        return now - self._asleep

    def lost(self, now: float) -> None:
        """The verifier was there until now."""
        self._lost = self.beat(now)
        self._tried = self._sleeps

    def began(self, now: float) -> int:
        """An attempt begins. Returns its mark, for `failed`."""
        self.beat(now)
        return self._sleeps

    def failed(self, attempt: int) -> None:
        """The attempt with this mark has failed."""
        self._tried = max(self._tried, attempt)

    def left_s(self, now: float, since: float = 0.0) -> float:
        """Seconds to wait before asking again; 0: it is time to give up.

        `since`: time awake, as `beat` returns it, before which nothing counts.
        """
        left = max(self._lost, since) + self.give_up_s - self.beat(now)
        if left >= _LEAST_S:
            return left
        return 0.0 if self._tried >= self._sleeps else BEAT_S
