"""The target's tokenizer on the edge: fetched once, checked by its fingerprint, never the wrong one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import os
import pwd
from pathlib import Path

import pytest

import wisp.engines
from hf_files import tokenizer_files
from wisp.core.errors import RequestError
from wisp.edge import tokenizers as module
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


def test_a_damaged_answer_is_not_kept(original: LlamaTokenizer, folder: Path) -> None:
    for damaged in (b"", b"GGUF", original.blob()[:2000]):
        with pytest.raises(RequestError) as error:
            asyncio.run(Fetched(damaged).get(original.fingerprint))
        assert error.value.retry_after is None  # it would be the same again
        assert files(folder) == []


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"{}", b"<html>", None])
def test_a_damaged_file_is_fetched_again(
    damage: bytes | None, original: LlamaTokenizer, folder: Path
) -> None:
    path = folder / "tokenizers" / f"{original.fingerprint}.gguf"
    path.parent.mkdir()
    path.write_bytes(original.blob()[:2000] if damage is None else damage)  # as a full disk leaves it
    cache = Fetched(original.blob())
    tokenizer = asyncio.run(cache.get(original.fingerprint))
    assert tokenizer.fingerprint == original.fingerprint
    assert cache.fetches == 1
    assert path.read_bytes() == original.blob()


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("trouble", ["below a file", "full", "no home", "no such user"])
def test_a_cache_that_takes_nothing_costs_a_warning_and_no_answer(
    trouble: str,
    original: LlamaTokenizer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if trouble == "below a file":
        (folder / "file").write_text("")
        monkeypatch.setenv("WISP_CACHE", str(folder / "file"))
    elif trouble == "full":
        monkeypatch.setattr(os, "replace", full)
    elif trouble == "no such user":
        monkeypatch.setenv("WISP_CACHE", "~nobody-of-this-name/cache")
    else:
        for name in ("WISP_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)

    async def scenario() -> None:
        cache = Fetched(original.blob())
        first = await cache.get(original.fingerprint)
        assert first.fingerprint == original.fingerprint
        assert await cache.get(original.fingerprint) is first
        assert cache.fetches == 1

    asyncio.run(scenario())
    (record,) = caplog.records
    assert "WISP_CACHE" in record.getMessage()
    assert files(folder) == []


def test_others_may_read_what_lies_in_a_shared_cache(original: LlamaTokenizer, folder: Path) -> None:
    before = os.umask(0o022)
    try:
        asyncio.run(Fetched(original.blob()).get(original.fingerprint))
    finally:
        os.umask(before)
    (file,) = files(folder)
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("status", "body", "why", "again"),
    [
        ("200 OK", b"<html>Sign in to this network</html>", "HTTP 200, and not from a WISP verifier", False),
        ("403 Forbidden", b"<html>No</html>", "HTTP 403, and not from a WISP verifier", False),
        ("302 Found\r\nlocation: http://portal.example/", b"", "redirected to http://portal.example/", False),
        ("404 Not Found", b'{"error": {"message": "another vocabulary"}}', "another vocabulary", True),
        ("404 Not Found", b'{"error": "nothing"}', "no WISP at this path", True),
        ("503 Unavailable", b'{"error": {"message": "shutting down"}}', "shutting down", True),
    ],
    ids=["sign-in page", "proxy", "redirect", "paper", "another server", "its end"],
)
def test_an_answer_that_is_no_tokenizer_is_told_for_what_it_is(
    status: str, body: bytes, why: str, again: bool, folder: Path
) -> None:
    """And whether another attempt may help: a verifier may just be taking this one's place."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    async def scenario() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(RequestError, match=why) as error:
                await TokenizerCache(url).get("1" * 64)
            assert (error.value.status, error.value.code) == (502, "tokenizer_unavailable")
            assert (error.value.retry_after is not None) == again

    asyncio.run(scenario())
    assert files(folder) == []


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "nonsense://x", "http://127.0.0.1:99999"])
def test_a_proxy_that_cannot_be_used_is_named(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(RequestError, match=r"all_proxy.*NO_PROXY=verifier.invalid"):
        asyncio.run(TokenizerCache("http://verifier.invalid").get("1" * 64))


def test_a_verifier_that_does_not_answer_is_named() -> None:
    with pytest.raises(RequestError, match=NOWHERE) as error:
        asyncio.run(TokenizerCache(NOWHERE).get("1" * 64))
    assert (error.value.status, error.value.code) == (502, "tokenizer_unavailable")
    assert error.value.retry_after


def test_a_tokenizer_in_hugging_faces_format_will_do_as_well(original: LlamaTokenizer, folder: Path) -> None:
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


def test_an_answer_without_an_end_is_not_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few packed kilobytes can stand for gigabytes."""
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    packed = gzip.compress(b"GGUF" + bytes(64 << 20))
    taken = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
        writer.write(head + packed)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        taken += 1
        writer.close()

    async def scenario() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(RequestError, match=f"more than {1 << 20} bytes") as refused:
                await TokenizerCache(f"http://127.0.0.1:{port}").get("a" * 64)
            assert (refused.value.status, refused.value.retry_after) == (502, None)

    asyncio.run(scenario())
    assert taken == 1
