"""Statistics of past answers, from which decisions about new ones start."""

from __future__ import annotations

RATE = 0.05  # smoothing, per answer


class Answers:
    """tokens, seconds: length and duration of an answer, smoothed; a guess before the first one has ended."""

    def __init__(self) -> None:
        self.tokens = 200.0
        self.seconds = 10.0
        self._n = 0

    def ended(self, tokens: int, seconds: float) -> None:
        """An answer is complete."""
        self._n += 1
        rate = max(RATE, 1.0 / self._n)
        self.tokens += rate * (tokens - self.tokens)
        self.seconds += rate * (seconds - self.seconds)
