"""Reading a JSON body: of bounded size, of the right type, and an object.

Decoding and checking a large one may take seconds of CPU. That happens in a thread, so that the event loop goes on,
and one after the other: more threads would only take the interpreter away from the loop more often. Of one key a single
body waits for that thread, so a key that sends many delays another's by one at most.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec
from starlette.requests import Request

from wisp.core.errors import RequestError

T = TypeVar("T")

SMALL_BODY_BYTES = 64 << 10  # decoded on the event loop: a few milliseconds at most
LEAST_LIMIT_BYTES = 1 << 20  # tools, and the structure around the text, take room in any context
BYTES_PER_TOKEN = 64  # four of text, times six where JSON escapes them, and some for runs of spaces
UNKNOWN_LIMIT_BYTES = 8 << 20  # while the context is not known

MOST_HELD = 64 << 20  # bytes of one key's bodies, from their arrival until there is a prompt; or one body

_ANY_HEADER = 47  # zlib's wbits for gzip or zlib, whichever it is

_reader = ThreadPoolExecutor(1, thread_name_prefix="body")
_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by key


def body_limit(context: int) -> int:
    """Most bytes of a body for a model with a context of so many tokens (0: not known)."""
    return LEAST_LIMIT_BYTES + context * BYTES_PER_TOKEN if context else UNKNOWN_LIMIT_BYTES


class Bodies:
    """What is held of bodies, by key: so many bytes, so that no key fills the memory with requests that wait."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    def of(self, key: str) -> HeldBody:
        """For one request of a key."""
        return HeldBody(self._held, key)


class HeldBody:
    """The bytes that one request holds, until `release` or the end of the context."""

    def __init__(self, held: Counter[str], key: str) -> None:
        self._all, self._key = held, key
        self._size = 0

    def __enter__(self) -> HeldBody:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def add(self, size: int, limit: int) -> None:
        """More has come of a body that may have `limit` bytes. Raises RequestError 429."""
        if self._all[self._key] + size > max(MOST_HELD, limit):
            message = (
                "Requests of this key hold too much memory before they are answered; send fewer at a time."
            )
            raise RequestError(429, message, code="overloaded", type="server_error", retry_after=1.0)
        self._all[self._key] += size
        self._size += size

    def release(self) -> None:
        """It is not needed any more."""
        self._all[self._key] -= self._size
        self._size = 0
        if not self._all[self._key]:
            del self._all[self._key]


async def read_body(request: Request, limit: int, held: HeldBody) -> bytes:
    """The body, if it claims to be JSON and has at most `limit` bytes. Raises RequestError 413, 415 or 429."""
    _check_media_type(request)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    decoder = _decoder(request)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        if decoder is not None:
            chunk = _inflated(decoder, chunk, limit + 1 - size)
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        held.add(len(chunk), limit)
        chunks.append(chunk)
    if decoder is not None and (not decoder.eof or decoder.unused_data):
        raise _not_encoded()
    return b"".join(chunks)


def _decoder(request: Request) -> zlib._Decompress | None:
    """For a body that is compressed. Raises RequestError 415 for what nobody can read here."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        message = f"The content-encoding {encoding[:40]!r} is not known here; send gzip, deflate or none."
        raise RequestError(415, message, code="unsupported_media_type")
    return zlib.decompressobj(_ANY_HEADER)


def _inflated(decoder: zlib._Decompress, chunk: bytes, most: int) -> bytes:
    """What comes out of it, `most` bytes of that: a small body can stand for a very large one."""
    try:
        return decoder.decompress(chunk, most)
    except zlib.error:
        raise _not_encoded() from None


def _not_encoded() -> RequestError:
    return RequestError(400, "The body is not what its content-encoding says.", code="invalid_encoding")


async def parsed(body: bytes, parse: Callable[[dict[str, Any]], T], key: str = "") -> T:
    """What `parse` makes of the JSON object in the `body` that `key` sent. Raises RequestError 400, and what `parse`
    raises."""
    if len(body) <= SMALL_BODY_BYTES:
        return parse(_decode(body))
    turn = _turns.setdefault(key, asyncio.Lock())
    async with turn:
        return await asyncio.get_running_loop().run_in_executor(_reader, lambda: parse(_decode(body)))


async def read_json(request: Request) -> dict[str, Any]:
    """The request's JSON object, a small one. Raises RequestError 400, 413 or 415."""
    with Bodies().of("") as held:
        return _decode(await read_body(request, SMALL_BODY_BYTES, held))


def _decode(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # The decoder's message gives a byte offset and never the text
        raise RequestError(400, f"The body is not valid JSON: {exc}", code="invalid_json") from exc
    if not isinstance(value, dict):
        raise RequestError(400, "The body must be a JSON object.", code="invalid_json")
    return value


def _check_media_type(request: Request) -> None:
    """A page in the user's browser can send anything but JSON to a local port without being allowed to."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = "Send the body as JSON, with the header `content-type: application/json`."
        raise RequestError(415, message, code="unsupported_media_type")


def _too_large(limit: int) -> RequestError:
    message = f"The body is larger than {limit} bytes, more than this server's model has context for."
    return RequestError(413, message, code="request_too_large")
