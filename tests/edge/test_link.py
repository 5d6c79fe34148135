"""The edge's connection against a verifier that is a script: greeting, losing, backing off, giving up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from waiting import run
from wisp.api.backend import Generation
from wisp.core.draft.policies import Policies
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.protocol.messages import (
    MAX_FRAME,
    VERSION,
    Cancel,
    Hello,
    Message,
    Open,
    Refused,
    Verdict,
    Welcome,
    decode_edge_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.edge import link as module
from wisp.edge.answers import reason
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import LOST, FromLink, VerifierLink

WELCOME = Welcome(VERSION, "m", "f", 100, [1], 512, 64, digest="d1")
SESSION = "session-1"
ChaosSession = Callable[[ServerConnection], Awaitable[None]]


class Script:
    """A verifier whose connections each run the next of `talks` (the last one again and again).

    answers: what it says to the first upgrades instead of accepting them
    """

    def __init__(self, *talks: ChaosSession, answers: list[Response] | None = None) -> None:
        self.talks = talks
        self.answers = answers or []
        self.greetings: list[Hello] = []
        self.arrived = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        refuse = self._refuse
        async with serve(
            self._talk, "127.0.0.1", self.port, compression=None, process_request=refuse
        ) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{self.port}"

    def _refuse(self, peer: ServerConnection, request: Request) -> Response | None:
        return self.answers.pop(0) if self.answers else None

    async def _talk(self, peer: ServerConnection) -> None:
        number = self.arrived
        self.arrived += 1
        with contextlib.suppress(ConnectionClosed):
            hello = decode_edge_message(await peer.recv(decode=False))
            assert isinstance(hello, Hello)
            self.greetings.append(hello)
            await self.talks[min(number, len(self.talks) - 1)](peer)


def answer(status: int, body: bytes = b"<html>No.</html>", **headers: str) -> Response:
    """An HTTP answer to an upgrade."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, "whatever", Headers(fields | {"content-length": str(len(body))}), body)


def say(*messages: Message | bytes | str, stay: bool = True) -> ChaosSession:
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
        assert script.arrived == 3

    run(scenario())


def test_waits_between_attempts_grow_with_jitter_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def scenario() -> None:
        async with linked("http://127.0.0.1:1"):
            while len(waits) < 14:
                await real(0.01)

    run(scenario())
    first, longest = module.BACKOFF_S
    due = [min(first * 2**n, longest) for n in range(14)]
    assert all(d / 2 <= wait <= d for wait, d in zip(waits, due, strict=False))
    assert len(set(waits)) > 10  # a fleet does not come back in step


def test_after_a_good_connection_it_comes_back_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    first, longest = module.BACKOFF_S
    script = Script(say(WELCOME, stay=False))
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if 0 < seconds <= longest:  # others' are longer: between two pings
            waits.append(seconds)
            await real(0)
        else:
            await real(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def scenario() -> None:
        async with script.listening() as url, linked(url):
            while script.arrived < 6:
                await real(0)

    run(scenario())
    assert len(waits) >= 5
    assert all(first / 2 <= wait <= first for wait in waits)


def test_without_a_verifier_it_gives_up_in_time_and_not_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    script = Script(say(WELCOME))

    async def scenario() -> None:
        async with script.listening() as url:
            pass  # a port where nobody is
        async with linked(url, give_up_s=2.0) as (link, heard):
            waiting = asyncio.ensure_future(link.connected())
            now[0] = 1.9
            for _ in range(3):  # attempts that fail; after each, whoever waits looks at the clock
                assert await heard.get() is LOST
            assert not waiting.done()
            now[0] = 2.1
            with pytest.raises(UnavailableError, match=r"no verifier at ws://.*wisp serve"):
                await waiting
            with pytest.raises(UnavailableError):
                await link.connected()  # at once, this time
            async with script.listening():
                while link.welcome is None:
                    await asyncio.sleep(0.01)
                assert await link.connected() == WELCOME

    run(scenario())


@pytest.mark.parametrize("code", ["version_mismatch", "vocabulary_mismatch"])
def test_permanent_refusals_fail_at_once(code: str) -> None:
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
            heard.append(decode_edge_message(frame))

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


async def until(link: VerifierLink, seen: Callable[[], bool]) -> None:
    """Wait until what an attempt has left behind is as expected."""
    while not seen():
        await asyncio.wait_for(link._changed.wait(), 60)


@pytest.mark.parametrize(
    ("refusal", "why"),
    [
        (answer(200), "HTTP 200, and not from a WISP verifier"),
        (
            answer(302, location="http://portal.example/sign-in"),
            r"redirected to http://portal\.example/sign-in",
        ),
        (answer(302, location="mailto:root@[::1"), "redirected to"),
        (answer(401, www_authenticate="Bearer"), "HTTP 401, and not from a WISP verifier"),
        (answer(403), "HTTP 403, and not from a WISP verifier"),
        (answer(404), "no WISP at this path"),
        (answer(407), "the proxy asks"),
        (answer(502), "HTTP 502, and not from a WISP verifier"),
        (answer(503, b"the model is still loading", x_wisp_error="verifier_unavailable"), "^the model is"),
    ],
    ids=["sign-in page", "redirect", "odd redirect", "401", "403", "404", "407", "502", "loading"],
)
def test_a_proxys_refusal_is_tried_again(refusal: Response, why: str) -> None:
    """A proxy that reconnects, a hotel's sign-in page, a wrong path."""
    script = Script(say(WELCOME), answers=[refusal])

    async def scenario() -> None:
        problems: list[str] = []
        async with script.listening() as url, linked(url, api_key="secret") as (link, heard):
            while not isinstance(await heard.get(), Welcome):
                assert link.fatal is None
                problems.append(link.problem)
            assert len(problems) == 1
            assert re.search(why, problems[0])

    run(scenario())


def test_a_redirect_is_not_followed_with_our_key_or_without() -> None:
    elsewhere = Script(say(WELCOME))

    async def scenario() -> None:
        async with elsewhere.listening() as other:
            script = Script(say(WELCOME), answers=[answer(307, location=f"{other}/v1/sessions")])
            async with script.listening() as url, linked(url, api_key="secret") as (_, heard):
                await next_of(heard, Welcome)
        assert (elsewhere.arrived, script.arrived) == (0, 1)

    run(scenario())


def test_wisps_own_refusal_of_the_key_is_final_until_it_is_taken_back() -> None:
    refusal = answer(401, b"this API key is not known here", x_wisp_error="invalid_api_key")
    script = Script(say(WELCOME), answers=[refusal])

    async def scenario() -> None:
        async with script.listening() as url, linked(url, api_key="secret") as (link, _):
            with pytest.raises(RequestError, match="not known here; set WISP_API_KEY") as error:
                await link.connected()
            assert (error.value.status, error.value.code) == (502, "verifier_unauthorized")
            assert "set WISP_API_KEY" in link.problem  # what /health and the log say
            await until(link, lambda: link.welcome is not None)
            assert await link.connected() == WELCOME

    run(scenario())


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), ImportError("odd"), ValueError("odd"), KeyError("odd")]
)
def test_no_failure_whatever_ends_the_link_in_silence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, left = module.VerifierLink._one_connection, [error] * 3

    async def broken(self: VerifierLink) -> None:
        if left:
            raise left.pop()
        await real(self)

    monkeypatch.setattr(module.VerifierLink, "_one_connection", broken)
    script = Script(say(WELCOME))

    async def scenario() -> None:
        async with script.listening() as url, linked(url) as (link, heard):
            await until(link, lambda: bool(link.problem))
            assert "odd" in link.problem
            await next_of(heard, Welcome)
            assert link.problem == ""

    with caplog.at_level(logging.WARNING):
        run(scenario())
    told = [r for r in caplog.records if "no verifier at" in r.getMessage()]
    assert len(told) == 1  # and not once for each attempt
    assert (told[0].exc_info is not None) == (not isinstance(error, ImportError))


def test_a_refused_connection_and_an_untrusted_certificate_are_told_without_numbers() -> None:
    untrusted = ssl.SSLCertVerificationError(1, "[SSL] certificate verify failed")
    untrusted.verify_message = "self-signed certificate"
    refused = ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 8100)")
    assert reason(refused, "ws://127.0.0.1:8100") == "connection refused"
    assert reason(untrusted, "wss://verifier:8100") == (
        "its certificate is not trusted: self-signed certificate. If it is yours: SSL_CERT_FILE=cert.pem"
    )


@pytest.mark.parametrize(
    ("proxy", "why"),
    [("socks5://127.0.0.1:1", "python-socks"), ("http://me:secret@h:99999", "proxy's address")],
)
def test_a_proxy_that_cannot_be_used_is_named_with_what_to_do(
    proxy: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", proxy)

    async def scenario() -> None:
        async with linked("http://verifier.invalid:8100") as (link, _):
            await until(link, lambda: bool(link.problem))
            assert why in link.problem
            assert "https_proxy" in link.problem
            assert "secret" not in link.problem
            assert "NO_PROXY=verifier.invalid" in link.problem
            assert link.fatal is None

    monkeypatch.setattr("websockets.asyncio.client.connect_socks_proxy", _without_python_socks)
    run(scenario())


async def _without_python_socks(*_: Any, **__: Any) -> None:
    raise ImportError("connecting through a SOCKS proxy requires python-socks")


def test_a_message_too_long_for_the_verifier_is_not_sent_and_cuts_nobody_off() -> None:
    heard: list[Message] = []

    async def listen(peer: ServerConnection) -> None:
        await peer.send(encode(msgspec.structs.replace(WELCOME, max_frame=1000)))
        async for frame in peer:
            assert isinstance(frame, bytes)
            heard.append(decode_edge_message(frame))

    script = Script(listen)

    async def scenario() -> None:
        async with script.listening() as url, linked(url) as (link, events):
            await next_of(events, Welcome)
            with pytest.raises(RequestError, match="shorten the prompt") as error:
                link.send(Open(SESSION, 0, [7] * 1000, Sampling(), 1))
            assert (error.value.status, error.value.code) == (400, "context_length_exceeded")
            short = Open(SESSION, 0, [7] * 900, Sampling(), 1)
            link.send(short)
            link.send(Cancel(SESSION))
            while len(heard) < 2:
                await asyncio.sleep(0.01)
            assert heard == [short, Cancel(SESSION)]
            assert link.reconnects == 0

    run(scenario())


def test_a_device_that_was_frozen_does_not_give_up_on_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for an hour, and what it was connected to is back a moment after it wakes."""
    slept = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + slept[0]))
    script = Script(say(WELCOME))

    async def scenario() -> None:
        async with script.listening() as url:
            pass
        async with linked(url, give_up_s=60.0) as (link, heard):
            waiting = asyncio.ensure_future(link.connected())
            assert await heard.get() is LOST
            slept[0] = 3600.0
            assert await heard.get() is LOST  # an attempt, and each waiting session has looked at the clock
            late = asyncio.ensure_future(link.connected())
            assert await heard.get() is LOST
            async with script.listening():
                assert await waiting == await late == WELCOME

    run(scenario())


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


def test_a_verdict_that_cannot_be_ends_the_connection_and_reaches_no_session() -> None:
    wrong = Verdict(SESSION, 0, 0, 0, [WELCOME.n_vocab])

    async def scenario() -> None:
        script = Script(say(WELCOME, wrong), say(WELCOME, Verdict(SESSION, 0, 0, 0, [5])))
        async with script.listening() as url, linked(url) as (link, heard):
            first = await next_of(heard, Verdict)
            assert isinstance(first, Verdict)
            assert first.tokens == [5]
            assert link.reconnects == 1

    run(scenario())


def test_a_refused_frame_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        script = Script(say(WELCOME, Refused("", "odd", "a\nb\x1b[2J"), Verdict(SESSION, 0, 0, 0, [5])))
        async with script.listening() as url, linked(url) as (_, heard):
            await next_of(heard, Verdict)

    with caplog.at_level(logging.WARNING):
        run(scenario())
    said = [r.getMessage() for r in caplog.records if "refused a frame" in r.getMessage()]
    assert said == ["the verifier refused a frame: a b?[2J (odd)"]


# --- cancelled in the turn in which what was waited for is there


def test_a_link_that_is_closed_as_the_welcome_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        closing: list[asyncio.Task[None]] = []
        heard = ClientConnection.recv

        async def recv(connection: ClientConnection, *args: Any, **options: Any) -> Any:
            frame = await heard(connection, *args, **options)
            if not closing:
                closing.append(asyncio.ensure_future(link.close()))
            return frame

        monkeypatch.setattr(ClientConnection, "recv", recv)
        async with Script(say(WELCOME)).listening() as url:
            link = VerifierLink(url)
            link.start()
            while not closing:
                await asyncio.sleep(0)
            await closing[0]

    run(scenario())


async def turns(n: int) -> None:
    """Let the event loop go round so often."""
    for _ in range(n):
        await asyncio.sleep(0)


@pytest.mark.parametrize("later", range(4))
def test_who_leaves_as_the_verifier_comes_back_has_left(later: int) -> None:
    async def scenario() -> None:
        link = VerifierLink("http://127.0.0.1:9")

        async def client() -> None:
            await link.connected()
            await asyncio.Event().wait()

        waiting = asyncio.ensure_future(client())
        await turns(5)
        link._gain(WELCOME)
        await turns(later)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario())


@pytest.mark.parametrize("later", range(4))
def test_an_answer_whose_client_leaves_as_the_verifier_comes_back_is_over(later: int) -> None:
    async def scenario() -> None:
        link = VerifierLink("http://127.0.0.1:9")
        link._gain(WELCOME)
        edge = EdgeBackend(link, cast("Any", None), None, Policies("fixed:1"))
        deltas = edge.generate(Generation([1, 2], Sampling(), 10, False, None, None, "", "d1"))
        reading = asyncio.ensure_future(anext(deltas))
        await turns(5)
        link._lose()
        await turns(5)
        assert edge.sessions == 1
        link._gain(WELCOME)
        await turns(later)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert edge.sessions == 0
        edge.close()

    run(scenario())
