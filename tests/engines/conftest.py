"""The fixtures of `engine_fixtures`. A checker of types takes each name of a file but once, and `conftest` is taken."""

from __future__ import annotations

from engine_fixtures import (
    close_vllm,
    engine,
    engine_of_llama,
    engine_of_vllm,
    hf_folder,
    shared_engine,
    tiny_draft,
    tiny_target,
    tokenizer,
)

__all__ = [
    "close_vllm",
    "engine",
    "engine_of_llama",
    "engine_of_vllm",
    "hf_folder",
    "shared_engine",
    "tiny_draft",
    "tiny_target",
    "tokenizer",
]
