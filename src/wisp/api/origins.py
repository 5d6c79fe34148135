"""Where each token of an answer is from, for clients that ask (`api.extras`).

A chunk of text may hold several tokens, and a token may end in the middle of a character or be held back as the
possible beginning of a stop string. So tokens are told with their own text, once that is certain: joined, they are the
text of the answer as the model wrote it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from wisp.core.protocol.step import Committed

DRAFT = "draft"  # an accepted draft token
CORRECTION = "correction"  # the target's own, in place of the first draft token that it did not want
BONUS = "bonus"  # the target's own, after a draft that it accepted whole
SERVER = "server"  # decoded by the verifier, without a draft
FORCED = "forced"  # an accepted draft token that a grammar left no choice for: it cost the drafter no step


def origin(item: Committed, i: int) -> str:
    """Where token `i` of what was committed is from."""
    if i < item.from_draft:
        return FORCED if item.round is not None and i in item.round.forced else DRAFT
    if not item.drafted:
        return SERVER
    return BONUS if item.accepted == item.drafted else CORRECTION


class Origins:
    """Tokens that wait until their text is certain."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str, int]] = []  # token, origin, characters of text before it
        self._text = ""  # from the first waiting token on
        self._start = 0

    def push(self, token: int, origin: str, offset: int) -> None:
        """A token that is shown; `offset` characters stand before it."""
        self._waiting.append((token, origin, offset))

    def show(self, text: str) -> None:
        """`text` has become certain."""
        self._text += text

    def take(self, *, last: bool) -> list[dict[str, Any]]:
        """The tokens whose text is complete. last: there is no more to come."""
        released = self._start + len(self._text)
        ends = [offset for _, _, offset in self._waiting[1:]]
        ready = sum(end <= released for end in ends)
        if last:  # tokens of a stop string begin behind the text
            ends.append(released)
            ready = sum(offset < released for _, _, offset in self._waiting)
        told = []
        for (token, origin, offset), end in zip(self._waiting[:ready], ends, strict=False):
            piece = self._text[offset - self._start : end - self._start]
            told.append({"id": token, "text": piece, "from": origin})
        del self._waiting[:ready]
        if self._waiting:
            first = min(self._waiting[0][2], released)
            self._text, self._start = self._text[first - self._start :], first
        return told


def told(item: Committed, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """The field `wisp` of a chunk."""
    return {"tokens": tokens, "round": None if item.round is None else msgspec.to_builtins(item.round)}
