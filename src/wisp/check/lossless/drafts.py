"""Drafters made for testing: some know the reference, to be always right or always wrong on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from wisp.core.draft.signals import Signal
from wisp.core.protocol.edits import Edit, Matchers
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import DraftEngine, Proposal
from wisp.engines.constrained_draft import ConstrainedDraft

DRAFTERS: tuple[tuple[str, str], ...] = (
    ("model", "fixed:1"),
    ("model", "fixed:4"),
    ("model", "fixed:8"),
    ("model", "gain"),
    ("model", "predictor"),
    ("model", "confidence:0.4"),
    ("ngram", "fixed:4"),
    ("random", "fixed:4"),
    ("empty", "fixed:4"),
    ("wrong", "fixed:4"),
    ("oracle", "fixed:8"),
    ("serve", ""),
)
"""(drafter, drafting policy) of the cases; "serve" never drafts: the verifier decodes by itself."""


class Chosen:
    """A draft engine whose proposals are a function of the position, and that holds nothing."""

    name = "testing"

    def __init__(
        self,
        choose: Callable[[int], int | None],
        confidence: float,
        second: Callable[[int], int | None] = lambda position: None,
    ) -> None:
        self._choose, self._signal, self._second = choose, Signal(confidence=confidence), second

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        token = self._choose(position)
        return None if token is None else Proposal(token, self._signal, other=self._second(position))

    def forget(self, session: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


class Drafts:
    """The draft engine of each case: shared ones (a model, n-grams), or one made for it."""

    def __init__(self, shared: dict[str, ConstrainedDraft], n_vocab: int) -> None:
        self.shared, self.n_vocab = shared, n_vocab

    def constrain(self, matchers: Matchers) -> None:
        """Have the shared engines draft by grammars. Those made for a case never do: their drafts leave them."""
        for engine in self.shared.values():
            engine.matchers = matchers

    def engine(self, kind: str, script: Sequence[int], rng: random.Random) -> DraftEngine | None:
        """None for "serve"."""
        if kind in self.shared:
            return self.shared[kind]

        def right(position: int) -> int | None:
            return script[position] if position < len(script) else None

        def random_token(position: int) -> int:
            return rng.randrange(self.n_vocab)

        def wrong(position: int) -> int:
            token = random_token(position)
            return token if token != right(position) else (token + 1) % self.n_vocab

        match kind:
            case "random":
                return Chosen(random_token, 0.5, right)
            case "empty":
                return Chosen(lambda position: None, 0.0)
            case "wrong":  # but for its second choice, so its branches are right
                return Chosen(wrong, 0.5, right)
            case "oracle":  # ends of all sorts fall inside its drafts
                return Chosen(right, 1.0, random_token)
        return None

    def close(self) -> None:
        for engine in self.shared.values():
            engine.close()
