"""One WebSocket of an emulated device. `sim.live` has hundreds of them, so one has no task and no queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from wisp import __version__
from wisp.core.errors import UnavailableError
from wisp.core.protocol.messages import MAX_FRAME, SUBPROTOCOL, VERSION, Hello, Welcome, encode


class Wire(asyncio.Protocol):
    """One WebSocket, without tasks or queues: each frame is handed on as it arrives. Says hello by itself.

    ready: the first frame that came; welcome: what it said
    """

    def __init__(
        self, url: str, headers: dict[str, str], heard: Callable[[bytes], None], broken: Callable[[str], None]
    ) -> None:
        self.ready: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.welcome: Welcome | None = None
        self._heard = heard
        self._broken = broken
        self._headers = headers
        self._socket = ClientProtocol(
            parse_uri(url), subprotocols=[Subprotocol(SUBPROTOCOL)], max_size=MAX_FRAME
        )
        self._pong: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None  # while there is a connection
        self.ended = False  # the connection is gone, or about to be

    async def ping(self) -> None:
        """Returns with the answer. Raises UnavailableError once the connection is gone."""
        if self._socket.state is not OPEN:
            raise UnavailableError("the verifier closed a connection")
        self._pong = asyncio.get_running_loop().create_future()
        self._socket.send_ping(b"")
        self._flush()
        await self._pong

    def send(self, frame: bytes) -> None:
        """Send a binary frame; nothing, if the connection is gone, or about to be."""
        if self.ended or self._socket.state is not OPEN:
            return
        self._socket.send_binary(frame)
        self._flush()

    def close(self) -> None:
        """Say goodbye, if there is a WebSocket to say it on."""
        if self.ended:
            return
        if self._socket.state is not OPEN:
            self.abort()
            return
        self.ended = True
        self._socket.send_close(1000)
        self._flush()

    def abort(self) -> None:
        self.ended = True
        self.ready.cancel()
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        request = self._socket.connect()
        for name, value in self._headers.items():
            request.headers[name] = value
        self._socket.send_request(request)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._socket.receive_data(data)
        for event in self._socket.events_received():
            if isinstance(event, Frame):
                self._frame(event)
            elif isinstance(event, Response) and event.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
                self._socket.send_binary(
                    encode(Hello(VERSION, client=f"wisp-fleet/{__version__}", redirects=True))
                )
        self._flush()

    def eof_received(self) -> None:
        self._socket.receive_eof()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        reason = str(self._socket.handshake_exc or error or self._socket.close_reason or "no reason given")
        if not self.ready.done():
            self.ready.set_exception(self._socket.handshake_exc or ConnectionError(reason))
        elif not self.ended:
            self.ended = True
            self._broken(reason)

    def _frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.PONG:
            if self._pong is not None and not self._pong.done():
                self._pong.set_result(None)
        elif frame.opcode is not Opcode.BINARY or self.ended:
            return
        elif not self.ready.done():
            self.ready.set_result(bytes(frame.data))
        else:
            self._heard(bytes(frame.data))  # a verifier does not fragment

    def _flush(self) -> None:
        transport = self._transport
        if transport is None:
            return
        for data in self._socket.data_to_send():
            if data:
                transport.write(data)
            elif transport.can_write_eof():
                transport.write_eof()
