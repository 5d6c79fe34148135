"""The client: sessions on connections of their own, as fast as they are answered, every token checked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from benchmarks.overhead.report import Load, Percentiles
from benchmarks.overhead.script import Round, Script
from benchmarks.overhead.servers import Server
from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import SUBPROTOCOL, Hello, Verdict, decode_server_message, encode
from wisp.core.protocol.messages import VERSION as PROTOCOL
from wisp.sim.simulate import quantile


class Tally:
    """What the sessions of one measurement have seen."""

    def __init__(self) -> None:
        self.latencies: list[float] = []  # seconds
        self.bytes_out = 0
        self.bytes_in = 0

    @property
    def rounds(self) -> int:
        return len(self.latencies)


class Peer(Protocol):
    """What is needed of a connection."""

    async def send(self, frame: bytes, /) -> None: ...

    async def recv(self) -> str | bytes: ...


async def play(peer: Peer, script_: Script, until: float, tally: Tally) -> None:
    """Repeat the script until the clock says `until`. Raises ProtocolError if an answer is wrong."""
    clock = time.perf_counter
    while True:
        for round_ in script_.rounds:
            sent = clock()
            await peer.send(round_.frame)
            answer = await peer.recv()
            now = clock()
            tally.latencies.append(now - sent)
            tally.bytes_out += len(round_.frame)
            tally.bytes_in += len(answer)
            if round_.answer is not None:
                _check(answer, round_)
            if now >= until:
                if script_.cancel:
                    await peer.send(script_.cancel)
                return


def _check(frame: str | bytes, due: Round) -> None:
    assert isinstance(frame, bytes)
    v = decode_server_message(frame)
    if not isinstance(v, Verdict) or (v.round, v.base, v.accepted, v.tokens, v.finish) != due.answer:
        raise ProtocolError("wrong_answer", f"expected {due.answer}, got {v}")


@contextlib.asynccontextmanager
async def connected(url: str, n: int) -> AsyncIterator[list[ClientConnection]]:
    """`n` connections to a verifier (they say hello) or an echo server."""
    gate = asyncio.Semaphore(32)

    async def one() -> ClientConnection:
        async with gate:
            peer = await connect(
                url,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,
                proxy=None,
                ping_interval=None,
            )
            await peer.send(encode(Hello(PROTOCOL, client="bench-overhead")))
            await peer.recv()
            return peer

    peers = await asyncio.gather(*(one() for _ in range(n)))
    try:
        yield peers
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))


async def measure(server: Server, plan: Sequence[Script], seconds: float) -> tuple[Load, Tally]:
    """Load `server` with one session per script for `seconds`."""
    tally = Tally()
    async with connected(server.url, len(plan)) as peers:
        cpu, busy, start = server.cpu_s(), time.process_time(), time.perf_counter()
        until = start + seconds
        await asyncio.gather(*(play(*pair, until, tally) for pair in zip(peers, plan, strict=True)))
        wall = time.perf_counter() - start
        cpu, busy = server.cpu_s() - cpu, time.process_time() - busy
    n = tally.rounds
    return Load(n / wall, cpu / n * 1e3, busy / wall, percentiles(tally.latencies)), tally


def percentiles(seconds: list[float]) -> Percentiles:
    p50, p99 = (quantile(seconds, q) * 1e3 for q in (0.5, 0.99))
    return Percentiles(round(p50, 4), round(p99, 4))
