"""Uvicorn's protocols with two bounds below the application: on the output that waits for a slow reader, and on the
parser's work before the application sees a message.

Without them, a connection with a peer that has stopped reading is never closed: `close()` waits until all output is
taken, and each answer to a ping adds to it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, cast

import h11
import msgspec
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from wisp.api.addresses import Addresses
from wisp.api.errors import error_body
from wisp.api.http import PunctualH11
from wisp.core.errors import RequestError

log = logging.getLogger("wisp.connections")

UNREAD_S = 20.0  # a peer that takes nothing of what waits for it for so long has gone
LOOKS = 4  # in that time: it has not passed for a process that was stopped meanwhile
SEND_BUFFER = 1 << 18  # bytes that the system keeps for a session socket: verdicts are small
MAX_FRAGMENTS = 64  # of a message; edges send theirs in one
PARSED_AT_ONCE = 1 << 14  # bytes, so that a flood is seen while it is parsed
CONTROLS_PER_S = 100  # pings and pongs; a peer has reason to send one in ten seconds
_FULL_BODY = msgspec.json.encode(
    error_body(
        RequestError(
            503,
            "this server has all the connections from this address that it can have",
            code="overloaded",
            type="server_error",
        )
    )
)
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_FULL_BODY), _FULL_BODY)
)
FRAME_LIMIT = "wisp.frame_limit"  # ASGI extension: called with the most bytes that a message may have


class _Transport:
    """A transport that is watched: whatever waits in it must get on, also after `close`."""

    def __init__(self, transport: asyncio.Transport, limit_s: float) -> None:
        self._transport = transport
        self._limit_s = limit_s
        self._timer: asyncio.TimerHandle | None = None
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Close once everything is written, or cannot be."""
        self._transport.close()
        if self._timer is None and self._transport.get_write_buffer_size():
            self.watch()

    def watch(self) -> None:
        """From now on a peer that takes nothing is cut off."""
        self.end()
        self._look_again(0)

    def relax(self) -> None:
        """It takes what it is sent."""
        if not self._transport.is_closing():  # then the rest has to get on, too
            self.end()

    def end(self) -> None:
        """It is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again(self, looks: int) -> None:
        waiting = self._transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._limit_s / LOOKS, self._look, waiting, looks + 1)

    def _look(self, before: int, looks: int) -> None:
        self._timer = None
        waiting = self._transport.get_write_buffer_size()
        if waiting < before:
            looks = 0
        if looks < LOOKS and waiting:
            self._look_again(looks)
        elif waiting:
            peer = self._transport.get_extra_info("peername")
            log.info("%s has read nothing for %g s, and is cut off", peer, self._limit_s)
            self._transport.abort()


class _Watched(asyncio.Protocol):
    """What both kinds of connection have in common. For a subclass beside one of uvicorn's protocols."""

    unread_s = UNREAD_S
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, _Transport):  # after an upgrade it is one already
            transport = cast(asyncio.Transport, _Transport(cast(asyncio.Transport, transport), self.unread_s))
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watched.end()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._watched.watch()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._watched.relax()
        super().resume_writing()

    @property
    def _watched(self) -> _Transport:
        return cast(_Transport, self.transport)


class HttpConnection(_Watched, PunctualH11):
    """An HTTP connection, one of `addresses`."""

    def __init__(self, *args: Any, addresses: Addresses, **options: Any) -> None:
        super().__init__(*args, **options)
        self._addresses = addresses
        self.address = ""
        self.heard = self.loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self._addresses.enter(self):
            log.info("%s is turned away: it has all connections there are for it", self.address)
            self.transport.write(_FULL)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        super().data_received(data)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._addresses.leave(self)
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._addresses.leave(self)
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Is no request being answered?"""
        return self.cycle is None or self.cycle.response_complete

    def cut(self) -> None:
        """Another address needs the descriptor."""
        self.transport.abort()


class SessionConnection(_Watched, WebSocketsSansIOProtocol):
    """A WebSocket. While its peer does not read, nothing is read from it either: answers to pings would pile up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._choked = False
        self._controls = 0
        self._since = self.loop.time()
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._choked = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._choked = False
        if not self.read_paused:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        event = await super().receive()
        if self._choked:  # it has just begun to read again
            self.transport.pause_reading()
        return event

    def data_received(self, data: bytes) -> None:
        for at in range(0, len(data), PARSED_AT_ONCE):
            super().data_received(data[at : at + PARSED_AT_ONCE])
            if self.transport.is_closing():
                return

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # not refused for its form
            extensions = cast(dict[str, Any], self.scope["extensions"])
            extensions[FRAME_LIMIT] = self._limit

    def _limit(self, size: int) -> None:
        self.conn.max_message_size = size

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self._cut_off(f"sends a message in more than {MAX_FRAGMENTS} fragments")
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        if self._may_control():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._may_control():
            super().handle_pong(event)

    def _may_control(self) -> bool:
        now = self.loop.time()
        if now - self._since > 1.0:
            self._since, self._controls = now, 0
        self._controls += 1
        if self._controls > CONTROLS_PER_S:
            self._cut_off(f"sends more than {CONTROLS_PER_S} pings or pongs a second")
        return not self.transport.is_closing()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()  # a peer that does not answer does not read either

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":  # no text is a message, so none is looked at
            self.frames = [b""]
        super().send_receive_event_to_app()

    def _cut_off(self, why: str) -> None:
        if not self.transport.is_closing():
            log.info("%s %s, and is cut off", self.client, why)
            self.transport.abort()
