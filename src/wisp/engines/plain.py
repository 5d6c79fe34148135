"""Tokenizers without a model, for engines without one: a token is a byte, or a number written out.

An edge builds the same tokenizer from `blob`, a line of JSON where a model's would be a GGUF file.
"""

from __future__ import annotations

import json
import re

from wisp.core.errors import ModelError
from wisp.core.protocol.messages import vocabulary_fingerprint
from wisp.engines.base import Check, unasked
from wisp.engines.null import ByteTokenizer
from wisp.engines.special import NO_STAND_INS, StandIns
from wisp.engines.tokenizing import MOST_IDS

_MAGIC = b'{"wisp.tokenizer": '
_WORD = re.compile(rb" (0|[1-9][0-9]{0,6})|(.)", re.DOTALL)


class PlainTokenizer(ByteTokenizer):
    """Bytes, with a blob."""

    def blob(self) -> bytes:
        return _MAGIC + b'"bytes"}'


class NumberTokenizer:
    """Ids of someone else's vocabulary, readable: token 1234 is " 1234".

    Text that is written so reads back as the ids; any other character becomes the ids of its bytes.
    """

    bos_token = ""
    eos_token = "<|end|>"
    chat_template = None
    controls: frozenset[str] = frozenset()

    def __init__(self, n_vocab: int, eos: frozenset[int]) -> None:
        self.n_vocab = n_vocab
        self.eos = eos
        self.fingerprint = vocabulary_fingerprint((i, b" %d" % i) for i in range(n_vocab))

    def encode(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        stand_ins: StandIns = NO_STAND_INS,
        check: Check = unasked,
    ) -> list[int]:
        """Numbers as ids, everything else as bytes."""
        ids = []
        for number, byte in _WORD.findall(text.translate(stand_ins).encode("utf-8", "replace")):
            if byte:
                ids.append(byte[0])
            elif int(number) < self.n_vocab:
                ids.append(int(number))
            else:
                ids += b" " + number
        return ids

    def fewest(self, text: str) -> int:
        """The longest token is the largest number behind a space."""
        return len(text) // len(b" %d" % self.n_vocab)

    def piece(self, token: int) -> bytes:
        """The number, behind a space; b"" for ends of sequence."""
        return b"" if token in self.eos or not 0 <= token < self.n_vocab else b" %d" % token

    def blob(self) -> bytes:
        about = json.dumps({"n_vocab": self.n_vocab, "eos": sorted(self.eos)})
        return _MAGIC + b'"numbers", ' + about[1:].encode()


def read_plain(blob: bytes) -> PlainTokenizer | NumberTokenizer | None:
    """The tokenizer of a blob; None if it is another kind of blob. Raises ModelError."""
    if not blob.startswith(_MAGIC):
        return None
    try:
        about = json.loads(blob)
        if about["wisp.tokenizer"] == "bytes":
            return PlainTokenizer()
        n_vocab, eos = int(about["n_vocab"]), frozenset(map(int, about["eos"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ModelError(f"this tokenizer is damaged: {error!r}") from None
    if not 256 <= n_vocab <= MOST_IDS:
        raise ModelError(f"this tokenizer says that it has {n_vocab} tokens")
    return NumberTokenizer(n_vocab, eos)
