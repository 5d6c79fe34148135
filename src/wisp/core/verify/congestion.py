"""The price of a draft token: how much one more would cost others, in committed tokens."""

from __future__ import annotations


class CongestionPrice:
    """What a verifier's steps tell of its load.

    (ms it adds to a step) x (tokens committed per ms of decoding) x utilisation, where utilisation counts only
    drafts and prompts that had to be left out of steps for want of time, and what is owed to sessions that are
    hardly ahead: while the server keeps up it is 0. The time that prompts take is not part of it: answers bring their
    prompts with them, however they are drafted.
    """

    def __init__(self) -> None:
        self.utilisation = 0.0
        self._tokens = self._ms = 0.0

    def planned(self, step_ms: float, left_ms: float) -> None:
        """A step of so long was planned, and work of `left_ms` left out."""
        share = min(1.0, left_ms / step_ms)
        self.utilisation += 0.05 * (share - self.utilisation)

    def stepped(self, tokens: int, ms: float) -> None:
        """A step, which took `ms` without its prompts, committed so many tokens."""
        self._tokens = 0.98 * self._tokens + tokens
        self._ms = 0.98 * self._ms + ms

    def price(self, token_ms: float) -> float:
        """In committed tokens, where a token adds `token_ms` to a step."""
        return token_ms * self._tokens / self._ms * self.utilisation if self._ms > 0 else 0.0
