"""Drafting without a model: the continuation of the last n tokens' most recent occurrence.

The last n tokens of the context (n from 4 down to 2) are looked up among its earlier n-grams; the proposal is the
token that followed the most recent occurrence ("prompt lookup"). It costs microseconds, suits devices too weak for
a model, and does well where text is copied: summaries, edits, code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from wisp.core.draft.signals import Signal
from wisp.core.errors import ConfigError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import Proposal

_LOOK_BACK = 8  # earlier occurrences that have a say in the confidence
_LONGEST_MATCH = 16  # tokens; a longer match says no more

Gram = tuple[int, ...]


class _History:
    """One session's tokens, and where each n-gram that has a token after it ends."""

    def __init__(self, sizes: range) -> None:
        self.tokens: list[int] = []
        self._sizes = sizes
        # Ascending indices of the token after each n-gram
        self._ends: dict[Gram, list[int]] = defaultdict(list)

    def sync(self, context: Sequence[int]) -> None:
        """Make `context` the history, at the cost of what changed since the last call."""
        tokens = self.tokens
        context = context if isinstance(context, list) else list(context)
        keep = min(len(tokens), len(context))
        if tokens[:keep] != context[:keep]:
            keep = next(i for i, (a, b) in enumerate(zip(tokens, context, strict=False)) if a != b)
        while len(tokens) > keep:
            end = len(tokens) - 1
            for gram in self._grams_before(end):
                ends = self._ends[gram]
                ends.pop()
                if not ends:
                    del self._ends[gram]
            tokens.pop()
        for token in context[keep:]:
            tokens.append(token)
            for gram in self._grams_before(len(tokens) - 1):
                self._ends[gram].append(len(tokens) - 1)

    def find(self) -> list[int]:
        """Indices of the tokens that followed the longest n-gram the history ends in, most recent first."""
        for gram in self._grams_before(len(self.tokens)):
            if gram in self._ends:
                return self._ends[gram][: -_LOOK_BACK - 1 : -1]
        return []

    def match_length(self, follower: int) -> int:
        """How many tokens before index `follower` equal the last tokens of the history."""
        tokens, n = self.tokens, len(self.tokens)
        length = 0
        while (
            length < min(_LONGEST_MATCH, follower) and tokens[follower - 1 - length] == tokens[n - 1 - length]
        ):
            length += 1
        return length

    def _grams_before(self, index: int) -> list[Gram]:
        """The n-grams that end just before `index`, longest first."""
        return [tuple(self.tokens[index - n : index]) for n in self._sizes if n <= index]


class NgramDraft:
    """DraftEngine without a model. `longest` and `shortest` n-grams are looked up, in that order."""

    name = "ngram"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest <= 16:
            raise ConfigError("n-grams have 1 to 16 tokens, and the shortest is no longer than the longest")
        self._sizes = range(longest, shortest - 1, -1)
        self._histories: dict[str, _History] = {}

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        """The token after the most recent match (see DraftEngine.propose), or None where there is no match, or where
        that token may not be chosen.

        Of the signal only the confidence means something: (a + m/2) / (k + m/2 + 1), where m tokens match, and a
        of the last k followers are the token proposed.
        """
        history = self._histories.get(session)
        if history is None:
            history = self._histories[session] = _History(self._sizes)
        history.sync(context)
        followers = history.find()
        if not followers:
            return None
        token = history.tokens[followers[0]]
        if edit is not None and not edit.allows(token):
            return None
        agreeing = sum(history.tokens[i] == token for i in followers)
        match = history.match_length(followers[0])
        p = (agreeing + match / 2) / (len(followers) + match / 2 + 1)
        return Proposal(token, Signal(confidence=p, counted=True))

    def forget(self, session: str) -> None:
        self._histories.pop(session, None)

    def close(self) -> None:
        self._histories.clear()
