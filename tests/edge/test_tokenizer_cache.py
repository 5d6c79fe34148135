"""The target's tokenizer on the edge: fetched once, checked by its fingerprint, never the wrong one."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

import wisp.engines
from wisp.core.errors import RequestError
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.huggingface import HfTokenizer
from wisp.engines.llama.tokenizer import LlamaTokenizer

MODEL = Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf"
NOWHERE = "http://127.0.0.1:1"


class Fetched(TokenizerCache):
    """Counts fetches and answers them with `data`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(NOWHERE)
        self.data = data
        self.fetches = 0

    async def _fetch(self, fingerprint: str) -> bytes:
        self.fetches += 1
        return self.data


@pytest.fixture(scope="module")
def original() -> LlamaTokenizer:
    return LlamaTokenizer.open(MODEL)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return list((folder / "tokenizers").glob("*"))


def test_it_is_fetched_once_and_then_lies_on_disk(original: LlamaTokenizer, folder: Path) -> None:
    async def scenario() -> None:
        first = Fetched(original.blob())
        together = await asyncio.gather(*(first.get(original.fingerprint) for _ in range(5)))
        assert len({id(t) for t in together}) == 1
        assert first.fetches == 1
        later = Fetched(b"")
        tokenizer = await later.get(original.fingerprint)
        assert later.fetches == 0
        text = "Tell me a story, ünï ✨"
        ids = tokenizer.encode(text, add_bos=True, parse_special=False)
        assert ids == original.encode(text, add_bos=True, parse_special=False)
        assert b"".join(tokenizer.piece(t) for t in ids).decode() == text
        assert tokenizer.chat_template == original.chat_template
        assert tokenizer.eos == original.eos

    asyncio.run(scenario())
    assert [f.name for f in files(folder)] == [f"{original.fingerprint}.gguf"]


def test_another_tokenizer_than_the_one_asked_for_is_not_used_and_not_kept(
    original: LlamaTokenizer, folder: Path
) -> None:
    with pytest.raises(RequestError, match="not the one asked for") as error:
        asyncio.run(Fetched(original.blob()).get("0" * 64))
    assert (error.value.status, error.value.code) == (502, "tokenizer_unavailable")
    assert files(folder) == []


def test_a_damaged_file_is_replaced(original: LlamaTokenizer, folder: Path) -> None:
    for damaged in (b"", b"GGUF", original.blob()[:2000]):
        with pytest.raises(RequestError):
            asyncio.run(Fetched(damaged).get(original.fingerprint))
        assert files(folder) == []
    path = folder / "tokenizers" / f"{original.fingerprint}.gguf"
    path.write_bytes(original.blob()[:2000])  # as a full disk leaves it
    cache = Fetched(original.blob())
    with pytest.raises(RequestError):
        asyncio.run(cache.get(original.fingerprint))
    tokenizer = asyncio.run(cache.get(original.fingerprint))
    assert tokenizer.fingerprint == original.fingerprint


def test_a_verifier_that_does_not_answer_is_named() -> None:
    with pytest.raises(RequestError, match=NOWHERE) as error:
        asyncio.run(TokenizerCache(NOWHERE).get("1" * 64))
    assert (error.value.status, error.value.code) == (502, "tokenizer_unavailable")


def test_a_tokenizer_in_hugging_faces_format_will_do_as_well(original: LlamaTokenizer, folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "engines"))
    from hf_files import tokenizer_files

    (folder / "model").mkdir()
    tokenizer_files(MODEL, folder / "model")
    theirs = HfTokenizer.open(folder / "model", original.n_vocab)
    assert theirs.fingerprint == original.fingerprint

    async def scenario() -> None:
        await Fetched(theirs.blob()).get(theirs.fingerprint)
        later = Fetched(b"")
        tokenizer = await later.get(theirs.fingerprint)
        assert later.fetches == 0
        text = "Tell me a story, ünï ✨"
        ids = tokenizer.encode(text, add_bos=True, parse_special=False)
        assert ids == original.encode(text, add_bos=True, parse_special=False)

    asyncio.run(scenario())
    assert [f.name for f in files(folder)] == [f"{original.fingerprint}.json"]
    with pytest.raises(RequestError, match="not the one asked for"):
        asyncio.run(Fetched(theirs.blob()).get("0" * 64))
