"""The end of a text's reasoning, behind which a grammar begins (`Grammar.after`).

Where a model has a token for it, that is the end. Where it has none, the end is text (`</think>` is three tokens of
Llama 3), which the model may cut into tokens as it likes, and the last of them may say more, such as a line break. So
the text counts there, not the ids; and as a grammar has to begin with a token, those that would go beyond the end
cannot be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from wisp.core.errors import GrammarError

MOST_TEXT = 256  # bytes of an end that is text, which is looked for at each token; models' have up to 30


class ReasoningEnd:
    """`after` in a vocabulary. pieces: what each id says; b"" for tokens that are no text."""

    def __init__(self, after: Sequence[int], pieces: Sequence[bytes]) -> None:
        """Raises GrammarError for a text that is too long."""
        self._pieces = pieces
        self._ids = list(after)
        texts = [self._piece(token) for token in after]
        self._text = b"".join(texts) if all(texts) else b""
        if len(self._text) > MOST_TEXT:
            raise GrammarError(f"the text that ends the reasoning may have at most {MOST_TEXT} bytes")
        self._beyond = _beyond(self._text, pieces)

    def reached(self, output: Sequence[int], n: int) -> bool:
        """Is token n - 1 of the output the last one of the end?"""
        if not self._text:
            return n >= len(self._ids) and list(output[n - len(self._ids) : n]) == self._ids
        return self._text in self._tail(output, n - 1) + self._piece(output[n - 1])

    def barred(self, output: Sequence[int]) -> list[int]:
        """The ids that would go beyond the end, behind this output."""
        if not self._text:
            return []
        tail = self._tail(output, len(output))
        return [token for k, ids in self._beyond if tail.endswith(self._text[:k]) for token in ids]

    def _tail(self, output: Sequence[int], n: int) -> bytes:
        """The text before place n, as far as the end may begin in it."""
        most, size = len(self._text) - 1, 0
        parts: list[bytes] = []
        while n and size < most:
            n -= 1
            parts.append(self._piece(output[n]))
            size += len(parts[-1])
        return b"".join(reversed(parts))[max(0, size - most) :]

    def _piece(self, token: int) -> bytes:
        return self._pieces[token] if 0 <= token < len(self._pieces) else b""


def _beyond(text: bytes, pieces: Sequence[bytes]) -> list[tuple[int, list[int]]]:
    """(k, ids that go beyond the text where its first k bytes are there already)"""
    found: dict[int, list[int]] = {}
    for token, piece in enumerate(pieces):
        if not text or (piece[:1] not in text and text not in piece):
            continue
        if text in piece[:-1]:
            found.setdefault(0, []).append(token)
        for k in range(
            max(1, len(text) - len(piece) + 1), len(text)
        ):  # where less is left than the piece has
            if piece.startswith(text[k:]):
                found.setdefault(k, []).append(token)
    return sorted(found.items())
