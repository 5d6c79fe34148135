"""The sessions of a verifier by handle, and those of them that wait: for the engine, for a draft, for their edge."""

from __future__ import annotations

from wisp.core.verify.session import Session
from wisp.core.verify.states import PARKED, READY, WAITING


class SessionIndex:
    """All sessions by handle, and buckets of those that wait."""

    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.ready: dict[int, Session] = {}  # for the engine
        self.drafting: dict[int, Session] = {}  # for a draft of their edge; these have KV
        self.parked: dict[int, Session] = {}  # for an edge to come back; oldest first

    def put(self, s: Session) -> None:
        """Move a session to the bucket of its state and forget its candidate. In the same bucket it keeps its place."""
        state, bucket = s.state, None
        if state is READY:
            bucket = self.ready
        elif state is WAITING:
            if s.slot is not None and s.connection >= 0:
                bucket = self.drafting
        elif state is PARKED:
            bucket = self.parked
        s.candidate = None
        before = s.bucket
        if bucket is not before:
            if before is not None:
                del before[s.handle]
            if bucket is not None:
                bucket[s.handle] = s
            s.bucket = bucket

    def remove(self, s: Session) -> None:
        """The session has ended."""
        if s.bucket is not None:
            del s.bucket[s.handle]
            s.bucket = None
        del self.sessions[s.handle]
