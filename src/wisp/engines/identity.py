"""An engine's digest: a hash of all that decides its text. Engines with equal digests can continue each other's texts.

Weights are sampled, not read: a file's size, its first 16 MiB (a GGUF's metadata and table of tensors, then the first
of them), and 256 blocks spread evenly over the rest, the very end included. Another training or quantisation changes
every block; that a few bits have rotted elsewhere is for checksums to find. Small files are read whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wisp.core.errors import ModelError
from wisp.core.protocol.sampling import RULE

_HEAD = 16 << 20  # bytes
_BLOCKS, _BLOCK = 256, 64 << 10  # of so many bytes each: 16 MiB more
_PART = re.compile(r"(.*-)\d{5}(-of-(\d{5})\.gguf)")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".json")  # and settings, in a Hugging Face folder


def engine_digest(engine: str, **decides: str | int | list[int]) -> str:
    """The digest of an engine and of what `decides` its logits. The rule that makes tokens of them is in it, and the
    library that says what a grammar allows."""
    everything = {"engine": engine, "rule": RULE, "grammars": _grammars(), **decides}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _grammars() -> str:
    try:
        return version("llguidance")
    except PackageNotFoundError:
        return ""


def gguf_digest(path: Path) -> str:
    """Of a GGUF file, with the other parts of one that was split. Raises ModelError."""
    split = _PART.fullmatch(path.name)
    if split is None:
        return files_digest([path])
    before, after, parts = split.groups()
    return files_digest(path.with_name(f"{before}{i:05d}{after}") for i in range(1, int(parts) + 1))


def folder_digest(folder: Path) -> str:
    """Of a model in Hugging Face format: all files of weights and settings. Raises ModelError."""
    return files_digest(sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file()))


def files_digest(paths: Iterable[Path]) -> str:
    """Of files in this order, whatever they are called. Raises ModelError."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            _add(digest, path)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def _add(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_HEAD))
        rest = size - _HEAD
        if rest <= _BLOCKS * _BLOCK:
            digest.update(file.read())
            return
        for i in range(_BLOCKS):
            file.seek(_HEAD + (rest - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
