"""Statistics of past answers, from which decisions about new ones start."""

from __future__ import annotations

RATE = 0.05  # smoothing, per answer


class Answers:
    """tokens, seconds: length and duration of an answer, smoothed; a guess before the first one has ended. `waited_s`:
    the part of `seconds` before its first token; 0 before the first answer has ended.

    Drafts and decodes count with forgetting, answer by answer; before the first of them, each row gives a token.
    """

    __slots__ = ("_committed", "_n", "_rows", "_slices", "seconds", "tokens", "waited_s")

    def __init__(self) -> None:
        self.tokens = 200.0
        self.seconds = 10.0
        self.waited_s = 0.0
        self._n = 0
        self._slices = self._rows = self._committed = 1.0  # of drafts and decodes

    def verified(self, rows: int, committed: int) -> None:
        """A draft was verified, or a token decoded: so many rows gave so many tokens."""
        self._slices += 1.0
        self._rows += rows
        self._committed += committed

    def ended(self, tokens: int, seconds: float, waited_s: float) -> None:
        """An answer is complete, all of it from this verifier."""
        self._n += 1
        rate = max(RATE, 1.0 / self._n)
        self.tokens += rate * (tokens - self.tokens)
        self.seconds += rate * (seconds - self.seconds)
        self.waited_s += rate * (waited_s - self.waited_s)
        self._slices *= 1.0 - RATE
        self._rows *= 1.0 - RATE
        self._committed *= 1.0 - RATE

    @property
    def rows_a_token(self) -> float:
        """Rows of drafts and decodes for each token that they committed."""
        return self._rows / self._committed

    @property
    def tokens_a_slice(self) -> float:
        """Tokens that a draft or decode commits."""
        return self._committed / self._slices
