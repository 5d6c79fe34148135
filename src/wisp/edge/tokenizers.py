"""The target's tokenizer on the edge: fetched once from the verifier, cached by fingerprint, checked by it.

So an edge needs no model to read and write text, and never mixes up two vocabularies. The files only save time: if
they cannot be written, each start fetches the tokenizer again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx

from wisp.api.paths import TOKENIZER_PATH
from wisp.core.errors import ConfigError, ModelError, RequestError, WispError
from wisp.edge.address import http_url, is_local
from wisp.edge.answers import error_in, reason, stranger
from wisp.engines.base import Tokenizer
from wisp.engines.build import read_tokenizer
from wisp.engines.models import cache_dir

log = logging.getLogger("wisp.edge")

# No proxy from the environment on the way to this machine; certificates from there still count.
_DIRECT: dict[str, httpx.AsyncBaseTransport | None] = {"http://": None, "https://": None, "all://": None}
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_GGUF, _JSON = b"GGUF", b"{"  # the first bytes of a tokenizer from a verifier
MOST_BYTES = 128 << 20  # of a tokenizer: several times the largest there are
AGAIN_S = 1.0  # after a failure that may be over by then


class TokenizerCache:
    """Tokenizers by fingerprint: in memory, on disk, or from the verifier at `server`."""

    def __init__(self, server: str, api_key: str | None = None) -> None:
        self.server = server
        self.api_key = api_key
        self._loaded: dict[str, Tokenizer] = {}
        self._lock = asyncio.Lock()
        self._warned = False

    async def get(self, fingerprint: str) -> Tokenizer:
        """The tokenizer of the vocabulary with this fingerprint. Raises RequestError if it cannot be had; with
        `retry_after` if that may be different soon."""
        if not _FINGERPRINT.fullmatch(fingerprint):  # it becomes a file's name
            raise _unavailable("the verifier's vocabulary fingerprint is not a SHA-256; update the verifier")
        async with self._lock:
            if fingerprint not in self._loaded:
                kept = await asyncio.to_thread(self._from_disk, fingerprint)
                self._loaded[fingerprint] = kept or await self._from_verifier(fingerprint)
            return self._loaded[fingerprint]

    async def _from_verifier(self, fingerprint: str) -> Tokenizer:
        blob = await self._fetch(fingerprint)
        try:
            tokenizer = await asyncio.to_thread(_read, blob, fingerprint)
        except (WispError, OSError) as error:
            raise _unavailable(f"the target's tokenizer is of no use: {error}") from None
        await asyncio.to_thread(self._keep, fingerprint, blob)
        return tokenizer

    def _from_disk(self, fingerprint: str) -> Tokenizer | None:
        """The tokenizer that an earlier start kept; None if there is none, or if it is damaged."""
        with contextlib.suppress(OSError, ConfigError):
            for path in _files(fingerprint):
                if not path.is_file():
                    continue
                try:
                    return _read(path.read_bytes(), fingerprint)
                except ModelError as error:
                    log.warning("%s is damaged and fetched again: %s", path, error)
        return None

    def _keep(self, fingerprint: str, blob: bytes) -> None:
        """Write it for the next start. A full or read-only disk costs that start a moment, no more."""
        try:
            gguf, json = _files(fingerprint)
            _write(gguf if blob.startswith(_GGUF) else json, blob)
        except (OSError, ConfigError) as error:
            if not self._warned:
                message = "cannot keep the target's tokenizer (%s): it is fetched anew at each start. %s"
                log.warning(message, error, "Set WISP_CACHE to a folder that can be written to")
            self._warned = True

    async def _fetch(self, fingerprint: str) -> bytes:
        url = http_url(self.server, f"{TOKENIZER_PATH}/{fingerprint}")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            async with (
                httpx.AsyncClient(timeout=60.0, mounts=_DIRECT if is_local(url) else None) as client,
                client.stream("GET", url, headers=headers) as response,
            ):
                blob = await _content(response)
        except Exception as error:  # a wrong proxy in the environment raises errors of many kinds
            why = f"cannot fetch the target's tokenizer from {url}: {reason(error, url)}"
            raise _unavailable(why, again=isinstance(error, httpx.TransportError)) from None
        if not response.is_success or not blob.startswith((_GGUF, _JSON)):
            status, own = response.status_code, error_in(blob)
            why = own.message if own else stranger(status, response.headers.get("location"))
            # 404: a verifier of another vocabulary, which has taken the place of ours
            again = status == 404 or status >= 500
            raise _unavailable(f"cannot fetch the target's tokenizer from {url}: {why}", again=again)
        return blob


async def _content(response: httpx.Response) -> bytes:
    """The answer's body. Raises ModelError for one that has no end: a small one can be unpacked to a very large one."""
    blob = bytearray()
    async for chunk in response.aiter_bytes():
        blob += chunk
        if len(blob) > MOST_BYTES:
            raise ModelError(f"it has more than {MOST_BYTES} bytes")
    return bytes(blob)


def _unavailable(message: str, *, again: bool = False) -> RequestError:
    retry_after = AGAIN_S if again else None
    return RequestError(
        502, message, code="tokenizer_unavailable", type="server_error", retry_after=retry_after
    )


def _read(blob: bytes, fingerprint: str) -> Tokenizer:
    """Raises ModelError or ConfigError."""
    tokenizer = read_tokenizer(blob)
    if tokenizer.fingerprint != fingerprint:
        raise ModelError(f"it is not the one asked for, but that of vocabulary {tokenizer.fingerprint[:12]}")
    return tokenizer


def _files(fingerprint: str) -> Iterator[Path]:
    """Paths of its file, in either format. Raises ConfigError."""
    folder = cache_dir() / "tokenizers"
    return (folder / f"{fingerprint}{ending}" for ending in (".gguf", ".json"))


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and as readable for others as the umask says: caches are shared. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with fresh.open("xb") as file:
            file.write(data)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
