"""The congestion price of a draft token: what one more costs the other sessions, in committed tokens."""

from __future__ import annotations


class CongestionPrice:
    """price = (ms that a draft token adds to a step) x (tokens committed per ms of decoding) x utilisation

    Utilisation is the backlog of a step as a share of its time: drafts and prompts left out, and sessions with little
    slack. It is 0 while the verifier keeps up. Prefill time does not count: every request brings its prompt, however it
    is drafted.
    """

    def __init__(self) -> None:
        self.utilisation = 0.0
        self._tokens = self._ms = 0.0

    def planned(self, step_ms: float, left_ms: float) -> None:
        """A step of `step_ms` was planned, with a backlog of `left_ms`."""
        share = min(1.0, left_ms / step_ms)
        self.utilisation += 0.05 * (share - self.utilisation)

    def stepped(self, tokens: int, ms: float) -> None:
        """A step committed `tokens` in `ms`, prefill time left out."""
        self._tokens = 0.98 * self._tokens + tokens
        self._ms = 0.98 * self._ms + ms

    def price(self, token_ms: float) -> float:
        """Committed tokens per draft token, which adds `token_ms` to a step."""
        return token_ms * self._tokens / self._ms * self.utilisation if self._ms > 0 else 0.0
