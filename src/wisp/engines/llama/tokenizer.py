"""The target's tokenizer, from a GGUF file or from a blob that a server handed out.

The blob is a GGUF file with all metadata and no tensors, so server and edge run the same code over the same
tables. Ids are exchanged, never text, and both sides compare `fingerprint` first.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from wisp.core.errors import EngineError
from wisp.engines.base import Check
from wisp.engines.llama import gguf
from wisp.engines.llama.capi import api
from wisp.engines.llama.model import Model
from wisp.engines.special import Special, SpecialTokens, StandIns
from wisp.engines.tokenizing import ModelTokenizer

# llama_token_attr
_UNKNOWN, _UNUSED, _CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = (1 << bit for bit in (0, 1, 3, 4, 7, 8))
_LITERAL = frozenset({1, 2})  # llama_vocab_type: SentencePiece's and byte-level BPE, which normalise nothing
_SPACE = " \t\n\v\f\r"  # C's isspace
_PADDING = re.compile(rb"\[PAD\d+\]")


class LlamaTokenizer(ModelTokenizer):
    """Tokenizer protocol over an open model; `open` and `from_blob` make one that owns a vocabulary-only model.

    Encoding is safe from several threads. Raises EngineError once its model is closed.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._api = api()
        self._model = model
        self.n_vocab = model.n_vocab
        self.eos = model.eos
        self.chat_template = model.chat_template
        bos = int(self._api.lib.llama_vocab_bos(model.vocab))
        self._bos = bos if bos >= 0 else None
        self._adds_bos = bool(self._api.lib.llama_vocab_get_add_bos(model.vocab))
        self.bos_token = self._text(bos)
        self.eos_token = self._text(int(self._api.lib.llama_vocab_eos(model.vocab)))
        self._special = SpecialTokens(self._specials(), _SPACE)

    @classmethod
    def open(cls, path: str | Path) -> LlamaTokenizer:
        """From a GGUF file, whose weights are not read. Raises ModelError."""
        return cls(Model(path, vocab_only=True))

    @classmethod
    def from_blob(cls, blob: bytes) -> LlamaTokenizer:
        """From what `blob()` returned, elsewhere. Raises ModelError if it is not such a blob."""
        gguf.check_blob(blob)
        with _as_file(blob) as path:
            tokenizer = cls.open(path)
        tokenizer.__dict__["_blob"] = blob
        return tokenizer

    def _real(self) -> Iterator[tuple[int, bytes]]:
        lib, vocab = self._api.lib, self._model.vocab
        for token in range(self.n_vocab):
            if lib.llama_vocab_get_attr(vocab, token) & _UNUSED:
                continue
            text = self._render(token, special=True)
            if not _PADDING.fullmatch(text):
                yield token, text

    def _encoded(self, text: str, parse_special: bool, stand_ins: StandIns, check: Check) -> list[int]:
        ids: list[int] = []
        for part in self._special.split(text, control=parse_special, stand_ins=stand_ins):
            check()
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._tokenize(part.encode())
        return ids

    def fewest(self, text: str) -> int:
        """No token stands for more bytes than the longest has, but some kinds of vocabulary drop white space and
        write characters in a shorter form (four bytes become at least one)."""
        normalises = self._api.lib.llama_vocab_type(self._model.vocab) not in _LITERAL
        if normalises or self._special.strips:
            text = "".join(text.split())
        size = len(text.encode("utf-8", "replace"))
        return size // (self._vocabulary[1] * (4 if normalises else 1))

    def _rendered(self, token: int) -> bytes:
        return self._render(token, special=False)

    def blob(self) -> bytes:
        """A self-contained file (a few MB, a third of it gzipped) for `from_blob`."""
        return self._blob

    def close(self) -> None:
        """Closes the model; leave that to the other owner of a shared one."""
        self._model.close()

    @cached_property
    def _blob(self) -> bytes:
        return gguf.header_only(self._model.path)

    def _specials(self) -> Iterator[Special]:
        """Those that llama.cpp looks for before anything else."""
        lib, vocab = self._api.lib, self._model.vocab
        for token in range(self.n_vocab):
            attr = int(lib.llama_vocab_get_attr(vocab, token))
            if attr & (_CONTROL | _USER_DEFINED | _UNKNOWN):
                control = bool(attr & (_CONTROL | _UNKNOWN))
                yield Special(token, self._text(token), control, bool(attr & _LSTRIP), bool(attr & _RSTRIP))

    def _tokenize(self, data: bytes) -> list[int]:
        """Ids of a text without special tokens, which is not empty."""
        lib, vocab = self._api.lib, self._model.vocab
        size = len(data) + 8  # no token is shorter than a byte, but for an added space
        for _ in range(2):
            ids = self._api.ffi.new("int32_t[]", size)
            count = int(lib.llama_tokenize(vocab, data, len(data), ids, size, False, False))
            if count >= 0:
                return self._api.ffi.unpack(ids, count) if count else []
            size = -count
        raise EngineError(f"llama.cpp does not tokenize a text of {len(data)} bytes")

    def _render(self, token: int, *, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab:
            return b""
        lib, ffi, vocab = self._api.lib, self._api.ffi, self._model.vocab
        size = 64
        for _ in range(2):
            buffer = ffi.new("char[]", size)
            count = int(lib.llama_token_to_piece(vocab, token, buffer, size, 0, special))
            if count >= 0:
                return bytes(ffi.buffer(buffer, count))
            size = -count
        raise EngineError(f"llama.cpp does not render token {token}")

    def _text(self, token: int) -> str:
        """The text of a special token, "" if the model has none such."""
        if token < 0:
            return ""
        text = self._api.lib.llama_vocab_get_text(self._model.vocab, token)
        return str(self._api.ffi.string(text).decode("utf-8", "replace"))


@contextlib.contextmanager
def _as_file(blob: bytes) -> Iterator[Path]:
    """A path for a library that reads nothing else: in memory on Linux, as disks may be full or not ours to write."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("wisp-tokenizer"), "wb") as file:
            file.write(blob)
            file.flush()
            yield Path(f"/proc/self/fd/{file.fileno()}")
        return
    with tempfile.TemporaryDirectory(prefix="wisp-") as folder:
        path = Path(folder) / "tokenizer.gguf"
        path.write_bytes(blob)
        yield path
