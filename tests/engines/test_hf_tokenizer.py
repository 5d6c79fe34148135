"""A vocabulary in Hugging Face's format is the same one as in a GGUF file: same fingerprint, same ids, same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import wisp.engines
from wisp.core.errors import ModelError
from wisp.engines.huggingface import HfTokenizer, end_ids
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.lab.tiny.vocabulary import hugging_face

TINY = Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf"
TEXTS = (
    "Tell me a story about Belomi.",
    "  two  spaces, a\ttab\nand\r\nlines ",
    "naïve 中文 🙂 \u0000 \u00ff",
    "it's 1234 times we've said: don't",
    "<|user|> is written out here<|end|>",
    "",
)
