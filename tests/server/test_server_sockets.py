"""The session socket against a peer that is a pair of functions: slow readers, loading, the handshake's time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from waiting import PATIENCE_S, run
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.protocol.messages import (
    VERSION,
    Draft,
    Hello,
    Message,
    Open,
    Refused,
    ServerMessage,
    Verdict,
    Welcome,
    decode_server_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission
from wisp.engines.null import ByteTokenizer, NullTarget, null_token
from wisp.server import sockets
from wisp.server.host import VerifierHost
from wisp.server.sockets import Reading, SessionEndpoint

Scenario = Callable[[VerifierHost], Awaitable[None]]


def with_host(scenario: Scenario) -> None:
    """Run `scenario` with a verifier of no weights."""

    async def main() -> None:
        host = VerifierHost(NullTarget(slots=4), ByteTokenizer(), Admission(100), model="null")
        try:
            await scenario(host)
        finally:
            host.stop()

    run(main())


class Wire:
    """ASGI's two ends. While `reading` is cleared, whatever is sent blocks."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.reading = asyncio.Event()
        self.reading.set()
        self.inbox.put_nowait({"type": "websocket.connect"})

    async def receive(self) -> dict[str, Any]:
        return await self.inbox.get()

    async def send(self, event: Any) -> None:
        await self.reading.wait()
        self.events.put_nowait(event)

    def say(self, message: Message) -> None:
        self.inbox.put_nowait({"type": "websocket.receive", "bytes": encode(message)})

    async def hear(self) -> ServerMessage:
        while (event := await self.events.get())["type"] != "websocket.send":
            pass
        return decode_server_message(event["bytes"])

    def connect(self, endpoint: SessionEndpoint, key: str = "") -> asyncio.Task[None]:
        headers = [(b"authorization", key.encode())]
        scope = {"type": "websocket", "headers": headers, "extensions": {"websocket.http.response": {}}}
        return asyncio.ensure_future(endpoint(scope, self.receive, self.send))


def endpoint_of(host: VerifierHost) -> SessionEndpoint:
    return SessionEndpoint(lambda: host, lambda header: "key")


def opening(session: str, **fields: Any) -> Open:
    return msgspec.structs.replace(Open(session, 0, [1], Sampling(seed=7), 3000), **fields)


def test_a_peer_that_does_not_read_is_let_go_and_its_sessions_are_parked() -> None:
    async def scenario(host: VerifierHost) -> None:
        wire = Wire()
        task = wire.connect(endpoint_of(host))
        wire.say(Hello(VERSION))
        assert isinstance(await wire.hear(), Welcome)
        truth = [null_token(7, position) for position in range(2000)]
        wire.say(opening("session-1"))
        verdict = await wire.hear()
        assert isinstance(verdict, Verdict)
        known = len(verdict.tokens)
        while known < 1900:
            wire.say(Draft("session-1", known, known, truth[known : known + 64]))
            verdict = await wire.hear()
            assert isinstance(verdict, Verdict)
            known += len(verdict.tokens)
        wire.reading.clear()
        asked = 0
        while not task.done():  # each asks for all of the text again, and reads none of it
            asked += 1
            wire.say(opening("session-1", epoch=asked, round=known + asked))
            await asyncio.sleep(0)
            assert asked * known < 4 * sockets.MAX_BACKLOG
        assert host.n_edges == 0
        assert host.n_sessions == 1  # parked, for its edge may come back
        back = Wire()
        again = back.connect(endpoint_of(host))
        back.say(Hello(VERSION))
        await back.hear()
        last = {"epoch": asked + 1, "round": known + asked + 1, "digest": host.info.digest}
        back.say(opening("session-1", committed=truth[:known], **last))
        resumed = await back.hear()
        assert isinstance(resumed, Verdict)
        assert resumed.tokens == truth[known : known + 1]
        back.inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await again

    with_host(scenario)


def test_while_the_model_loads_an_upgrade_is_refused_with_503() -> None:
    def loading() -> VerifierHost:
        raise UnavailableError("the model is still loading")

    async def scenario() -> None:
        wire = Wire()
        await wire.connect(SessionEndpoint(loading, lambda header: "key"))
        start = wire.events.get_nowait()
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 503)

    asyncio.run(scenario())


def test_a_wrong_key_is_told_401_even_while_the_model_loads() -> None:
    def wrong(header: str | None) -> str:
        raise RequestError(401, "this API key is not known here")

    async def scenario() -> None:
        wire = Wire()
        await wire.connect(SessionEndpoint(lambda: pytest.fail("not asked"), wrong))
        start = wire.events.get_nowait()
        assert start["status"] == 401
        assert (b"www-authenticate", b"Bearer") in start["headers"]
        assert wire.events.get_nowait()["body"] == b"this API key is not known here"

    asyncio.run(scenario())


def test_a_peer_that_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HELLO_TIMEOUT_S", 0.05)

    async def scenario(host: VerifierHost) -> None:
        wire = Wire()
        await wire.connect(endpoint_of(host))
        refused = await wire.hear()
        assert isinstance(refused, Refused)
        assert (refused.code, refused.fatal) == ("timeout", True)
        assert host.n_edges == 0

    with_host(scenario)


def test_a_drain_does_not_wait_for_sessions_whose_edge_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [0]
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        looks[0] += 1
        await real(0)

    async def scenario(host: VerifierHost) -> None:
        wire = Wire()
        task = wire.connect(endpoint_of(host))
        wire.say(Hello(VERSION))
        await wire.hear()
        wire.say(opening("session-1"))
        await wire.hear()
        monkeypatch.setattr(asyncio, "sleep", sleep)
        drain = asyncio.ensure_future(host.drain(2 * PATIENCE_S))
        while looks[0] < 3 and not drain.done():
            await real(0)
        assert not drain.done()
        wire.say(opening("session-2"))
        refused = await wire.hear()
        assert isinstance(refused, Refused)
        assert refused.code == "shutting_down"
        wire.inbox.put_nowait({"type": "websocket.disconnect", "code": 1006})
        await task
        await drain

    with_host(scenario)


def test_reading_is_paced_by_key_whatever_the_frames_are() -> None:
    reading = Reading()
    assert reading.charge(100.0, sockets.READ_BURST) == 0.0  # many sessions may come back together
    assert reading.charge(100.0, sockets.READ_RATE) == 1.0
    assert reading.charge(100.5, sockets.READ_RATE) == 1.5
    assert reading.charge(200.0, sockets.READ_BURST) == 0.0  # paid long ago, and no credit beyond the burst
    assert reading.charge(200.0, sockets.READ_RATE) == 1.0


def test_a_key_that_is_over_its_rate_is_not_read_meanwhile_on_any_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "READ_BURST", 1 << 10)
    monkeypatch.setattr(sockets, "READ_RATE", 1)  # what is owed is hours, however slow the machine is
    monkeypatch.setattr(sockets, "LONGEST_WAIT_S", float("inf"))
    waiting: dict[float, asyncio.Event] = {}

    async def scenario(host: VerifierHost) -> None:
        async def sleep(seconds: float) -> None:
            waiting[seconds] = asyncio.Event()
            await waiting[seconds].wait()

        monkeypatch.setattr("wisp.server.sockets.asyncio.sleep", sleep)
        endpoint = SessionEndpoint(lambda: host, str)
        flood = opening("session-1", prompt=[999] * 4000)  # no such token
        wires = {name: Wire() for name in ("flood", "same key", "other key")}
        tasks = []
        for name, wire in wires.items():
            tasks.append(wire.connect(endpoint, "b" if name == "other key" else "a"))
            wire.say(Hello(VERSION))
            assert isinstance(await wire.hear(), Welcome)
        for name in ("flood", "same key"):
            wires[name].say(flood)
            refused = await wires[name].hear()
            assert isinstance(refused, Refused)
            wires[name].say(opening("session-2"))
        wires["other key"].say(opening("session-3"))
        assert isinstance(await wires["other key"].hear(), Verdict)
        first, second = waiting
        assert 0 < first < second  # what the key owes grows, over both
        assert [wires[name].inbox.qsize() for name in ("flood", "same key")] == [1, 1]
        waiting[first].set()
        assert isinstance(await wires["flood"].hear(), Verdict)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with_host(scenario)
