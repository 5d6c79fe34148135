"""Fair shares of places (open sessions) between API keys, once all places are taken.

One key may have all places while no other wants any. A key with more places gives one to a key that has at least two
fewer, so in the end keys have equally many, or as many as they want. Silent sessions go first: those without an edge,
or with an edge that has not answered for a while. No token is lost: the edge opens the session again with what is
committed.
"""

from __future__ import annotations

from collections.abc import Collection

from wisp.core.verify.admission import Admission
from wisp.core.verify.events import Limits
from wisp.core.verify.session import Session
from wisp.core.verify.states import PARKED, WAITING


def is_silent(session: Session, since: float) -> bool:
    """Is the edge lost, or has the session waited for it since `since` or longer?"""
    return session.state is PARKED or (session.state is WAITING and session.since <= since)


def keeps_place(now: float, session: Session, limits: Limits) -> bool:
    """Does the session keep its place even if a new one of its own key wants it?

    An edge that has been silent for `park_s` counts as lost.
    """
    return session.has_place and not is_silent(session, now - limits.park_s)


def gives_way(
    now: float, key: str, sessions: Collection[Session], admission: Admission, limits: Limits
) -> Session | None:
    """The session that gives its place to a new one of `key`; None if there is none."""
    rich = admission.richer(key)
    if rich is None:
        idle = (s for s in sessions if s.has_place and not keeps_place(now, s, limits))
        return min(idle, key=lambda s: (s.key != key, s.since, s.handle), default=None)

    def claim(s: Session) -> tuple[bool, float]:
        """Least for the longest silence, most for the oldest active session."""
        silent = is_silent(s, now - limits.idle_s)
        return not silent, s.since if silent else -s.targets.opened

    own = (s for s in sessions if s.has_place and s.key == rich)
    return min(own, key=lambda s: (*claim(s), -s.handle), default=None)
