"""Fixtures over the tiny pair of models that ships with the package.

Set WISP_TEST_MODEL to a GGUF file to run these tests on another model (slower).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import wisp.engines
from vllm_rig import close_common, common_engine, folder_of_tiny
from wisp.engines.llama.target import LlamaTarget
from wisp.engines.llama.tokenizer import LlamaTokenizer

DATA = Path(wisp.engines.__file__).parent / "data"


def model(name: str) -> Path:
    path = Path(os.environ.get("WISP_TEST_MODEL") or DATA / name)
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    return path


@pytest.fixture(scope="session")
def tiny_target() -> Path:
    return model("tiny-target.gguf")


@pytest.fixture(scope="session")
def tiny_draft() -> Path:
    return model("tiny-draft.gguf")


@pytest.fixture(scope="module")
def shared_engine(tiny_target: Path) -> Iterator[LlamaTarget]:
    engine = LlamaTarget(tiny_target, name="tiny", slots=4, slot_tokens=256, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: LlamaTarget) -> LlamaTarget:
    """An exact engine of 4 slots of 256 tokens, all empty."""
    shared_engine.clear()
    return shared_engine


@pytest.fixture(scope="session")
def tokenizer(tiny_target: Path) -> Iterator[LlamaTokenizer]:
    tokenizer = LlamaTokenizer.open(tiny_target)
    yield tokenizer
    tokenizer.close()


@pytest.fixture
def engine_of_llama(engine: LlamaTarget) -> LlamaTarget:
    """`engine`, for tests of all engines."""
    return engine


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target as vLLM loads it."""
    return folder_of_tiny(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def close_vllm() -> Iterator[None]:
    yield
    close_common()


@pytest.fixture
def engine_of_vllm(hf_folder: Path, close_vllm: None) -> Any:
    """A VllmTarget of 8 slots of 256 tokens, all empty."""
    engine = common_engine(hf_folder)
    engine.clear()
    return engine
