"""Drafting within constraints: impossible tokens are not proposed, and certain tokens need no model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from wisp.core.draft.signals import Signal
from wisp.core.errors import GrammarError
from wisp.core.protocol.edits import Edit, Matchers, Tracker
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import DraftEngine, Proposal

log = logging.getLogger("wisp.draft")

MOST_CERTAIN = 16  # tokens proposed at once because nothing else is allowed


class ConstrainedDraft:
    """DraftEngine that keeps another one's proposals within the constraints of each session.

    Where only one id is allowed that is proposed, and the engine below is not asked; so are those that follow for
    certain (`Proposal.then`). `matchers`: of the target's vocabulary; None: drafts are made without grammars, and are
    rejected more often. Sessions without constraints go straight to the engine.
    """

    def __init__(self, engine: DraftEngine) -> None:
        self.engine = engine
        self.name = engine.name
        self.matchers: Matchers | None = None
        self.forced = 0  # tokens proposed without the engine
        self._trackers: dict[str, Tracker] = {}

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        """See DraftEngine.propose."""
        constraints = sampling.constraints
        if constraints is None or not constraints.choosing:
            return self.engine.propose(session, context, position, sampling)
        edit = self._edit(session, context, position, sampling)
        certain = edit.forced()
        if certain is None:
            proposal = self.engine.propose(session, context, position, sampling, edit)
        else:
            self.forced += 1
            proposal = Proposal(certain, Signal(confidence=1.0, certain=True))
        if proposal is None:
            return None
        return msgspec.structs.replace(
            proposal, then=self._then(session, [*context, proposal.token], position + 1, sampling)
        )

    def forget(self, session: str) -> None:
        """The session is over."""
        self._trackers.pop(session, None)
        self.engine.forget(session)

    def close(self) -> None:
        """Closes the engine below."""
        self._trackers.clear()
        self.engine.close()

    def _then(self, session: str, context: list[int], position: int, sampling: Sampling) -> tuple[int, ...]:
        """What follows for certain."""
        n = len(context)
        while len(context) - n < MOST_CERTAIN:
            token = self._edit(session, context, position + len(context) - n, sampling).forced()
            if token is None or context[-2:] == [token, token]:  # ends, again and again
                break
            context.append(token)
        self.forced += len(context) - n
        return tuple(context[n:])

    def _edit(self, session: str, context: Sequence[int], position: int, sampling: Sampling) -> Edit:
        tracker = self._trackers.get(session)
        try:
            if tracker is None:
                tracker = self._trackers[session] = Tracker(sampling, self.matchers)
            return next(tracker.edits(context, position, ()))
        except GrammarError as error:
            log.warning("this answer is drafted without its grammar: %s", error)
            tracker = self._trackers[session] = Tracker(sampling, None)
            return next(tracker.edits(context, position, ()))
