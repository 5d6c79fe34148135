"""Uvicorn's HTTP, with a limit on how slowly a request may arrive.

Uvicorn itself waits for ever for the rest of a request. A client could hold a connection, and its descriptor, for the
price of one byte.
"""

from __future__ import annotations

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from wisp.api.errors import error_body
from wisp.core.errors import RequestError

READ_S = 10.0  # for the head of a request, and for a body that hardly comes
READ_BYTES_PER_S = 4096  # a longer body has a second more for each so many bytes: half a GPRS modem's rate
KEEP_ALIVE_S = 75.0  # nginx's; clients and proxies give up idle connections after 60 s or less, and before us


class PunctualH11(H11Protocol):
    """HTTP/1.1 with a time limit on requests. (How long an idle connection is kept is uvicorn's to see to.)"""

    _reading: asyncio.TimerHandle | None = None  # while part of a request is missing
    _since = 0.0  # when its first byte came, or the connection
    _bytes = 0  # that have come since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _look(self) -> None:
        """The clock runs while there is part of a request, or nothing at all yet."""
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        theirs = self.conn.their_state
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if theirs is h11.SEND_BODY or (theirs is h11.IDLE and begun):
            if self._reading is None:
                self._since, self._bytes = self.loop.time(), 0
                self._wait(READ_S)
        else:
            self._stop()

    def _wait(self, seconds: float) -> None:
        self._reading = self.loop.call_later(seconds, self._check)

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _check(self) -> None:
        left = self._since + READ_S + self._bytes / READ_BYTES_PER_S - self.loop.time()
        if self.flow.read_paused:  # it is we who are slow
            left = READ_S
        if left > 0.0:
            self._wait(left)
        elif not self.transport.is_closing():
            self._give_up()

    def _give_up(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = RequestError(408, "The rest of the request did not come in time.", code="request_timeout")
            body = msgspec.json.encode(error_body(error))
            headers = [
                ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")
            ]  # fmt: skip
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the application still says goes nowhere
        self.transport.close()
