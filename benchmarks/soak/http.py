"""An OpenAI client of a few lines, since a hundred thousand requests are made by one process: completions over a
connection that is kept, whole or as a stream. It can leave in mid-answer, and read slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import msgspec

from benchmarks.soak.texts import Job
from wisp.core.protocol.messages import VERSION, Hello, Message, encode

SMALL_BUFFER = 4096  # bytes that the system keeps for a reader that is slow or deaf
UPGRADE = (
    "GET /v1/sessions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\nconnection: Upgrade\r\n"
    "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    "sec-websocket-protocol: wisp.v1\r\n\r\n"
)
BINARY, MASKED = 0x82, 0x80


class Said(msgspec.Struct):
    """What came of a request. error: its code, of an answer that is none or ends with one. retry_s: of Retry-After.
    first_s, last_s: when the first and the last piece of text came, since the request was sent. head_s: from the
    beginning of its connection until it was sent, if it is the first there; otherwise 0."""

    status: int = 0
    text: str = ""
    finish: str = ""
    error: str = ""
    about: str = ""
    retry_s: float = 0.0
    head_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    left: bool = False


class Line:
    """A connection to one port of this machine, made when it is needed."""

    def __init__(self, port: int, key: str, *, small: bool = False) -> None:
        self.port = port
        self.key = key
        self._small = small
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._silent_since: float | None = (
            None  # the beginning of a connection over which nothing was sent yet
        )

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError."""
        if self._streams is None:
            self._silent_since = time.monotonic()
            limit = SMALL_BUFFER if self._small else 1 << 16
            self._streams = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
            if self._small:
                sock: socket.socket = self._streams[1].get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        return self._streams

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def complete(
        self,
        job: Job,
        *,
        stream: bool = False,
        leave_after: int | None = None,
        pause_s: float = 0.0,
        headers: str = "",
    ) -> Said:
        """Ask for a completion. Raises OSError or EOFError where the connection ends before the answer does.

        leave_after: hang up after so many pieces of the stream. pause_s: before each read of a piece.
        """
        said = Said()
        try:
            reader, writer = await self.connect()
            began = time.monotonic()
            body = {"prompt": job.prompt, "seed": job.seed, "max_tokens": job.max_tokens, "stream": stream}
            data = msgspec.json.encode(body | {"temperature": job.temperature, "ignore_eos": True})
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.key}\r\n"
                f"content-type: application/json\r\n{headers}content-length: {len(data)}\r\n\r\n".encode()
                + data
            )
            if self._silent_since is not None:
                said.head_s = time.monotonic() - self._silent_since
            self._silent_since = None
            head = await _head(reader, said)
            if said.status != 200 or not stream:
                _take(said, await reader.readexactly(int(head.get("content-length", "0"))))
                said.first_s = said.last_s = time.monotonic() - began
            else:
                async for event in _events(reader, pause_s):
                    before = len(said.text)
                    _take(said, event)
                    if len(said.text) > before:
                        said.last_s = time.monotonic() - began
                        said.first_s = said.first_s or said.last_s
                        leave_after = leave_after - 1 if leave_after else leave_after
                    if leave_after == 0:
                        said.left = True
                        break
            if said.left or head.get("connection") == "close":
                self.close()
        except BaseException:
            self.close()
            raise
        return said


async def _head(reader: asyncio.StreamReader, said: Said) -> dict[str, str]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    head = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    said.status = int(lines[0].split()[1])
    said.retry_s = float(head.get("retry-after", 0))
    return head


async def _events(reader: asyncio.StreamReader, pause_s: float) -> AsyncIterator[bytes]:
    """The data of a stream's events, without the last ([DONE])."""
    pending = b""
    while True:
        if pause_s:
            await asyncio.sleep(pause_s)
        if not (line := await reader.readline()):
            raise EOFError("the stream ended in mid-answer")
        size = int(line, 16)
        pending += (await reader.readexactly(size + 2))[:-2]
        if not size:
            return
        *events, pending = pending.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield event[6:]


def _take(said: Said, data: bytes) -> None:
    """A whole answer, an event of a stream, or an error."""
    try:
        body = msgspec.json.decode(data)
    except msgspec.DecodeError:
        said.error, said.about = "no_json", f"{data[:200]!r}"
        return
    if "error" in body:
        said.error = str(body["error"].get("code") or body["error"].get("type"))
        said.about = str(body["error"].get("message"))
        return
    for choice in body.get("choices", ()):
        said.text += choice["text"]
        said.finish = choice["finish_reason"] or said.finish


async def session_socket(port: int, key: str, *messages: Message) -> Line:
    """A connection that shakes hands like an edge, says these messages, and then never reads again. Raises OSError."""
    line = Line(port, key, small=True)
    reader, writer = await line.connect()
    try:
        writer.write(UPGRADE.format(key=key).encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in answer:
            raise ConnectionError(f"no WebSocket: {answer[:80]!r}")
        for message in (Hello(VERSION, redirects=True), *messages):
            data = encode(message)
            size = bytes([MASKED | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
            writer.write(bytes([BINARY]) + size + bytes(4) + data)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
    except BaseException:
        line.close()
        raise
    return line


async def get(port: int, path: str, key: str = "") -> bytes:
    """The body of an answer, over a connection of its own. Raises OSError or EOFError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        bearer = f"authorization: Bearer {key}\r\n" if key else ""
        writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{bearer}connection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        with contextlib.suppress(OSError):
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0] + b" ":
        raise ConnectionError(f"{path}: {head[:80]!r}")
    return body
