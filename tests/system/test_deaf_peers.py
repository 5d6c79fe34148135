"""Peers that do not read, on real sockets: they are let go, and what waits for them stays small."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from wisp.api import connections
from wisp.api.connections import HttpConnection, SessionConnection
from wisp.api.keys import Keyring
from wisp.api.process import Listen, event_loop_factory, run_app
from wisp.core.protocol.messages import VERSION, Hello, Message, Open, encode, frame_limit
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice, SliceResult
from wisp.engines.null import ByteTokenizer, NullTarget
from wisp.server.app import ServerApp, Settings

DEADLINE_S = 60.0
CONTEXT = 1 << 16
HANDSHAKE = (
    b"GET /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"Sec-WebSocket-Protocol: wisp.v1\r\n\r\n"
)
BINARY, PING, TEXT, CONTINUED, FINAL = 0x2, 0x9, 0x1, 0x0, 0x80


def frame(data: bytes, head: int = FINAL | BINARY) -> bytes:
    """A WebSocket frame as clients send it, masked with zeros."""
    n = len(data)
    length = (
        bytes([0x80 | n])
        if n < 126
        else b"\xfe" + struct.pack("!H", n)
        if n < 65536
        else b"\xff" + struct.pack("!Q", n)
    )
    return bytes([head]) + length + bytes(4) + data


class Raw:
    """A connection without a library that would read, or answer, by itself."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        self.port = port

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def hear(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)

    async def connect(self) -> None:
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", self.port))

    async def greet(self, *messages: Message) -> None:
        """Shake hands, and hear the Welcome."""
        await self.connect()
        await self.say(HANDSHAKE)
        assert b" 101 " in await self.hear()
        await self.say(frame(encode(Hello(VERSION))))
        assert b"welcome" in await self.hear()
        for message in messages:
            await self.say(frame(encode(message)))


def opening(session: str, **fields: object) -> Open:
    given = {"epoch": 0, "prompt": [1], "sampling": Sampling(seed=7), "max_tokens": 60_000, "serve": True}
    return Open(session, **(given | fields))  # type: ignore[arg-type]


class Gated(NullTarget):
    """Stops after so many steps, until the gate is opened."""

    def __init__(self, steps: int) -> None:
        super().__init__(slots=8, slot_tokens=CONTEXT)
        self.steps = steps
        self.gate = threading.Event()

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        self.steps -= 1
        assert self.steps > 0 or self.gate.wait(2 * DEADLINE_S)
        return super().run(batch)


def with_server(
    scenario: Callable[[ServerApp, int], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
    engine: NullTarget | None = None,
) -> None:
    """Run a scenario beside a real server that gives peers up sooner than usual, and holds less for them."""
    served = engine or NullTarget(slots=8, slot_tokens=CONTEXT)
    monkeypatch.setattr(HttpConnection, "unread_s", 0.1)
    monkeypatch.setattr(SessionConnection, "unread_s", 0.1)
    monkeypatch.setattr(connections, "SEND_BUFFER", 1 << 14)

    async def main() -> None:
        server = ServerApp(
            Settings("m", park_s=0.0, drain_s=0.0), Keyring(None, None), lambda: (served, ByteTokenizer())
        )
        with socket.create_server(("127.0.0.1", 0)) as bound:
            port = bound.getsockname()[1]
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            over = asyncio.Event()

            async def stopped() -> None:
                await over.wait()

            serving = asyncio.ensure_future(
                run_app(
                    server.asgi,
                    Listen(port=port),
                    server.drain,
                    keyed=False,
                    stopped=stopped,
                    signals=False,
                    bound=bound,
                )
            )
            while server._host is None:
                await asyncio.sleep(0.01)
            try:
                await asyncio.wait_for(scenario(server, port), DEADLINE_S)
            finally:
                if isinstance(served, Gated):
                    served.gate.set()
                over.set()
                await serving

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_an_edge_that_does_not_read_is_let_go_and_its_session_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Gated(6000)  # more text than may wait for its reader

    async def scenario(server: ServerApp, port: int) -> None:
        with Raw(port) as deaf:
            await deaf.greet(opening("session-1"))
            host = server.host()
            await until(lambda: host.n_sessions == 1)
            await until(lambda: host.n_edges == 0)
            engine.gate.set()
            await until(lambda: host.n_sessions == 0)
            value = host.metrics.registry.get_sample_value
            assert value("wisp:request_success_total", {"finished_reason": "expired"}) == 1

    with_server(scenario, monkeypatch, engine)


def test_a_client_that_does_not_read_its_stream_ends_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Gated(4000)  # more text than may wait for its reader

    async def scenario(server: ServerApp, port: int) -> None:
        with Raw(port) as client:
            await client.connect()
            body = b'{"model": "m", "prompt": "hello", "max_tokens": 60000, "stream": true}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            await client.say(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            value = server.host().metrics.registry.get_sample_value
            await until(lambda: bool(value("wisp:request_success_total", {"finished_reason": "abort"})))

    with_server(scenario, monkeypatch, engine)


@pytest.mark.parametrize(
    ("flood", "why"),
    [
        (frame(bytes(125), FINAL | PING) * 100, "pings or pongs a second"),
        (frame(b"", CONTINUED) * 1000, "fragments"),
    ],
    ids=["pings", "fragments of nothing"],
)
def test_a_flood_that_the_application_never_sees_is_not_kept(
    flood: bytes, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wisp.connections")

    async def scenario(server: ServerApp, port: int) -> None:
        with Raw(port) as deaf:
            await deaf.greet()
            if why == "fragments":
                await deaf.say(frame(b"", BINARY))
            with contextlib.suppress(ConnectionError):
                while True:
                    await deaf.say(flood)
            await until(lambda: server.host().n_edges == 0)

    with_server(scenario, monkeypatch)
    assert why in caplog.text


def test_while_a_peer_reads_nothing_its_pings_are_not_read_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly they come: what is answered without being taken would pile up for as long as it lives."""
    most = [0]

    async def scenario(server: ServerApp, port: int) -> None:
        async def flood(deaf: Raw) -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    await deaf.say(frame(bytes(125), FINAL | PING) * 100)

        with Raw(port) as deaf:
            await deaf.greet()
            flooding = asyncio.ensure_future(flood(deaf))
            await until(lambda: server.host().n_edges == 0)
            await flooding

    watch = connections._Transport.watch

    def watched(transport: connections._Transport) -> None:
        most[0] = max(most[0], transport.get_write_buffer_size())
        watch(transport)

    monkeypatch.setattr(connections, "CONTROLS_PER_S", 1 << 30)
    monkeypatch.setattr(connections._Transport, "watch", watched)
    look = connections._Transport._look

    def looked(transport: connections._Transport, before: int, looks: int) -> None:
        most[0] = max(most[0], transport.get_write_buffer_size())
        look(transport, before, looks)

    monkeypatch.setattr(connections._Transport, "_look", looked)
    with_server(scenario, monkeypatch)
    assert 0 < most[0] < 1 << 20


def test_a_frame_may_be_as_long_as_the_context_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: ServerApp, port: int) -> None:
        limit = frame_limit(CONTEXT)
        full = encode(opening("session-1", prompt=[1 << 20] * CONTEXT, max_tokens=1))
        assert len(full) < limit
        with Raw(port) as peer:
            await peer.greet()
            await peer.say(frame(full))
            assert b"context_length_exceeded" in await peer.hear()
            await peer.say(frame(bytes(limit + 1)))
            assert await closed(peer) == 1009

    with_server(scenario, monkeypatch)


def test_text_that_is_no_utf8_is_refused_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(server: ServerApp, port: int) -> None:
        with Raw(port) as peer:
            await peer.greet()
            await peer.say(frame(b"\xff\xfe", FINAL | TEXT))
            assert b"malformed" in await peer.hear()

    with_server(scenario, monkeypatch)
    assert "Traceback" not in caplog.text


async def closed(peer: Raw) -> int:
    """The code of the close frame that comes next."""
    data = await peer.hear()
    assert data[0] == FINAL | 0x8
    return int.from_bytes(data[2:4], "big")
