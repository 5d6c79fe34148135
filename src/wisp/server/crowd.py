"""Shares session sockets fairly between keys, like places (`core.verify.places`). Descriptors are few, and a key that
held them all would keep out everybody, even the operator who looks at /health.

When there is no room for another, the key that has most gives one up to a key that has fewer by at least two: the one
over which nothing has come for longest. Its edge comes back, or waits, as after any other loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wisp.api.addresses import descriptors
from wisp.core.errors import RequestError, UnavailableError
from wisp.server.sockets import deny

CLOSE_S = 1.0  # for saying why


class Crowd:
    """ASGI application: `endpoint`, for `most` sockets at a time (default: half of the descriptors that this process
    may have; the others are for HTTP). `authorize` is that of the endpoint, which also refuses strangers."""

    def __init__(
        self, endpoint: ASGIApp, authorize: Callable[[str | None], str], most: int | None = None
    ) -> None:
        self._endpoint = endpoint
        self._authorize = authorize
        self._most = most
        self._inside: set[_Socket] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            key = self._authorize(headers.get(b"authorization"))
        except RequestError:
            await self._endpoint(scope, receive, send)
            return
        most = self._most or descriptors() // 2
        if len(self._inside) >= most and not self._make_room(key):
            message = f"all {most} connections of this server are in use"
            await deny(receive, send, scope, UnavailableError(message, retry_after=1.0))
            return
        socket = _Socket(key, receive)
        self._inside.add(socket)
        try:
            await self._endpoint(scope, socket.receive, send)
        except asyncio.CancelledError:
            if socket in self._inside:
                raise
            socket.task.uncancel()
            with contextlib.suppress(Exception):
                reason = "too many connections of this key"
                close = {"type": "websocket.close", "code": 1013, "reason": reason}
                async with asyncio.timeout(CLOSE_S):
                    await send(close)
        finally:
            self._inside.discard(socket)

    def _make_room(self, key: str) -> bool:
        """False if nobody has to go."""
        has = Counter(socket.key for socket in self._inside)
        rich, most = max(has.items(), key=lambda item: (item[1], item[0]))
        if most <= has[key] + 1:
            return False
        silent = min((s for s in self._inside if s.key == rich), key=lambda s: s.heard)
        self._inside.discard(silent)
        silent.task.cancel()
        return True


class _Socket:
    """One connection. `heard` is when something last came over it."""

    def __init__(self, key: str, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.key = key
        self.task = task
        self.heard = time.monotonic()
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        self.heard = time.monotonic()
        return message
