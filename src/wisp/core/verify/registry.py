"""The sessions of a verifier by name and by connection: how they take a draft, lose their edge, and end."""

from __future__ import annotations

from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Draft, Verdict
from wisp.core.verify.admission import Admission
from wisp.core.verify.events import Action, Ended, Limits
from wisp.core.verify.index import SessionIndex
from wisp.core.verify.kv import KvPool
from wisp.core.verify.rounds import Pending
from wisp.core.verify.session import Session
from wisp.core.verify.slo_admission import SloAdmission
from wisp.core.verify.states import CANCEL, DOOMED, DRAFT, ENDED, IN_ENGINE, LOST, READY, VERDICT


class Registry:
    """Knows each session from its Open to its end. `index` holds those of them, too, that have lost their name."""

    def __init__(
        self,
        limits: Limits,
        index: SessionIndex,
        kv: KvPool,
        admission: Admission,
        slo_admission: SloAdmission,
    ) -> None:
        self.limits = limits
        self.index = index
        self.kv = kv
        self.admission = admission
        self.slo_admission = slo_admission
        self.by_id: dict[str, Session] = {}
        self.by_connection: dict[int, set[int]] = {}  # handles

    def take(self, now: float, session: Session, draft: Draft) -> Verdict | None:
        """Have a draft verified, or answer it at once."""
        if session.state in IN_ENGINE:  # resumed while its step runs
            session.round.inbox = [draft]
            return None
        taken = session.intake(draft, now)
        if isinstance(taken, Pending):
            session.round.pending, answer = taken, None
        else:
            session.round.pending, answer = None, taken
        ready = session.state is READY
        if answer is None or session.round.serve:
            if not ready:
                session.since = now
            session.go(DRAFT)
        elif ready:
            session.go(VERDICT)
        self.index.put(session)
        return answer

    def stop(self, session: Session) -> None:
        """End a session: at once, or with its last step in flight. Its id and its place are free at once."""
        if session.go(CANCEL) is ENDED:
            self.end(session)
        else:
            self._free(session)

    def _free(self, session: Session) -> None:
        if session.has_place:
            session.has_place = False
            del self.by_id[session.id]
            self.admission.closed(session.key)

    def owned(self, connection: int, session_id: str) -> Session:
        session = self.by_id.get(session_id)
        if session is None or session.connection != connection:
            raise ProtocolError(
                "unknown_session", "no such session here; open it again with what is committed"
            )
        return session

    def park(self, now: float, session: Session) -> None:
        if session.state is not DOOMED:
            session.go(LOST)
        session.connection = -1
        session.since = now
        session.round.pending = None
        session.round.inbox = []
        session.round.serve = False
        self.index.put(session)

    def expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self.index.parked:
            session = next(iter(self.index.parked.values()))
            if session.since + self.limits.park_s > now:
                break
            self.stop(session)
            actions.append(Ended(session.id, "expired"))
        return actions

    def end(self, session: Session) -> None:
        """Forget a session. Its KV stays in the slot for a follow-up turn, until the slot is needed."""
        if session.slot is not None:
            self.kv.release(session.slot, keep=True)
        self.index.remove(session)
        self.by_connection.get(session.connection, set()).discard(session.handle)
        self._free(session)
        self.slo_admission.left(session)
