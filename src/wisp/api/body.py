"""Reading a JSON body: of bounded size, of the right type, and an object."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from wisp.core.errors import RequestError

MAX_BODY_BYTES = 8 << 20


async def read_json(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises RequestError 400, 413 or 415."""
    _check_media_type(request)
    try:
        body = msgspec.json.decode(await _read(request))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # The decoder's message gives a byte offset and never the text
        raise RequestError(400, f"The body is not valid JSON: {exc}", code="invalid_json") from exc
    if not isinstance(body, dict):
        raise RequestError(400, "The body must be a JSON object.", code="invalid_json")
    return body


def _check_media_type(request: Request) -> None:
    """A page in the user's browser can send anything but JSON to a local port without being allowed to."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = "Send the body as JSON, with the header `content-type: application/json`."
        raise RequestError(415, message, code="unsupported_media_type")


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large() -> RequestError:
    message = f"The body is larger than {MAX_BODY_BYTES} bytes."
    return RequestError(413, message, code="request_too_large")
