"""Constraints where tokens are chosen: a tracker for each slot of a target engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from wisp.core.errors import GrammarBusyError, GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.edits import Edit, Matcher, Matchers, Tracker
from wisp.core.protocol.reasoning import ReasoningEnd
from wisp.core.protocol.sampling import Sampling, gumbels, target_token
from wisp.core.protocol.step import (
    ENGINE_ERROR,
    INVALID_GRAMMAR,
    Slice,
    SliceResult,
    TokenLogprob,
    TopLogprob,
)

_SURE = 40.0  # more than noise ever adds: what an engine without logits says, if it may
_GREEDY = Sampling()


class Compiler(Matchers, Protocol):
    """Compiles grammars ahead of their use; `engines.grammars.Grammars` documents it."""

    def compile(self, grammar: Grammar, key: str = "") -> None: ...
    def ready(self, grammar: Grammar, key: str) -> bool: ...


class NoGrammars:
    """Of an engine that was not given any."""

    def compile(self, grammar: Grammar, key: str = "") -> None:
        """Refuses."""
        self.matcher(grammar)

    def ready(self, grammar: Grammar, key: str) -> bool:
        """Never."""
        return False

    def matcher(self, grammar: Grammar) -> Matcher:
        """Refuses."""
        raise GrammarError("grammars are not available here")

    def end(self, after: tuple[int, ...]) -> ReasoningEnd:
        """By ids alone."""
        return ReasoningEnd(after, [])


class SlotTrackers:
    """The constraints of a target engine's slots. A tracker is a cache: whose tokens it holds does not matter.

    grammars: of the vocabulary; set by the code that knows the tokenizer
    """

    def __init__(self) -> None:
        self.grammars: Compiler = NoGrammars()
        self._trackers: dict[int, Tracker] = {}

    def edits(self, work: Slice) -> Iterator[Edit] | None:
        """Along the draft of a slice, for each of its rows that are chosen from; None if nothing constrains it.

        Raises GrammarError, when called and while iterating.
        """
        sampling = work.sampling
        if sampling.constraints is None or not work.sample or not sampling.constraints.choosing:
            return None
        tracker = self._trackers.get(work.slot)
        if tracker is None or tracker.sampling != sampling:
            tracker = self._trackers[work.slot] = Tracker(sampling, self.grammars)
        return tracker.edits(work.past, work.position, work.tokens[len(work.tokens) - work.n_draft :])


def code_of(error: GrammarError) -> str:
    """For the result of a slice: what was busy may be tried again."""
    return ENGINE_ERROR if isinstance(error, GrammarBusyError) else INVALID_GRAMMAR


def agreeing(
    s: Slice, text: Callable[[int, int], int], seed: int, constraints: SlotTrackers, n_vocab: int
) -> SliceResult:
    """The result of a slice by an engine without logits, whose tokens are what `text` says of (seed, position). Each is
    certain, and so is its log probability."""
    if not s.sample:
        return SliceResult(s.session)
    first = len(s.tokens) - s.n_draft
    tokens: list[int] = []
    sampling = s.sampling
    try:
        edits = constraints.edits(s) if sampling.constraints is not None else None
        for i in range(s.n_draft + 1):
            position = s.position + i
            token = text(seed, position)
            if edits is not None:
                token = constrained(token, next(edits), seed, position, n_vocab)
            elif position < sampling.min_tokens and token in (barred := sampling.barred(position)):
                token = next(other for other in itertools.count() if other not in barred)
            tokens.append(token)
            if i == s.n_draft or token != s.tokens[first + i]:
                break
    except GrammarError as error:
        return SliceResult(s.session, error=str(error), code=code_of(error))
    logprobs: list[TokenLogprob] = []
    if s.logprobs is not None:
        logprobs = [TokenLogprob(t, 0.0, [TopLogprob(t, 0.0)][: s.logprobs]) for t in tokens]
    return SliceResult(s.session, len(tokens) - 1, tokens, logprobs)


def constrained(token: int, edit: Edit, seed: int, position: int, n_vocab: int) -> int:
    """What an engine without logits says, which would say `token`: that one, if it is as good as chosen; otherwise
    any that may be, by noise."""
    scores = gumbels(seed, position, np.arange(n_vocab))
    scores[token] += _SURE
    return target_token(scores, _GREEDY, position, edit)
