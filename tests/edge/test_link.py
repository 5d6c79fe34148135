"""The edge's connection against a verifier that is a script: greeting, losing, backing off, giving up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from wisp.core.errors import ConfigError, RequestError, UnavailableError
from wisp.core.messages import (
    MAX_FRAME,
    VERSION,
    Cancel,
    Hello,
    Message,
    Refused,
    Verdict,
    Welcome,
    decode_from_edge,
    encode,
)
from wisp.edge import link as module
from wisp.edge.link import LOST, FromLink, VerifierLink, http_url

WELCOME = Welcome(VERSION, "m", "f", 100, [1], 512, 64, digest="d1")
SESSION = "session-1"
Talk = Callable[[ServerConnection], Awaitable[None]]


class Script:
    """A verifier whose connections each run the next of `talks` (the last one again and again)."""

    def __init__(self, *talks: Talk) -> None:
        self.talks = talks
        self.greetings: list[Hello] = []
        self.arrived: list[float] = []
        self.port = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with serve(self._talk, "127.0.0.1", self.port, compression=None) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{self.port}"

    async def _talk(self, peer: ServerConnection) -> None:
        number = len(self.arrived)
        self.arrived.append(time.monotonic())
        with contextlib.suppress(ConnectionClosed):
            hello = decode_from_edge(await peer.recv(decode=False))
            assert isinstance(hello, Hello)
            self.greetings.append(hello)
            await self.talks[min(number, len(self.talks) - 1)](peer)


def say(*messages: Message | bytes | str, stay: bool = True) -> Talk:
    async def talk(peer: ServerConnection) -> None:
        for message in messages:
            await peer.send(encode(message) if isinstance(message, Message) else message)
        if stay:
            await peer.wait_closed()

    return talk


@contextlib.asynccontextmanager
async def linked(url: str, **options: object) -> AsyncIterator[tuple[VerifierLink, asyncio.Queue[FromLink]]]:
    """A started link, and what one session hears of it."""
    link = VerifierLink(url, **options)  # type: ignore[arg-type]
    heard: asyncio.Queue[FromLink] = asyncio.Queue()
    link.listen(SESSION, heard.put_nowait)
    link.start()
    try:
        yield link, heard
    finally:
        await link.close()


def run(scenario: Awaitable[None]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario, 20)

    asyncio.run(main())


async def next_of(heard: asyncio.Queue[FromLink], kind: type) -> FromLink:
    while not isinstance(item := await heard.get(), kind):
        pass
    return item


def test_messages_go_to_the_session_they_name_and_loss_and_return_to_all() -> None:
    verdict = Verdict(SESSION, 0, 0, 0, [5])
    strange = Verdict("session-2", 0, 0, 0, [6])
    notice = Refused("", "malformed", "what?")
    script = Script(say(WELCOME, strange, notice, verdict, stay=False), say(WELCOME))

    async def scenario() -> None:
        async with script.listening() as url, linked(url, fingerprint="abc") as (link, heard):
            assert await next_of(heard, Welcome) == WELCOME
            assert await heard.get() == verdict
            assert await heard.get() is LOST
            assert await next_of(heard, Welcome) == WELCOME
            assert link.reconnects == 1
            assert (await link.connected()) == WELCOME
        assert [(h.version, h.fingerprint) for h in script.greetings] == [(VERSION, "abc")] * 2

    run(scenario())


@pytest.mark.parametrize(
    "frame", [b"\xc1", "text", bytes(MAX_FRAME + 1)], ids=["noise", "text", "a frame above the limit"]
)
def test_a_verifier_that_talks_nonsense_is_left_and_tried_again(frame: bytes | str) -> None:
    script = Script(say(WELCOME, frame), say(frame), say(WELCOME))

    async def scenario() -> None:
        async with script.listening() as url, linked(url) as (link, heard):
            await next_of(heard, Welcome)
            await next_of(heard, Welcome)
            assert link.reconnects == 1
        assert len(script.arrived) == 3

    run(scenario())


def test_waits_between_attempts_grow_with_jitter_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)

    async def scenario() -> None:
        async with linked("http://127.0.0.1:1"):
            while len(waits) < 14:
                await real(0.01)

    run(scenario())
    first, longest = module.BACKOFF_S
    due = [min(first * 2**n, longest) for n in range(14)]
    assert all(d / 2 <= wait <= d for wait, d in zip(waits, due, strict=False))
    assert len(set(waits)) > 10  # a fleet does not come back in step


def test_after_a_good_connection_it_comes_back_soon() -> None:
    script = Script(say(WELCOME, stay=False))

    async def scenario() -> None:
        async with script.listening() as url, linked(url):
            while len(script.arrived) < 6:
                await asyncio.sleep(0.01)
        gaps = [b - a for a, b in zip(script.arrived, script.arrived[1:], strict=False)]
        assert sorted(gaps)[len(gaps) // 2] < 0.5

    run(scenario())


def test_without_a_verifier_it_gives_up_in_time_and_not_for_good() -> None:
    script = Script(say(WELCOME))

    async def scenario() -> None:
        async with script.listening() as url:
            pass  # a port where nobody is
        async with linked(url, give_up_s=0.3) as (link, _):
            start = time.monotonic()
            with pytest.raises(UnavailableError, match=r"no verifier at ws://.*wisp serve"):
                await link.connected()
            assert 0.2 < time.monotonic() - start < 2
            with pytest.raises(UnavailableError):
                await link.connected()  # at once, this time
            async with script.listening():
                while link.welcome is None:
                    await asyncio.sleep(0.01)
                assert await link.connected() == WELCOME

    run(scenario())


@pytest.mark.parametrize("code", ["version_mismatch", "vocabulary_mismatch"])
def test_what_cannot_be_mended_by_waiting_fails_at_once(code: str) -> None:
    script = Script(say(Refused("", code, "no, and here is why", fatal=True)))

    async def scenario() -> None:
        async with script.listening() as url, linked(url) as (link, _):
            with pytest.raises(RequestError, match="here is why") as error:
                await link.connected()
            assert (error.value.status, error.value.code) == (502, code)

    run(scenario())


def test_nothing_is_sent_on_a_new_connection_that_was_meant_for_an_old_one() -> None:
    heard: list[object] = []

    async def listen(peer: ServerConnection) -> None:
        await peer.send(encode(WELCOME))
        async for frame in peer:
            assert isinstance(frame, bytes)
            heard.append(decode_from_edge(frame))

    script = Script(say(WELCOME, stay=False), listen)

    async def scenario() -> None:
        async with script.listening() as url, linked(url) as (link, events):
            await next_of(events, Welcome)
            while await events.get() is not LOST:
                pass
            link.send(Cancel("session-old"))
            await next_of(events, Welcome)
            link.send(Cancel("session-new"))
            while not heard:
                await asyncio.sleep(0.01)
        assert heard == [Cancel("session-new")]

    run(scenario())


@pytest.mark.parametrize(
    ("server", "session_url"),
    [
        ("http://h:1", "ws://h:1/v1/sessions"),
        ("https://h/", "wss://h/v1/sessions"),
        ("h:8100", "ws://h:8100/v1/sessions"),
        ("https://h/wisp/v1", "wss://h/wisp/v1/sessions"),
    ],
)
def test_addresses(server: str, session_url: str) -> None:
    assert VerifierLink(server).url == session_url
    assert http_url(server, "/v1/x") == session_url.replace("ws", "http", 1).replace("/v1/sessions", "/v1/x")


@pytest.mark.parametrize("server", ["ftp://h", "http://", ""])
def test_what_is_no_address_is_refused(server: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        VerifierLink(server)


def test_a_verifier_that_does_not_say_which_weights_it_runs_is_refused_until_it_does() -> None:
    script = Script(say(msgspec.structs.replace(WELCOME, digest="")), say(WELCOME))

    async def scenario() -> None:
        async with script.listening() as url, linked(url) as (link, heard):
            with pytest.raises(RequestError, match=r"install WISP 0\.2\.0 or later there") as caught:
                await link.connected()
            assert caught.value.code == "version_mismatch"
            assert "0.2.0" in link.problem  # what /health says
            assert await next_of(heard, Welcome) == WELCOME
            assert link.fatal is None

    run(scenario())
