"""Changed copies of the tiny models, made of bytes."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wisp.engines.llama.gguf import _HEADER, _open, _Reader

ALIGNMENT = 32
FLOAT32 = 0
Floats = npt.NDArray[np.float32]


class Weights:
    """A GGUF file of float32 tensors that can be changed and written."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        file = io.BytesIO(data)
        reader = _Reader(file, len(data))
        self._version, tensors, self._pairs = _open(reader)
        reader.skip_pairs(self._pairs)
        self._metadata = data[_HEADER.size : file.tell()]
        table = []
        for _ in range(tensors):
            name = reader.read(reader.u64()).decode()
            shape = [reader.u64() for _ in range(reader.u32())]
            assert reader.u32() == FLOAT32
            table.append((name, shape, reader.u64()))
        base = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        self.tensors: dict[str, Floats] = {}
        for name, shape, offset in table:
            values = np.frombuffer(data, np.float32, int(np.prod(shape)), base + offset)
            self.tensors[name] = values.reshape(shape[::-1]).copy()

    def untie(self) -> None:
        """An output matrix of its own, so that an embedding can be changed alone."""
        self.tensors["output.weight"] = self.tensors["token_embd.weight"].copy()

    def write(self, path: Path) -> Path:
        head = _HEADER.pack(b"GGUF", self._version, len(self.tensors), self._pairs) + self._metadata
        body = b""
        for name, values in self.tensors.items():
            head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", values.ndim)
            head += struct.pack(f"<{values.ndim}Q", *values.shape[::-1])
            head += struct.pack("<IQ", FLOAT32, len(body))
            body += _padded(values.tobytes())
        path.write_bytes(_padded(head) + body)
        return path


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)
