"""The session WebSocket: frames in, `core.protocol.messages` out. Plain ASGI, since this is the hot path.

One task reads; one task writes what the verifier has to say. A frame that is not a message is answered with
Refused and changes nothing. A peer that does not read what it is sent is cut off: here where too much waits for it, and
below where nothing gets on (`api.connections`). How much is read for a key is bounded, whatever comes of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from starlette.types import Receive, Scope, Send

from wisp.api.connections import FRAME_LIMIT
from wisp.core.errors import ProtocolError, RequestError, UnavailableError
from wisp.core.protocol.messages import (
    REFUSAL_HEADER,
    SUBPROTOCOL,
    Cancel,
    Draft,
    Hello,
    Message,
    Open,
    Redirect,
    Refused,
    Verdict,
    Welcome,
    decode_edge_message,
    encode,
)

log = logging.getLogger("wisp.sockets")

MAX_BACKLOG = 8 << 20  # bytes not yet taken by the peer
HELLO_TIMEOUT_S = 10.0  # for a peer to say hello: one that does not holds a socket for nothing
READ_RATE = 4 << 20  # bytes of Opens a second for a key: reading them takes a sixteenth of a core
READ_BURST = 16 << 20  # bytes at once, so that many sessions may come back together
LONGEST_WAIT_S = 10.0  # at a time: pings are not answered meanwhile, and must be within 20 s

Sender = Callable[[Verdict | Refused | Redirect], None]


class SessionHost(Protocol):
    """What is behind a session socket: a verifier (`server.host`), or a router of several."""

    def check(self, hello: Hello) -> None: ...
    def welcome(self) -> Welcome: ...
    def attach(
        self, key: str, send: Sender, *, movable: bool = False, close: Callable[[], None] | None = None
    ) -> int: ...
    def receive(self, connection: int, message: Open | Draft | Cancel) -> None: ...
    def detach(self, connection: int) -> None: ...


class Reading:
    """What has been read for a key, over all of its connections: a bucket that may be overdrawn."""

    def __init__(self) -> None:
        self._paid_at = 0.0  # when what has been read would have been read at READ_RATE

    def charge(self, now: float, size: int) -> float:
        """`size` bytes were read. Returns the seconds for which no more should be."""
        self._paid_at = max(self._paid_at, now - READ_BURST / READ_RATE) + size / READ_RATE
        return max(0.0, self._paid_at - now)


class SessionSocket:
    """One edge's connection."""

    def __init__(
        self,
        host: SessionHost,
        key: str,
        receive: Receive,
        send: Send,
        authorize: Callable[[], str],
        reading: Reading,
    ) -> None:
        """`authorize` raises RequestError once the key has been revoked. `reading` is the key's."""
        self.host = host
        self.key = key
        self._authorize = authorize
        self._receive = receive
        self._send = send
        self._reading = reading
        self._out: deque[bytes] = deque()
        self._backlog = 0
        self._more = asyncio.Event()
        self._overrun = asyncio.Event()

    async def run(self) -> None:
        """Handshake, then read until the peer is gone."""
        host = self.host
        hello = await self._handshake()
        if hello is None:
            return
        connection = host.attach(self.key, self.post, movable=hello.redirects, close=self.close)
        tasks = [
            asyncio.create_task(t) for t in (self._read(connection), self._write(), self._overrun.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            host.detach(connection)
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()

    async def _read(self, connection: int) -> None:
        while (frame := await self._frame()) is not None:
            try:
                message = decode_edge_message(frame)
                if isinstance(message, Hello):
                    raise ProtocolError("out_of_turn", "hello was said already")
            except ProtocolError as error:
                self.post(Refused("", error.code, str(error)))
                await self._pay(len(frame))
                continue
            if isinstance(message, Open) and self._revoked():
                await self._send({"type": "websocket.close", "code": 4401, "reason": "key revoked"})
                return
            self.host.receive(connection, message)
            if isinstance(message, Open):
                await self._pay(len(frame))

    async def _pay(self, size: int) -> None:
        """An Open, or what is no message, costs time whatever is made of it: read no more until that is paid for."""
        wait_s = self._reading.charge(asyncio.get_running_loop().time(), size)
        if wait_s:
            await asyncio.sleep(min(wait_s, LONGEST_WAIT_S))

    def _revoked(self) -> bool:
        """Checked before each session: a connection may outlive its key by far."""
        try:
            return self._authorize() != self.key
        except RequestError:
            return True

    def post(self, message: Message) -> None:
        frame = encode(message)
        self._backlog += len(frame)
        if self._backlog > MAX_BACKLOG:
            self._overrun.set()
        self._out.append(frame)
        self._more.set()

    def close(self) -> None:
        """Send what is queued, then close: for now there is nobody here to talk to."""
        self._out.append(b"")
        self._more.set()

    async def _handshake(self) -> Hello | None:
        await self._receive()  # websocket.connect
        await self._send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                frame = await self._frame()
            if frame is None:
                return None
            hello = decode_edge_message(frame)
            if not isinstance(hello, Hello):
                raise ProtocolError("out_of_turn", "the first frame must be a hello")
            self.host.check(hello)
            welcome = self.host.welcome()
        except UnavailableError:  # since the upgrade
            await self._send({"type": "websocket.close", "code": 1012, "reason": "come back later"})
            return None
        except (ProtocolError, TimeoutError) as error:
            code = error.code if isinstance(error, ProtocolError) else "timeout"
            await self._bytes(encode(Refused("", code, str(error) or "no hello in time", fatal=True)))
            await self._send({"type": "websocket.close", "code": 4400, "reason": code})
            return None
        await self._bytes(encode(welcome))
        return hello

    async def _frame(self) -> bytes | None:
        """The next binary frame, or None at the end."""
        event = await self._receive()
        if event["type"] != "websocket.receive":
            return None
        data: bytes | None = event.get("bytes")
        return data if data is not None else b"\xc1"  # text: never a valid message

    async def _write(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                while self._out:
                    frame = self._out.popleft()
                    if not frame:
                        await self._send(
                            {"type": "websocket.close", "code": 1012, "reason": "come back later"}
                        )
                        return
                    await self._bytes(frame)
                    self._backlog -= len(frame)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the peer is gone
            log.debug("writing failed: %r", error)

    async def _bytes(self, frame: bytes) -> None:
        await self._send({"type": "websocket.send", "bytes": frame})


class SessionEndpoint:
    """ASGI application for the session path. `authorize` maps an Authorization header to a key's name."""

    def __init__(self, host: Callable[[], SessionHost], authorize: Callable[[str | None], str]) -> None:
        self.host = host
        self.authorize = authorize
        self._reading: dict[str, Reading] = {}  # by key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}

        def authorize() -> str:
            return self.authorize(headers.get(b"authorization"))

        try:
            key = authorize()
            host = self.host()
            longest = host.welcome().max_frame
        except RequestError as error:  # a wrong key, or the model is still loading
            await deny(receive, send, scope, error)
            return
        if (limit := scope.get("extensions", {}).get(FRAME_LIMIT)) is not None:
            limit(longest)
        reading = self._reading.setdefault(key, Reading())
        await SessionSocket(host, key, receive, send, authorize, reading).run()


async def deny(receive: Receive, send: Send, scope: Scope, error: RequestError) -> None:
    """Refuse the upgrade with an HTTP status, or, where the server cannot, with a close code."""
    await receive()
    if "websocket.http.response" in scope.get("extensions", {}):
        own = (error.code or "refused").encode()  # an edge tells by it that no proxy in between said this
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (REFUSAL_HEADER.encode(), own)]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": str(error).encode()})
    else:
        await send({"type": "websocket.close", "code": 4401, "reason": str(error)})
