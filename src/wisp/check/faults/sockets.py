"""The ends of connections, as the product's own code expects them: an ASGI application's channels on the server's side,
and stand-ins for `websockets` and `httpx` on the client's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.frames import Close
from websockets.http11 import Response

from wisp.api.paths import SESSION_PATH
from wisp.check.faults.lines import LOST, NORMAL, Line
from wisp.check.faults.loop import Life, VirtualLoop

if TYPE_CHECKING:
    from wisp.check.faults.network import Network

App = Callable[
    [dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]
Http = Callable[
    [str, str, str], Awaitable[tuple[int, bytes]]
]  # (method, path, authorization) -> (status, body)
Refused = tuple[int, dict[str, str], bytes]  # status, headers and body of an HTTP answer


class Listener:
    """A port that a process listens on: an ASGI application for session sockets, and a few paths of HTTP."""

    def __init__(self, life: Life, app: App, http: Http) -> None:
        self.life, self.app, self.http = life, app, http


def serve(
    loop: VirtualLoop,
    line: Line,
    listener: Listener,
    headers: list[tuple[str, str]],
    answer: asyncio.Future[Refused | None],
) -> asyncio.Task[None]:
    """Run the application for a connection, in the server's life."""
    end = line.server
    connected = False
    status: dict[str, Any] = {}
    scope = {
        "type": "websocket",
        "path": SESSION_PATH,
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
        "extensions": {"websocket.http.response": {}},
    }

    def tell(found: Refused | None) -> None:
        if not answer.done():
            answer.set_result(found)

    async def receive() -> dict[str, Any]:
        nonlocal connected
        if not connected:
            connected = True
            return {"type": "websocket.connect"}
        frame = await end.next()
        if frame is None:
            assert end.closed is not None
            return {"type": "websocket.disconnect", "code": end.closed.code}
        return {"type": "websocket.receive", "bytes": frame}

    async def send(message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            line.down.carry(lambda: tell(None))
        elif kind == "websocket.http.response.start":
            status.update(message)
        elif kind == "websocket.http.response.body":
            found = {k.decode(): v.decode() for k, v in status["headers"]}
            line.down.carry(lambda: tell((status["status"], found, message["body"])))
        elif kind == "websocket.close":
            line.close(end, Close(message.get("code", 1000), message.get("reason", "")))
        elif end.closed is None:
            while line.down.stalls and end.closed is None and line.down.held > 64:
                await asyncio.sleep(1.0)  # the peer's window is full
            frame = message["bytes"]
            line.down.carry(lambda: line.client.feed(frame))

    async def work() -> None:
        try:
            old = line.net.old_server if loop.now < line.net.outdated else None
            await (old or listener.app)(scope, receive, send)
        finally:
            if end.life.alive:
                line.close(end, NORMAL)

    return loop.create_task(work())


class VirtualSocket:
    """The client's end, as `websockets` has it."""

    def __init__(self, line: Line) -> None:
        self._line = line

    async def send(self, frame: bytes) -> None:
        line = self._line
        if line.client.closed is not None:
            raise self._error()
        while line.up.stalls and line.client.closed is None and line.up.held > 64:
            await asyncio.sleep(1.0)
        line.up.carry(lambda: line.server.feed(frame))

    async def recv(self, *, decode: bool = False) -> bytes:
        frame = await self._line.client.next()
        if frame is None:
            raise self._error()
        return frame

    def _error(self) -> ConnectionClosedError:
        closed = self._line.client.closed
        return ConnectionClosedError(None if closed is LOST else closed, None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        end = self._line.client
        while (frame := await end.next()) is not None:
            yield frame
        if end.closed is None or end.closed.code not in (1000, 1001):
            raise self._error()


class VirtualConnect:
    """In place of `websockets.connect`, as the edge uses it: `async with VirtualConnect(url, ...) as socket`."""

    net: Network

    def __init__(
        self, url: str, *, additional_headers: dict[str, str], open_timeout: float, **rest: object
    ) -> None:
        self._address = urlsplit(url).netloc
        self._headers = additional_headers
        self._timeout = open_timeout
        self._line: Line | None = None

    async def __aenter__(self) -> VirtualSocket:
        async with asyncio.timeout(self._timeout):
            found = await self.net.open(self._address, self._headers)
        if not isinstance(found, Line):
            status, headers, body = found
            raise InvalidStatus(Response(status, "", Headers(headers), body))
        self._line = found
        return VirtualSocket(found)

    async def __aexit__(self, *exc: object) -> None:
        if self._line is not None:
            self._line.close(self._line.client, NORMAL)


class VirtualClient:
    """In place of `httpx.AsyncClient`, as the router uses it."""

    net: Network

    def __init__(self, *, timeout: float, **rest: object) -> None:
        self._timeout = timeout

    async def get(self, url: str, headers: dict[str, str], timeout: float | None = None) -> VirtualResponse:
        return await self._ask("GET", url, headers, timeout)

    async def post(self, url: str, headers: dict[str, str], timeout: float | None = None) -> VirtualResponse:
        return await self._ask("POST", url, headers, timeout)

    async def _ask(
        self, method: str, url: str, headers: dict[str, str], timeout: float | None
    ) -> VirtualResponse:
        status, body = await self.net.request(method, url, headers["Authorization"], timeout or self._timeout)
        return VirtualResponse(status, body)

    async def aclose(self) -> None:
        """Nothing is open."""


class VirtualResponse(httpx.Response):
    """An answer that has been read."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, content=body)
