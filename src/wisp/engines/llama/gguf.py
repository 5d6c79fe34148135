"""Just enough of the GGUF format (version 3) to cut a model file down to its metadata.

A file is: magic, version, number of tensors, number of key-value pairs, the pairs, then tensors. A file with all
the pairs and no tensors is valid, and a tokenizer can be loaded from it.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import BinaryIO

from wisp.core.errors import ModelError

_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, pairs
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_TOKENS = b"tokenizer.ggml.tokens"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by type of value
_MOST = 1 << 28  # no metadata is this long; a damaged length field is


class _Reader:
    """Walks over a file, refusing to leave it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, n: int) -> bytes:
        self.skip(n, seek=False)
        return self._file.read(n)

    def skip(self, n: int, *, seek: bool = True) -> None:
        if n > min(self._left, _MOST):
            raise ModelError("the GGUF metadata runs past the end of the file: it is cut short or damaged")
        self._left -= n
        if seek:
            self._file.seek(n, 1)

    def u32(self) -> int:
        return int.from_bytes(self.read(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.read(8), "little")

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.u64())
        elif kind == _ARRAY:
            of, count = self.u32(), self.u64()
            if of in _SIZES:
                self.skip(count * _SIZES[of])
            elif of == _STRING:
                for _ in range(count):
                    self.skip(self.u64())
            else:  # of arrays: nothing has these
                raise ModelError(f"the GGUF metadata has an array of unknown type {of}")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ModelError(f"the GGUF metadata has a value of unknown type {kind}")

    def skip_pairs(self, count: int) -> None:
        for _ in range(count):
            self.skip(self.u64())
            self.skip_value(self.u32())


def _open(reader: _Reader) -> tuple[int, int, int]:
    magic, version, tensors, pairs = _HEADER.unpack(reader.read(_HEADER.size))
    if magic != b"GGUF" or version not in (2, 3):
        raise ModelError("not a GGUF file of version 2 or 3")
    return version, tensors, pairs


def header_only(path: Path) -> bytes:
    """The file with all its metadata and no tensors: a few MB. Raises ModelError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        version, _, pairs = _open(reader)
        reader.skip_pairs(pairs)
        end = file.tell()
        file.seek(_HEADER.size)
        body = file.read(end - _HEADER.size)
    blob = _HEADER.pack(b"GGUF", version, 0, pairs) + body
    return blob + b"\0" * (-len(blob) % _ALIGNMENT)


def check_blob(blob: bytes) -> None:
    """Raises ModelError unless `blob` is whole, well-formed metadata without tensors."""
    reader = _Reader(io.BytesIO(blob), len(blob))
    _, tensors, pairs = _open(reader)
    if tensors:
        raise ModelError("a tokenizer blob has no tensors; this is a whole model")
    for _ in range(pairs):
        name, kind = reader.read(reader.u64()), reader.u32()
        if name == _TOKENS:
            _check_tokens(reader, kind)
        else:
            reader.skip_value(kind)


def _check_tokens(reader: _Reader, kind: int) -> None:
    """llama.cpp ends the process over a vocabulary that has a token twice."""
    of, count = (reader.u32(), reader.u64()) if kind == _ARRAY else (0, 0)
    if of != _STRING:
        raise ModelError("the GGUF metadata has a vocabulary that is no list of texts")
    seen = set()
    for _ in range(count):
        seen.add(reader.read(reader.u64()))
    if len(seen) < count:
        raise ModelError("the GGUF metadata has a vocabulary with a token twice: it is damaged")
