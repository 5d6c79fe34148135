"""Helpers for parsing a text that is still growing."""

from __future__ import annotations

from wisp.api.tools.events import Broken, Incomplete

_LONGEST_CLOSER = 32  # characters, or more


class Waiting:
    """The rest of a call, in pieces, until there is hope that it is complete: an end of one has come, and a long call
    has grown by a part, as each look reads all of it."""

    def __init__(self, closers: tuple[str, ...], begun: str, long: int) -> None:
        self.pieces: list[str] = []
        self._closers = closers
        self._least = len(begun) >> 4 if len(begun) > long else 0
        self._size = 0
        self._tail = begun[-_LONGEST_CLOSER:]
        self._closed = False

    def worth_reading(self, text: str) -> bool:
        """Take the next piece. Is it time for another look?"""
        self.pieces.append(text)
        self._size += len(text)
        window = self._tail + text
        self._tail = window[-_LONGEST_CLOSER:]
        self._closed = self._closed or any(closer in window for closer in self._closers)
        return self._closed and self._size >= self._least


def held_back(text: str, markers: tuple[str, ...]) -> int:
    """How many characters at the end of `text` a marker may begin with."""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)


def skip(text: str, at: int) -> int:
    """The first place from `at` on that is no white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def expect(text: str, at: int, marker: str) -> int:
    """The place after `marker`, which must come at `at`. Raises Incomplete or Broken."""
    if text.startswith(marker, at):
        return at + len(marker)
    if marker.startswith(text[at:]):
        raise Incomplete(soon=True)
    raise Broken


def passed(text: str, at: int, marker: str, ended: bool) -> int:
    """The place after white space and `marker`, or `at` where it does not come. Raises Incomplete if it still may."""
    after = skip(text, at)
    if text.startswith(marker, after):
        return after + len(marker)
    if not ended and marker.startswith(text[after:]):
        raise Incomplete(soon=True)
    return at


def until(text: str, at: int, marker: str) -> int:
    """Where `marker` is, from `at` on. Raises Incomplete."""
    found = text.find(marker, at)
    if found < 0:
        raise Incomplete
    return found
