"""One request of a user, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from wisp.core.protocol.slo import Served, Slo


@dataclass(slots=True)
class Request:
    """One request of a user and its fate, however often it was sent. Times in seconds, at the user.

    refusals: how often it was refused; refused: for good
    heard:    for each message that brought tokens, when it came and how many tokens there were then
    """

    seed: int
    prompt: list[int]
    slo: Slo
    device: int
    arrived: float
    max_tokens: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    ended: float | None = None
    ok: bool = True
    refused: bool = False
    refusals: int = 0
    heard: list[tuple[float, int]] = field(default_factory=list)

    def hear(self, now: float, tokens: int) -> None:
        """A message has brought the answer to `tokens` tokens."""
        if self.tokens == 0:
            self.first = now
        self.last, self.tokens = now, tokens
        self.heard.append((now, tokens))

    @property
    def gaps_ms(self) -> list[float]:
        """Between messages that brought tokens."""
        return [(b - a) * 1e3 for (a, _), (b, _) in pairwise(self.heard)]

    def served(self) -> Served:
        """As `core.protocol.slo` counts it."""
        return Served(self.arrived, self.first, self.last, self.tokens, self.slo, self.ended, self.ok)
