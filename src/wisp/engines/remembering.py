"""Earlier answers before the drafter: where a customer's texts repeat each other, they predict better than a model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from wisp.core.draft.signals import Signal
from wisp.core.history import LONGEST, Histories, History
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import DraftEngine, Proposal
from wisp.engines.both import SURE


class Remembering:
    """DraftEngine that proposes what followed in an earlier answer of the same salt, where that is sure, and asks
    another engine otherwise. If that one has nothing to propose, an unsure token will do.

    most: tokens kept, of all texts. The salt is a session's name up to the last "/".
    """

    def __init__(self, engine: DraftEngine, most: int) -> None:
        self.engine = engine
        self.name = engine.name
        self._histories = Histories[str](most)
        self._texts = 0
        self._dropped: set[str] = set()

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        """See DraftEngine.propose. The first token is the engine's, which reads the prompt for it."""
        history = self._histories.of(_salt(session)) if position else None
        known = _proposal(history, context, edit) if history is not None else None
        if known is not None and known.signal.confidence >= SURE:
            return known
        return self.engine.propose(session, context, position, sampling, edit) or known

    def said(self, session: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """The session's text, as it is in the end."""
        salt, text, n = _salt(session), array("I", [*prompt, *answer]), len(prompt)
        if not answer or salt in self._dropped:
            return
        if (history := self._histories.of(salt)) is not None:
            for i, token in enumerate(answer):
                match = history.find(-1, text[max(0, n + i - LONGEST) : n + i], 1)
                if match is not None:
                    history.acceptance.learn(match, (token,))
        self._texts += 1
        self._histories.extend(salt, self._texts, text, 0)

    def clear(self) -> None:
        """Forget all texts: ids mean other words from now on."""
        self._histories = Histories[str](self._histories.most)

    def drop(self, salt: str) -> None:
        """Forget all texts of this salt, and keep no more of them: its last sessions may still be under way."""
        self._dropped.add(salt)
        self._histories.drop((salt,))

    def allow(self, salt: str) -> None:
        """Keep texts of this salt from now on, even if it was dropped."""
        self._dropped.discard(salt)

    def forget(self, session: str) -> None:
        """The session is over."""
        self.engine.forget(session)

    def close(self) -> None:
        """Closes the other engine."""
        self.engine.close()


def _salt(session: str) -> str:
    return session.rpartition("/")[0]


def _proposal(history: History, context: Sequence[int], edit: Edit | None) -> Proposal | None:
    match = history.find(-1, array("I", context[-LONGEST:]), 1)
    if match is None or (edit is not None and not edit.allows(match.tokens[0])):
        return None
    return Proposal(match.tokens[0], Signal(confidence=history.acceptance.of(match.length), counted=True))
