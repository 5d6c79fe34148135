"""Byte-level byte-pair encoding, as GPT-2 does it (Sennrich et al. 2016; Radford et al. 2019).

Token ids: 256 bytes, then one per merge, then the special tokens. Every string has an encoding. llama.cpp's
"gpt-2" tokenizer gives the same ids, because it cuts text into the same words and applies merges in the same
order.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

from tools.tiny.text import SPECIALS
from wisp.engines.huggingface import byte_level

Pair = tuple[int, int]

# GPT-2's rule, in the standard library's `re`: letters are word characters that are no digits and no "_".
_WORD = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+",
)
_SPECIAL = re.compile("(" + "|".join(re.escape(s) for s in SPECIALS) + ")")


class Vocabulary:
    """An encoder: text to ids. Ids 0-255 are bytes; 256 + i is merge i; then `SPECIALS`."""

    def __init__(self, merges: list[Pair]) -> None:
        self.merges = merges
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.pieces = [bytes([b]) for b in range(256)]
        for a, b in merges:
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.special = {s: len(self.pieces) + i for i, s in enumerate(SPECIALS)}
        self._cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces) + len(self.special)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out are taken as such."""
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                for word in _WORD.findall(part):
                    ids += self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            ids = list(word.encode())
            while len(ids) > 1:
                best = min(pairwise(ids), key=lambda pair: self.rank.get(pair, 1 << 30))
                if best not in self.rank:
                    break
                ids = _merge(ids, best, 256 + self.rank[best])
            self._cache[word] = ids
        return ids


def learn(text: str, size: int) -> Vocabulary:
    """A vocabulary of `size` tokens: merges the most frequent pair, again and again, ties to the lowest ids.

    Digits stay single, so that sums can be learnt.
    """
    parts = [part for part in _SPECIAL.split(text) if part not in SPECIALS]
    counts = Counter(word for part in parts for word in _WORD.findall(part))
    words = [(list(word.encode()), n) for word, n in counts.items() if not re.search(r"\d", word)]
    merges: list[Pair] = []
    while 256 + len(merges) + len(SPECIALS) < size:
        pairs: Counter[Pair] = Counter()
        for ids, n in words:
            for pair in pairwise(ids):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [(_merge(ids, best, 256 + len(merges)), n) for ids, n in words]
        merges.append(best)
    return Vocabulary(merges)


def _merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    merged: list[int] = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def gguf_tokens(vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """(tokens, merges) as GGUF's "gpt2" tokenizer stores them."""
    shown = {byte: char for char, byte in byte_level().items()}
    pieces = ["".join(shown[b] for b in piece) for piece in vocabulary.pieces]
    return pieces + list(SPECIALS), [f"{pieces[a]} {pieces[b]}" for a, b in vocabulary.merges]
