"""Drafters made for testing: some know the reference, to be always right or always wrong on purpose."""

from __future__ import annotations

import random
from collections.abc import Sequence

from wisp.core.protocol.sampling import Sampling
from wisp.core.draft.signals import Signal
from wisp.engines.base import DraftEngine, Proposal

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


class _Testing:
    """A draft engine without state to speak of."""

    name = "testing"

    def forget(self, session: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


class RandomDraft(_Testing):
    """Any token of the vocabulary."""

    def __init__(self, n_vocab: int, rng: random.Random) -> None:
        self.n_vocab, self.rng = n_vocab, rng

    def propose(
        self, session: str, context: Sequence[int], position: int, sampling: Sampling
    ) -> Proposal | None:
        return Proposal(self.rng.randrange(self.n_vocab), Signal(confidence=0.5))


class EmptyDraft(_Testing):
    """Never has anything to propose."""

    def propose(
        self, session: str, context: Sequence[int], position: int, sampling: Sampling
    ) -> Proposal | None:
        return None


class OracleDraft(_Testing):
    """Proposes the reference's own token, as long as it knows it: ends of all sorts fall inside its drafts."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script

    def propose(
        self, session: str, context: Sequence[int], position: int, sampling: Sampling
    ) -> Proposal | None:
        if position >= len(self.script):
            return None
        return Proposal(self.script[position], Signal(confidence=1.0))


class WrongDraft(RandomDraft):
    """Any token but the reference's."""

    def __init__(self, script: Sequence[int], n_vocab: int, rng: random.Random) -> None:
        super().__init__(n_vocab, rng)
        self.script = script

    def propose(
        self, session: str, context: Sequence[int], position: int, sampling: Sampling
    ) -> Proposal | None:
        right = self.script[position] if position < len(self.script) else -1
        token = self.rng.randrange(self.n_vocab)
        return Proposal(token if token != right else (token + 1) % self.n_vocab, Signal(confidence=0.5))


class Drafts:
    """The draft engine of each case: shared ones (a model, n-grams), or one made for it."""

    def __init__(self, shared: dict[str, DraftEngine], n_vocab: int) -> None:
        self.shared, self.n_vocab = shared, n_vocab

    def engine(self, kind: str, script: Sequence[int], rng: random.Random) -> DraftEngine | None:
        """None for "serve"."""
        if kind in self.shared:
            return self.shared[kind]
        made: dict[str, DraftEngine] = {
            "random": RandomDraft(self.n_vocab, rng),
            "empty": EmptyDraft(),
            "wrong": WrongDraft(script, self.n_vocab, rng),
            "oracle": OracleDraft(script),
        }
        return made.get(kind)

    def close(self) -> None:
        """Free the shared engines."""
        for engine in self.shared.values():
            engine.close()
