"""The tiny vocabulary in Hugging Face's format, made from the GGUF file's metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs of a GGUF file."""
    with path.open("rb") as file:
        _, _, _, pairs = struct.unpack("<4sIQQ", file.read(24))
        return {_string(file): _value(file, _number(file, "I")) for _ in range(pairs)}


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _string(file)
    if kind == 9:
        of, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, of) for _ in range(count)]
    return _number(file, _FORMATS[kind])


def tokenizer_files(
    source: Path, folder: Path, *, pattern: str = "", about: dict[str, Any] | None = None
) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a byte-level GGUF file.

    pattern: how text is cut into words, where it is not GPT-2's way. about: what the file's metadata lack
    """
    about = (about or {}) | metadata(source)
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    added = [
        {"id": i, "content": token, "special": kinds[i] == 3, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for i, token in enumerate(tokens)
        if kinds[i] in (3, 4)  # control tokens, and those that users define; 5 is padding
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": not pattern,
    }
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, byte_level]} if pattern else byte_level
    definition = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens) if kinds[i] == 1},
            "merges": about["tokenizer.ggml.merges"],
        },
    }
    eos = about["tokenizer.ggml.eos_token_id"]
    settings = {
        "bos_token": {"content": tokens[about["tokenizer.ggml.bos_token_id"]]},
        "eos_token": tokens[eos],
        "chat_template": about["tokenizer.chat_template"],
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
