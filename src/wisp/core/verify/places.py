"""Who gives up a place when all are taken: fair shares of places, as there are of tokens.

A key may have all places while nobody else wants them. Then the key that has most of them gives one up to a key that
has fewer by more than one, so that in the end all have the same or have what they want. Of its sessions one that is
silent goes first: whose edge is gone, or has had its turn and not used it. Nothing is lost with a place, since the
edge owns the truth: it opens the session again from what is committed.
"""

from __future__ import annotations

from collections.abc import Collection

from wisp.core.verify.admission import Admission
from wisp.core.verify.events import Limits
from wisp.core.verify.session import PARKED, WAITING, Session


def is_silent(session: Session, since: float) -> bool:
    """Is its edge gone, or has it been waited for since then or longer?"""
    return session.state is PARKED or (session.state is WAITING and session.since <= since)


def keeps_place(now: float, session: Session, limits: Limits) -> bool:
    """Does it keep its place even if others of its own key want one? An edge that has been silent for as long as a
    lost one is waited for is as good as lost."""
    return session.has_place and not is_silent(session, now - limits.park_s)


def gives_way(
    now: float, key: str, sessions: Collection[Session], admission: Admission, limits: Limits
) -> Session | None:
    """The session that gives its place to a new one of `key`; None if the new one has to wait."""
    rich = admission.richer(key)
    if rich is None:
        idle = (s for s in sessions if s.has_place and not keeps_place(now, s, limits))
        return min(idle, key=lambda s: (s.key != key, s.since, s.handle), default=None)

    def claim(s: Session) -> tuple[bool, float]:
        """Least: silent for longest. Most: at work for longest."""
        silent = is_silent(s, now - limits.idle_s)
        return not silent, s.since if silent else -s.targets.opened

    own = (s for s in sessions if s.has_place and s.key == rich)
    return min(own, key=lambda s: (*claim(s), -s.handle), default=None)
