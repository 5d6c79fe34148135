"""From tokens to text, one token at a time: UTF-8 boundaries and stop strings.

A token may end in the middle of a character, and a stop string may begin in one token and end in another, so
some text has to be held back. Two rules make the result a function of the tokens alone, however they were
grouped on their way here:

- tokens are taken one by one, and text is matched character by character: of several stop strings the one
  that is complete first wins (of two that end together, the longer one);
- the token that completes a stop string is the last that counts. The text is cut before the stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Incremental text of one generation.

    tokens:   how many were taken
    offsets:  for each token taken, how many characters of text stand before it
    released: characters handed out by `take` so far
    stopped:  a stop string was found, `found`; no token may be pushed any more

    A stop string that is complete within the first `min_tokens` tokens is text like any other.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matchers = [_Matcher(s) for s in stop]
        self._min_tokens = min_tokens
        self._held = ""
        self._ended = False
        self.offsets: list[int] = []
        self.released = 0
        self.stopped = False
        self.found = ""

    @property
    def tokens(self) -> int:
        return len(self.offsets)

    @property
    def length(self) -> int:
        """Characters so far."""
        return self.released + len(self._held)

    def push(self, token: int) -> bool:
        """Take one token. True if it completed a stop string."""
        self.offsets.append(self.length)
        self._add(self._decoder.decode(self._piece(token)))
        return self.stopped

    def end(self) -> None:
        """No more tokens: nothing is held back any longer. An unfinished character becomes U+FFFD."""
        if not self.stopped:
            self._add(self._decoder.decode(b"", final=True))
        self._ended = True

    def take(self) -> str:
        """The text that has become certain since the last call."""
        held_back = 0
        if not (self.stopped or self._ended):
            held_back = max((m.matched for m in self._matchers), default=0)
        certain = len(self._held) - held_back
        text, self._held = self._held[:certain], self._held[certain:]
        self.released += certain
        return text

    def _add(self, text: str) -> None:
        for at, char in enumerate(text, start=len(self._held) + 1) if self._matchers else ():
            found = [m for m in self._matchers if m.advance(char)]
            if found and self.tokens <= self._min_tokens:
                for m in found:
                    m.pass_over()
            elif found:
                longest = max(found, key=lambda m: m.length)
                self._held = (self._held + text)[: at - longest.length]
                self.stopped, self.found = True, longest.stop
                return
        self._held += text


class _Matcher:
    """Knuth-Morris-Pratt: `matched` is the longest head of `stop` that the text so far ends in."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = len(stop)
        self.matched = 0
        self._shorter = [0] * len(stop)  # of the first i + 1 characters: their longest head that is a tail
        size = 0
        for i in range(1, len(stop)):
            while size and stop[i] != stop[size]:
                size = self._shorter[size - 1]
            size += stop[i] == stop[size]
            self._shorter[i] = size

    def pass_over(self) -> None:
        """`stop` is complete and does not count: the next one may begin in it."""
        self.matched = self._shorter[self.matched - 1]

    def advance(self, char: str) -> bool:
        """Read one character. True if `stop` is complete; do not go on then, or `pass_over` it."""
        while self.matched and self.stop[self.matched] != char:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.stop[self.matched] == char
        return self.matched == self.length
