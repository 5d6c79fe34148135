"""Special tokens: finding them in a text in one pass.

llama.cpp looks for each in turn and walks its list of pieces from the start for each find, so a text of markers
costs it quadratic time. Here one pattern, a trie of them all, goes over the text once; of those that begin at one
place the longest is taken, as Hugging Face's tokenizers do. (Where two overlap, llama.cpp takes the longest first.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

# Characters that stand for others while control tokens are looked for: a table as of `str.translate`.
StandIns = Mapping[int, str]
NO_STAND_INS: StandIns = MappingProxyType({})


class Special(msgspec.Struct, frozen=True):
    """A token that is found by its text, before anything else.

    control: only where control tokens are asked for; others (those that users added) are found in any text
    lstrip, rstrip: white space on that side belongs to it
    """

    id: int
    text: str
    control: bool
    lstrip: bool = False
    rstrip: bool = False


class SpecialTokens:
    """The special tokens of a vocabulary. `space`: what counts as white space beside them."""

    def __init__(self, tokens: Iterable[Special], space: str | None = None) -> None:
        self._by_text: dict[str, Special] = {}
        for token in tokens:
            if token.text:
                self._by_text.setdefault(token.text, token)
        self._space = space
        self.controls = frozenset(text for text, token in self._by_text.items() if token.control)
        self.strips = any(token.lstrip or token.rstrip for token in self._by_text.values())
        self._all = _pattern(self._by_text)
        self._added = _pattern(self._by_text.keys() - self.controls)

    def split(self, text: str, *, control: bool, stand_ins: StandIns = NO_STAND_INS) -> Iterator[str | int]:
        """The ids of special tokens, and the text between them where there is any.

        What has a stand-in for one of its characters is no control token; the text is given as it is without.
        """
        parts = self._split(text, self._all if control else self._added)
        if not stand_ins:
            yield from parts
            return
        for part in parts:
            if isinstance(part, int):
                yield part
            else:
                yield from self._split(part.translate(stand_ins), self._added)

    def _split(self, text: str, pattern: re.Pattern[str] | None) -> Iterator[str | int]:
        at = 0
        while pattern is not None and (found := pattern.search(text, at)):
            token = self._by_text[found.group()]
            before = text[at : found.start()]
            if token.lstrip:
                before = before.rstrip(self._space)
            if before:
                yield before
            yield token.id
            at = found.end()
            if token.rstrip:
                while at < len(text) and (
                    text[at].isspace() if self._space is None else text[at] in self._space
                ):
                    at += 1
        if at < len(text):
            yield text[at:]


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for any of `texts`, at each place the longest; None for none."""
    trie: dict[str, Any] = {}
    for text in texts:
        node = trie
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_written(trie)) if trie else None


def _written(node: dict[str, Any]) -> str:
    """The pattern of what may follow at a node of the trie."""
    branches = []
    for char, below in node.items():
        if not char:
            continue
        written = re.escape(char)
        while len(below) == 1 and "" not in below:  # a chain: no need to go deeper for it
            ((char, below),) = below.items()
            written += re.escape(char)
        branches.append(written + _written(below))
    if not branches:
        return ""
    either = f"(?:{'|'.join(branches)})"
    return either + "?" if "" in node else either
