"""The network between processes: connections with delays, that stall, break, and are noticed late.

A connection (`Line`) carries frames in order, both ways. Frames of different connections overtake each other. What can
happen to one is what happens to TCP and what runs over it:

    cut      what is in flight is lost, mid-frame too; each end notices when it does, or only by a ping
    drain    one end is gone; what it sent before is still delivered
    stall    nothing arrives until it heals: a black hole, in one direction or both

A frame is the real bytes of a message. A frame that was cut never arrives, as no WebSocket delivers half of one.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.frames import Close
from websockets.http11 import Response

from wisp.check.faults.loop import Life, VirtualLoop, present_life

PING_S, PONG_S = 10.0, 20.0  # between pings of either end, and the longest wait for the answer
NORMAL = Close(1000, "")
LOST = Close(1006, "")  # no close frame came

App = Callable[
    [dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]
Http = Callable[
    [str, str, str], Awaitable[tuple[int, bytes]]
]  # (method, path, authorization) -> (status, body)


class Listener:
    """A port that a process listens on: an ASGI application for session sockets, and a few paths of HTTP."""

    def __init__(self, life: Life, app: App, http: Http) -> None:
        self.life, self.app, self.http = life, app, http


class End:
    """One end of a connection. `closed`: why nothing more comes."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.inbox: deque[bytes] = deque()
        self.closed: Close | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.unanswered: float | None = None  # when the ping was sent that has no answer yet

    def feed(self, frame: bytes) -> None:
        if self.closed is None:
            self.inbox.append(frame)
            self._wake()

    def close(self, why: Close) -> None:
        if self.closed is None:
            self.closed = why
            self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
        self.waiter = None

    async def next(self) -> bytes | None:
        """The next frame; None once the connection is over."""
        while not self.inbox:
            if self.closed is not None:
                return None
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.inbox.popleft()


class Way:
    """One direction of a connection."""

    def __init__(self, net: Network, rng: random.Random, to: End) -> None:
        self.net, self.rng, self.to = net, rng, to
        self.free = 0.0  # when the last frame arrives
        self.stalls = 0
        self.under_way: deque[Callable[[], object]] = deque()
        self.held = 0  # frames that came while it stalled
        self.cut = False

    def carry(self, what: Callable[[], object]) -> None:
        """Have the other end do `what`, in its turn."""
        if self.cut:
            return
        now = self.net.loop.now
        self.free = max(self.free, now + self.net.delay(self.rng))
        self.under_way.append(what)
        self.net.loop.run_in(self.to.life, self._arrive, after_s=self.free - now)

    def _arrive(self) -> None:
        """Something has come: the first that is under way, also where the receiver was frozen while a stall healed."""
        if self.cut:
            return
        if self.stalls:
            self.held += 1
        else:
            self.under_way.popleft()()

    def stall(self) -> None:
        self.stalls += 1

    def heal(self) -> None:
        self.stalls -= 1
        if not self.stalls:
            held, self.held = self.held, 0
            for _ in range(held):
                self.net.loop.run_in(self.to.life, self._arrive)


class Line:
    """A connection between a client and a server."""

    def __init__(self, net: Network, name: str, client: End, server: End, address: str) -> None:
        self.net, self.name, self.address = net, name, address
        self.client, self.server = client, server
        self.up = Way(net, net.chance(f"up {name}"), server)
        self.down = Way(net, net.chance(f"down {name}"), client)
        self.over = False
        for end, out, back in ((client, self.up, self.down), (server, self.down, self.up)):
            net.loop.run_in(end.life, self._ping, end, out, back, after_s=PING_S)

    def cut(self, client_s: float | None, server_s: float | None) -> None:
        """It breaks. Each end notices after so many seconds, or by a ping (None)."""
        self.up.cut = self.down.cut = True
        for end, after_s in ((self.client, client_s), (self.server, server_s)):
            if after_s is not None:
                self.net.loop.run_in(end.life, end.close, LOST, after_s=after_s)

    def drain(self, gone: End, why: Close = LOST) -> None:
        """One end is gone: the other hears what was sent before, and then that."""
        out, back, other = (
            (self.up, self.down, self.server) if gone is self.client else (self.down, self.up, self.client)
        )
        out.carry(lambda: self._closed(other, why))
        back.cut = True

    def _closed(self, end: End, why: Close) -> None:
        end.close(why)
        self.up.cut = self.down.cut = True

    def close(self, end: End, why: Close) -> None:
        """One end closes it, in order."""
        if end.closed is None:
            end.close(why)
            self.drain(end, why)
        self.net.forget(self)

    def _ping(self, end: End, out: Way, back: Way) -> None:
        if end.closed is not None:
            return
        now = self.net.loop.now
        if end.unanswered is not None and now >= end.unanswered + PONG_S:
            end.close(LOST)
            self.drain(end)
            return
        if end.unanswered is None:
            end.unanswered = now
        other = self.server if end is self.client else self.client
        out.carry(lambda: back.carry(lambda: self._pong(end)) if other.closed is None else None)
        self.net.loop.run_in(end.life, self._ping, end, out, back, after_s=PING_S)

    def _pong(self, end: End) -> None:
        end.unanswered = None


class Network:
    """All connections. `delay` makes the seconds that a frame takes."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop = loop
        self.seed = seed
        self.listeners: dict[str, Listener] = {}
        self.lines: dict[str, Line] = {}
        self.silent: set[frozenset[str]] = set()  # pairs of hosts between which nothing passes
        self.slow = 1.0
        self.balanced: dict[str, list[str]] = {}  # addresses that each stand for several
        self.proxied = 0.0  # until then, something else answers new connections
        self.outdated = 0.0  # until then, it is a server of the release before
        self.old_server: App | None = None
        self._made = 0
        self._rng = self.chance("requests")

    def chance(self, name: str) -> random.Random:
        """A source of its own for each thing, so that one has no influence on another's."""
        return random.Random(f"{self.seed} {name}")

    def delay(self, rng: random.Random) -> float:
        """Mostly milliseconds, now and then a tenth of a second."""
        return (0.0005 + rng.expovariate(1.0) * (0.05 if rng.random() < 0.05 else 0.003)) * self.slow

    def parted(self, a: str, b: str) -> bool:
        return frozenset((a, b)) in self.silent

    def forget(self, line: Line) -> None:
        line.over = True
        self.lines.pop(line.name, None)

    def live(self) -> list[Line]:
        """Connections that at least one end believes in."""
        over = [x for x in self.lines.values() if x.client.closed and x.server.closed]
        for line in over:
            self.forget(line)
        return list(self.lines.values())

    def part(self, a: str, b: str) -> None:
        """Nothing passes between two hosts any more."""
        pair = frozenset((a, b))
        if pair not in self.silent:
            self.silent.add(pair)
            for line in self._between(pair):
                line.up.stall()
                line.down.stall()

    def join(self, a: str, b: str) -> None:
        """It passes again."""
        pair = frozenset((a, b))
        if pair in self.silent:
            self.silent.discard(pair)
            for line in self._between(pair):
                line.up.heal()
                line.down.heal()

    def _between(self, pair: frozenset[str]) -> list[Line]:
        return [x for x in self.live() if frozenset((x.client.life.name, x.server.life.name)) == pair]

    def died(self, life: Life, *, silently: bool) -> None:
        """A process is gone. Its system says so to its peers, unless the machine is gone, too."""
        for address, listener in list(self.listeners.items()):
            if listener.life is life:
                del self.listeners[address]
        for line in self.live():
            for end in (line.client, line.server):
                if end.life is life and end.closed is None:
                    end.closed = LOST
                    if silently:
                        line.up.cut = line.down.cut = True
                    else:
                        line.drain(end)

    # --- opening connections

    async def _reach(self, me: Life, address: str) -> Listener:
        """The process at that address. Raises what a socket would; hangs where nothing comes back."""
        await asyncio.sleep(2 * self.delay(self._rng))
        if address in self.balanced:
            behind = self.balanced[address]
            address = self._rng.choice([a for a in behind if a in self.listeners] or behind)
        listener = self.listeners.get(address)
        host = listener.life.name if listener is not None else address
        if self.parted(me.name, host):
            await asyncio.sleep(1e9)
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens at {address}")
        return listener

    async def open(self, address: str, headers: dict[str, str]) -> Line | tuple[int, dict[str, str], bytes]:
        """A session socket, or the HTTP answer that refuses it."""
        self._made += 1
        name = f"c{self._made}"
        me = present_life()
        listener = await self._reach(me, address)
        if self.loop.now < self.proxied:
            return 502, {}, b"a proxy"
        client, server = End(me), End(listener.life)
        line = Line(self, name, client, server, address)
        self.lines[name] = line
        if self.parted(me.name, listener.life.name):
            line.up.stall()
            line.down.stall()
        answer: asyncio.Future[tuple[int, dict[str, str], bytes] | None] = self.loop.create_future()
        request = list(headers.items())
        line.up.carry(lambda: _serve(self.loop, line, listener, request, answer))
        try:
            refused = await answer
        except BaseException:
            line.close(client, LOST)
            raise
        if refused is not None:
            self.forget(line)
            client.close(NORMAL)
            server.close(NORMAL)
            return refused
        return line

    async def request(self, method: str, url: str, authorization: str, timeout_s: float) -> tuple[int, bytes]:
        """An HTTP request and its answer. Raises httpx.HTTPError."""
        parts = urlsplit(url)
        me = present_life()
        try:
            async with asyncio.timeout(timeout_s):
                listener = await self._reach(me, parts.netloc)
                answer: asyncio.Future[tuple[int, bytes]] = self.loop.create_future()
                self.loop.run_in(
                    listener.life, self._answer, listener, method, parts.path, authorization, me, answer
                )
                found = await answer
                await asyncio.sleep(self.delay(self._rng))
                if self.parted(me.name, listener.life.name):
                    await asyncio.sleep(1e9)
                return found
        except TimeoutError:
            raise httpx.ReadTimeout("no answer in time") from None
        except OSError as error:
            raise httpx.ConnectError(str(error)) from None

    def _answer(
        self,
        listener: Listener,
        method: str,
        path: str,
        authorization: str,
        me: Life,
        answer: asyncio.Future[tuple[int, bytes]],
    ) -> None:
        async def work() -> None:
            found = await listener.http(method, path, authorization)
            self.loop.run_in(me, lambda: None if answer.done() else answer.set_result(found))

        self.loop.create_task(work())


def _serve(
    loop: VirtualLoop,
    line: Line,
    listener: Listener,
    headers: list[tuple[str, str]],
    answer: asyncio.Future[tuple[int, dict[str, str], bytes] | None],
) -> asyncio.Task[None]:
    """Run the application for a connection, in the server's life."""
    end = line.server
    connected = False
    status: dict[str, Any] = {}
    scope = {
        "type": "websocket",
        "path": "/v1/sessions",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
        "extensions": {"websocket.http.response": {}},
    }

    def tell(found: tuple[int, dict[str, str], bytes] | None) -> None:
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
