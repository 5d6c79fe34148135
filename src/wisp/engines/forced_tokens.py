"""A grammar that allows exactly one sequence of tokens: for texts that are scored."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from wisp.core.errors import GrammarError
from wisp.core.protocol.edits import Bits


class ForcedTokens:
    """A place in the sequence (`core.protocol.edits.Matcher`): how many tokens there are before says which is next.
    Behind the last one, and behind any other than these, only ends can be chosen, or anything if there are none."""

    def __init__(self, source: str, n_vocab: int, ends: frozenset[int]) -> None:
        """source: a JSON list of ids. Raises GrammarError."""
        try:
            tokens = json.loads(source)
        except (ValueError, RecursionError):
            tokens = None
        if not isinstance(tokens, list) or not tokens or not all(type(t) is int for t in tokens):
            raise GrammarError("tokens must be a list of ids that is not empty")
        if not 0 <= min(tokens) <= max(tokens) < n_vocab:
            raise GrammarError(f"tokens must be ids from 0 to {n_vocab - 1}")
        self._tokens = tokens
        self._words = (n_vocab + 31) // 32
        known = [end for end in ends if end < n_vocab]
        self._ends = self._mask(*known) if known else np.full(self._words, 0xFFFFFFFF, np.uint32)

    def masks(self, before: Sequence[int], draft: Sequence[int]) -> list[Bits]:
        """See `core.protocol.edits.Matcher`."""
        at, tokens = len(before), self._tokens
        right = list(before) == tokens[:at]
        masks = [self._mask(tokens[at]) if right and at < len(tokens) else self._ends]
        for token in draft:
            if token >= 32 * self._words or not int(masks[-1][token // 32]) >> (token % 32) & 1:
                break
            at += 1
            masks.append(self._mask(tokens[at]) if right and at < len(tokens) else self._ends)
        return masks

    def _mask(self, *tokens: int) -> Bits:
        mask = np.zeros(self._words, np.uint32)
        for token in tokens:
            mask[token // 32] |= np.uint32(1 << (token % 32))
        return mask
