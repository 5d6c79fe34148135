"""The target's tokenizer on the edge: fetched once from the verifier, cached by fingerprint, checked by it.

So an edge needs no model to read and write text, and never mixes up two vocabularies.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from pathlib import Path

import httpx

from wisp.core.errors import ModelError, RequestError, WispError
from wisp.edge.link import http_url, is_local
from wisp.engines.base import Tokenizer
from wisp.engines.build import open_tokenizer
from wisp.engines.models import cache_dir

# No proxy from the environment on the way to this machine; certificates from there still count.
_DIRECT: dict[str, httpx.AsyncBaseTransport | None] = {"http://": None, "https://": None, "all://": None}
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
TOKENIZER_PATH = "/v1/tokenizers"


class TokenizerCache:
    """Tokenizers by fingerprint: in memory, on disk, or from the verifier at `server`."""

    def __init__(self, server: str, api_key: str | None = None) -> None:
        self.server = server
        self.api_key = api_key
        self._loaded: dict[str, Tokenizer] = {}
        self._lock = asyncio.Lock()

    async def get(self, fingerprint: str) -> Tokenizer:
        """The tokenizer whose vocabulary has this fingerprint. Raises RequestError if it cannot be had."""
        if not _FINGERPRINT.fullmatch(fingerprint):  # it becomes a file's name
            message = "the verifier's vocabulary fingerprint is not a SHA-256; update the verifier"
            raise RequestError(502, message, code="tokenizer_unavailable", type="server_error")
        async with self._lock:
            if fingerprint not in self._loaded:
                path = await self._file(fingerprint)
                try:
                    self._loaded[fingerprint] = await asyncio.to_thread(_load, path, fingerprint)
                except WispError as error:
                    raise _unavailable(f"the target's tokenizer is of no use: {error}") from None
            return self._loaded[fingerprint]

    async def _file(self, fingerprint: str) -> Path:
        """Where it is on disk, after fetching it if need be."""
        paths = [cache_dir() / "tokenizers" / f"{fingerprint}{ending}" for ending in (".gguf", ".json")]
        for path in paths:
            if path.exists():
                return path
        data = await self._fetch(fingerprint)
        path = paths[0 if data.startswith(b"GGUF") else 1]
        _write(path, data)
        return path

    async def _fetch(self, fingerprint: str) -> bytes:
        url = http_url(self.server, f"{TOKENIZER_PATH}/{fingerprint}")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            async with httpx.AsyncClient(timeout=60.0, mounts=_DIRECT if is_local(url) else None) as client:
                response = await client.get(url, headers=headers)
                response.raise_for_status()
                return response.content
        except httpx.HTTPError as error:
            raise _unavailable(f"cannot fetch the target's tokenizer from {url}: {error}") from None


def _unavailable(message: str) -> RequestError:
    return RequestError(502, message, code="tokenizer_unavailable", type="server_error")


def _load(path: Path, fingerprint: str) -> Tokenizer:
    tokenizer: Tokenizer
    try:
        tokenizer = open_tokenizer(path)
    except ModelError:
        path.unlink(missing_ok=True)
        raise
    if tokenizer.fingerprint != fingerprint:
        path.unlink(missing_ok=True)
        raise ModelError(f"the tokenizer in {path} is not the one asked for; it was deleted, try again")
    return tokenizer


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(name, path)
