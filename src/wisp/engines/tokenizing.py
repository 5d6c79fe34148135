"""The common part of all models' tokenizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

from wisp.core.protocol.messages import vocabulary_fingerprint
from wisp.engines.base import Check, unasked
from wisp.engines.special import NO_STAND_INS, SpecialTokens, StandIns

MOST_IDS = 1 << 22  # of a vocabulary; a file that says more is damaged


class ModelTokenizer(ABC):
    """The tokenizer of a model. A subclass knows one format: it sets the fields below and fills in three methods."""

    _special: SpecialTokens
    _bos: int | None  # the beginning-of-sequence token
    _adds_bos: bool  # does the model want it in front of a text?

    def __init__(self) -> None:
        self._pieces: dict[int, bytes] = {}

    @abstractmethod
    def _encoded(self, text: str, parse_special: bool, stand_ins: StandIns, check: Check) -> list[int]:
        """Ids of `text`, which has no lone surrogates; as `encode`, without a beginning-of-sequence token."""

    @abstractmethod
    def _real(self) -> Iterator[tuple[int, bytes]]:
        """(id, bytes) of all tokens but padding entries, ascending by id. Control tokens have their text."""

    @abstractmethod
    def _rendered(self, token: int) -> bytes:
        """The bytes of one token; b"" for control tokens and for ids out of range."""

    @cached_property
    def _vocabulary(self) -> tuple[str, int]:
        """(fingerprint, bytes of the longest token). Takes tenths of a second for a large vocabulary, once."""
        real = list(self._real())
        return vocabulary_fingerprint(real), max((len(data) for _, data in real), default=1)

    @property
    def fingerprint(self) -> str:
        """Equal vocabularies give equal fingerprints, in whatever format they come."""
        return self._vocabulary[0]

    @property
    def controls(self) -> frozenset[str]:
        """The texts of control tokens."""
        return self._special.controls

    def encode(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        stand_ins: StandIns = NO_STAND_INS,
        check: Check = unasked,
    ) -> list[int]:
        """See `Tokenizer.encode`. `check` is called between special tokens."""
        ids = self._encoded(text.encode("utf-8", "replace").decode(), parse_special, stand_ins, check)
        bos = self._bos if add_bos and self._adds_bos else None
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def piece(self, token: int) -> bytes:
        """The bytes of one token; b"" for control tokens and for ids out of range."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._rendered(token)
        return found
