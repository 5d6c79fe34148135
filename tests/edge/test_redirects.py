"""An edge behind a router that is a script: it follows redirects, comes back, goes on from what is committed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from unittest.mock import patch

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from waiting import PATIENCE_S, run
from wisp.api.backend import Generation
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.signals import Signal
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.messages import (
    VERSION,
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
from wisp.core.protocol.sampling import Sampling
from wisp.edge import backend as backend_module
from wisp.edge import link as link_module
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.engines.base import DraftEngine, Proposal, Tokenizer

WELCOME = Welcome(VERSION, "m", "f", 1000, [999], 512, 64, digest="d1")
TOKENS = 8
TRUTH = [100 + position for position in range(TOKENS)]
NEVER_S = 2 * PATIENCE_S  # longer than any test waits


class Listener(ABC):
    """Something that listens for edges on a port of its own. `said` is all that they said."""

    def __init__(self) -> None:
        self.welcome = WELCOME
        self.said: list[Message] = []
        self.connections = 0
        self.closed = 0
        self.refusals: list[Response] = []  # of the next upgrades
        self.address = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        port = int(self.address[1:] or 0)  # the same as before, if it listened before
        async with serve(
            self._talk, "127.0.0.1", port, compression=None, process_request=self._refuse
        ) as server:
            self.address = f":{server.sockets[0].getsockname()[1]}"
            yield f"http://127.0.0.1{self.address}"

    def _refuse(self, peer: ServerConnection, request: Request) -> Response | None:
        return self.refusals.pop() if self.refusals else None

    async def _talk(self, peer: ServerConnection) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionClosed):
            hello = decode_edge_message(await peer.recv(decode=False))
            assert isinstance(hello, Hello)
            assert hello.redirects
            await peer.send(encode(self.welcome))
            async for frame in peer:
                assert isinstance(frame, bytes)
                message = decode_edge_message(frame)
                self.said.append(message)
                if isinstance(message, Open):
                    await self.opened(peer, message)
                elif isinstance(message, Draft):
                    await self.drafted(peer, message)
        self.closed += 1

    @property
    def opens(self) -> list[Open]:
        return [m for m in self.said if isinstance(m, Open)]

    @abstractmethod
    async def opened(self, peer: ServerConnection, message: Open) -> None:
        """What to say to an Open."""

    async def drafted(self, peer: ServerConnection, message: Draft) -> None:
        """What to say to a Draft."""
        return


class FakeRouter(Listener):
    """Sends every session to what `where` says of its Open."""

    def __init__(self, where: Callable[[Open], str]) -> None:
        super().__init__()
        self.where = where

    async def opened(self, peer: ServerConnection, message: Open) -> None:
        await peer.send(encode(Redirect(message.session, self.where(message))))


class FakeVerifier(Listener):
    """Decodes TRUTH, but does `stumble` once it has said `tokens` of an answer."""

    def __init__(self, tokens: int = TOKENS, stumble: str = "") -> None:
        super().__init__()
        self.tokens = tokens
        self.stumble = stumble

    async def opened(self, peer: ServerConnection, message: Open) -> None:
        for at in range(len(message.committed), TOKENS):
            if self.stumble and at >= self.tokens:
                break
            finish = "length" if at == TOKENS - 1 else ""
            await peer.send(encode(Verdict(message.session, message.round, at, 0, [TRUTH[at]], finish)))
        else:
            return
        if self.stumble == "hang up":
            await peer.close()
        else:
            await peer.send(encode(Refused(message.session, self.stumble, "not here", fatal=True)))


class NoTokenizers:
    async def get(self, fingerprint: str) -> Tokenizer:
        raise AssertionError("token ids are enough here")


class Prophet:
    """Drafts the truth."""

    name = "prophet"

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        return Proposal(TRUTH[position], Signal(confidence=1.0)) if position < TOKENS else None

    def forget(self, session: str) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def device(
    url: str, give_up_s: float = NEVER_S, drafter: DraftEngine | None = None
) -> AsyncIterator[EdgeBackend]:
    """An edge that never drafts, but for one with a drafter: that one drafts ahead."""
    link = VerifierLink(url, give_up_s=give_up_s)
    backend = EdgeBackend(link, NoTokenizers(), drafter, Policies("fixed:2"), Ahead(0.0))
    link.start()
    try:
        yield backend
    finally:
        await link.close()
        backend.close()


async def answer(backend: EdgeBackend) -> list[int]:
    generation = Generation([1, 2, 3], Sampling(seed=7), TOKENS)
    return [token async for item in backend.generate(generation) for token in item.tokens]


def free_address() -> str:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f":{probe.getsockname()[1]}"


def test_a_session_says_the_same_where_it_is_redirected_to_and_all_share_one_connection() -> None:
    async def scenario() -> None:
        verifier = FakeVerifier()
        router = FakeRouter(lambda _: verifier.address)
        async with verifier.listening(), router.listening() as url, device(url) as edge:
            assert await asyncio.gather(*(answer(edge) for _ in range(5))) == [TRUTH] * 5
        assert verifier.connections == 1
        assert sorted(router.opens, key=str) == sorted(verifier.opens, key=str)
        assert not any(isinstance(m, Cancel) for m in verifier.said + router.said)

    run(scenario())


@pytest.mark.parametrize("stumble", ["hang up", "shutting_down", "overloaded"])
def test_a_session_whose_verifier_goes_is_continued_by_another(stumble: str) -> None:
    async def scenario() -> None:
        first, second = FakeVerifier(3, stumble), FakeVerifier()
        router = FakeRouter(lambda open_: second.address if open_.epoch else first.address)
        async with first.listening(), second.listening(), router.listening() as url, device(url) as edge:
            assert await answer(edge) == TRUTH
        assert [o.committed for o in router.opens] == [[], TRUTH[:3]]
        assert [o.committed for o in second.opens] == [TRUTH[:3]]
        assert second.opens[0].avoid == ("" if stumble == "hang up" else first.address)

    run(scenario())


def test_the_router_is_told_which_address_was_of_no_use() -> None:
    async def scenario() -> None:
        dead, verifier = free_address(), FakeVerifier()
        router = FakeRouter(lambda open_: verifier.address if open_.avoid == dead else dead)
        async with verifier.listening(), router.listening() as url, device(url) as edge:
            assert await answer(edge) == TRUTH
        assert [o.avoid for o in router.opens] == ["", dead]

    run(scenario())


@pytest.mark.parametrize("address", ["dead", "http://example.org", "a b:80", ""])
def test_a_router_that_only_sends_astray_is_given_up_in_time(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time passes while the session waits at home, and only then."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(link_module, "time", clock)
    monkeypatch.setattr(backend_module, "time", clock)
    reopen = backend_module._Session._reopen

    def waited(session: backend_module._Session, after_s: float) -> None:
        now[0] += after_s
        reopen(session, 0.0)

    monkeypatch.setattr(backend_module._Session, "_reopen", waited)

    async def scenario() -> None:
        astray = free_address() if address == "dead" else address
        router = FakeRouter(lambda _: astray)
        async with router.listening() as url, device(url, give_up_s=0.5) as edge:
            with pytest.raises(UnavailableError, match="is that port open"):
                await answer(edge)
        assert 0.5 < now[0] < 2.0
        assert 3 <= len(router.opens) < 8  # and it is not stormed meanwhile

    run(scenario())


def test_a_request_that_kills_every_verifier_does_not_go_round_for_ever() -> None:
    async def scenario() -> None:
        verifiers = [FakeVerifier(0, "hang up") for _ in range(2)]
        router = FakeRouter(lambda open_: verifiers[open_.epoch % 2].address)
        async with contextlib.AsyncExitStack() as stack:
            for verifier in verifiers:
                await stack.enter_async_context(verifier.listening())
            url = await stack.enter_async_context(router.listening())
            edge = await stack.enter_async_context(device(url))
            await edge.link.connected()
            edge.link.patience.give_up_s = 1.0
            with pytest.raises(RequestError, match="6 verifiers in a row") as error:
                await answer(edge)
            assert (error.value.status, error.value.code) == (502, "verifiers_lost")
        assert sum(len(v.opens) for v in verifiers) == 6  # neither fewer, nor a storm of them

    run(scenario())


class StrictVerifier(FakeVerifier):
    """Answers each Open and each Draft once, and decodes nothing by itself. It dies before its `dies`th answer."""

    def __init__(self, dies: int = 1000) -> None:
        super().__init__()
        self.answers = dies

    async def opened(self, peer: ServerConnection, message: Open) -> None:
        await self._answer(peer, message.session, message.round, len(message.committed), message.draft)

    async def drafted(self, peer: ServerConnection, message: Draft) -> None:
        assert self.opens, "a draft before the Open"
        await self._answer(peer, message.session, message.round, message.base, message.tokens)

    async def _answer(
        self, peer: ServerConnection, session: str, round_: int, base: int, draft: list[int]
    ) -> None:
        self.answers -= 1
        if not self.answers:
            await peer.close()
            return
        assert draft == TRUTH[base : base + len(draft)]
        tokens = TRUTH[base : base + len(draft) + 1]
        finish = "length" if base + len(tokens) == TOKENS else ""
        await peer.send(encode(Verdict(session, round_, base, len(draft), tokens, finish)))


@pytest.mark.parametrize("dies", [1000, 2])
def test_a_draft_made_ahead_of_the_answer_to_an_open_goes_where_the_session_goes(dies: int) -> None:
    """Nobody else would decode what it bet on: the session would wait for ever."""

    class LateRouter(FakeRouter):
        """Redirects when the draft that was sent ahead is here, which it refuses, as routers do."""

        async def opened(self, peer: ServerConnection, message: Open) -> None:
            if message.epoch:
                await super().opened(peer, message)

        async def drafted(self, peer: ServerConnection, message: Draft) -> None:
            await peer.send(
                encode(Refused(message.session, "unknown_session", "a router", round=message.round))
            )
            if not self.opens[-1].epoch:
                await super().opened(peer, self.opens[-1])

    async def scenario() -> None:
        first, second = StrictVerifier(dies), StrictVerifier()
        router = LateRouter(lambda open_: second.address if open_.epoch else first.address)
        async with first.listening(), second.listening(), contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(router.listening())
            edge = await stack.enter_async_context(device(url, drafter=Prophet()))
            assert await answer(edge) == TRUTH
        assert len(router.opens) == (1 if dies > 2 else 2)
        ahead = next(m for m in first.said if isinstance(m, Draft))
        assert ahead == next(m for m in router.said if isinstance(m, Draft))
        assert first.said.index(ahead) == 1  # right behind the Open

    run(scenario())


def test_a_replica_of_another_model_is_not_let_go_on() -> None:
    async def scenario() -> None:
        verifier = FakeVerifier()
        verifier.welcome = msgspec.structs.replace(WELCOME, digest="d2")
        router = FakeRouter(lambda _: verifier.address)
        async with verifier.listening(), router.listening() as url, device(url) as edge:
            with pytest.raises(RequestError, match="not the one that this answer was begun with") as caught:
                await answer(edge)
            assert caught.value.code == "model_changed"
        assert verifier.opens == []

    run(scenario())


@pytest.mark.parametrize("change", [{"digest": "d2"}, {"model": "another name"}])
def test_a_verifier_that_comes_back_goes_on_if_its_weights_are_the_same(change: dict[str, str]) -> None:
    """It hangs up in mid-answer, and is another when the edge finds it again."""

    class Exchanged(FakeVerifier):
        async def opened(self, peer: ServerConnection, message: Open) -> None:
            self.stumble = "" if len(self.opens) > 1 else "hang up"
            self.welcome = msgspec.structs.replace(WELCOME, **change)
            await super().opened(peer, message)

    async def scenario() -> None:
        verifier = Exchanged(3)
        async with verifier.listening() as url, device(url) as edge:
            if "digest" in change:
                with pytest.raises(RequestError, match="other weights") as caught:
                    await answer(edge)
                assert caught.value.code == "model_changed"
                assert len(verifier.opens) == 1
            else:
                assert await answer(edge) == TRUTH
                assert [(o.digest, o.committed) for o in verifier.opens] == [("d1", []), ("d1", TRUTH[:3])]
            assert await answer(edge) == TRUTH  # a new one is for whoever is there
            assert verifier.opens[-1].digest == verifier.welcome.digest

    run(scenario())


def test_a_prompt_that_was_encoded_for_the_model_before_is_not_answered_by_this_one() -> None:
    """The verifier was exchanged between the two: its tokens may mean other words now."""

    async def scenario() -> None:
        verifier = FakeVerifier()
        async with verifier.listening() as url, device(url) as edge:
            generation = Generation([1, 2, 3], Sampling(seed=7), TOKENS, digest="d0")
            with pytest.raises(RequestError, match="other weights"):
                async for _ in edge.generate(generation):
                    pass
        assert verifier.opens == []

    run(scenario())


def test_a_session_that_is_redirected_does_not_need_the_router() -> None:
    class SlowVerifier(FakeVerifier):
        async def opened(self, peer: ServerConnection, message: Open) -> None:
            working.set()
            await router_is_gone.wait()
            await super().opened(peer, message)

    working, router_is_gone = asyncio.Event(), asyncio.Event()

    async def scenario() -> None:
        verifier = SlowVerifier()
        router = FakeRouter(lambda _: verifier.address)
        async with verifier.listening(), contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(router.listening())
            async with device(url) as edge:
                answering = asyncio.ensure_future(answer(edge))
                await working.wait()
                await stack.aclose()
                edge.link.patience.give_up_s = 0.0
                while edge.link.welcome is not None:
                    await asyncio.sleep(0.01)
                with pytest.raises(UnavailableError):
                    await edge.link.connected()
                router_is_gone.set()
                assert await answering == TRUTH

    run(scenario())


class Stumbling(FakeVerifier):
    """Hangs up after three tokens, once, and then does what is asked of it."""

    def __init__(self, then: Callable[[Stumbling], object]) -> None:
        super().__init__(3, "hang up")
        self.then = then

    async def opened(self, peer: ServerConnection, message: Open) -> None:
        await super().opened(peer, message)
        if self.stumble:
            self.stumble = ""
            self.then(self)


def test_an_answer_under_way_outlives_a_proxy_that_refuses_for_a_moment() -> None:
    def refuse(verifier: Stumbling) -> None:
        verifier.refusals = [Response(status, "no", Headers(), b"proxy") for status in (401, 403, 404, 502)]

    async def scenario() -> None:
        verifier = Stumbling(refuse)
        async with verifier.listening() as url, device(url, give_up_s=60.0) as edge:
            assert await answer(edge) == TRUTH
        assert not verifier.refusals

    run(scenario())


def test_an_answer_under_way_ends_when_its_key_is_refused() -> None:
    def refuse(verifier: Stumbling) -> None:
        headers = Headers({"x-wisp-error": "invalid_api_key"})
        verifier.refusals = [Response(401, "no", headers, b"not known here")] * 100

    async def scenario() -> None:
        verifier = Stumbling(refuse)
        async with verifier.listening() as url, device(url, give_up_s=60.0) as edge:
            with pytest.raises(RequestError, match="not known here") as error:
                await answer(edge)
        assert error.value.code == "verifier_unauthorized"

    run(scenario())


def test_a_device_that_sleeps_in_mid_answer_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + slept[0])
    monkeypatch.setattr(link_module, "time", clock)
    monkeypatch.setattr(backend_module, "time", clock)

    async def scenario() -> None:
        gone = asyncio.Event()
        verifier = Stumbling(lambda _: gone.set())
        async with contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(verifier.listening())
            async with device(url, give_up_s=60.0) as edge:
                answering = asyncio.ensure_future(answer(edge))
                await gone.wait()
                await stack.aclose()
                heard: asyncio.Queue[object] = asyncio.Queue()
                edge.link.listen("somebody else", heard.put_nowait)
                for slept[0] in (0.0, 1000.0, 5000.0):
                    await heard.get()  # another attempt has failed
                    await heard.get()
                async with verifier.listening():
                    assert await answering == TRUTH

    run(scenario())


def test_a_prompt_too_long_for_the_way_fails_alone() -> None:
    async def scenario() -> None:
        verifier = FakeVerifier()
        verifier.welcome = msgspec.structs.replace(WELCOME, context=10**6, max_frame=2000)
        async with verifier.listening() as url, device(url) as edge:
            with pytest.raises(RequestError, match="shorten the prompt") as error:
                await anext(edge.generate(Generation([7] * 2000, Sampling(seed=7), TOKENS)))
            assert error.value.status == 400
            assert await answer(edge) == TRUTH
        assert verifier.connections == 1

    run(scenario())


def test_messages_of_the_router_after_a_redirect_are_ignored() -> None:
    class TalkativeRouter(FakeRouter):
        async def opened(self, peer: ServerConnection, message: Open) -> None:
            with patch.object(peer.transport, "write") as write:  # both in one packet
                await super().opened(peer, message)
                await peer.send(encode(Refused(message.session, "overloaded", "or not", fatal=True)))
            peer.transport.write(b"".join(call.args[0] for call in write.call_args_list))

    async def scenario() -> None:
        verifier = FakeVerifier()
        router = TalkativeRouter(lambda _: verifier.address)
        async with verifier.listening(), router.listening() as url, device(url) as edge:
            assert await answer(edge) == TRUTH
        assert len(router.opens) == 1

    run(scenario())


def test_the_wait_for_a_router_begins_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for longer than anyone waits, and nobody minded."""
    monkeypatch.setattr(link_module, "BACKOFF_S", (0.05, 0.1))

    class PatientVerifier(FakeVerifier):
        async def opened(self, peer: ServerConnection, message: Open) -> None:
            working.set()
            await router_was_away.wait()
            await super().opened(peer, message)

    working, router_was_away = asyncio.Event(), asyncio.Event()

    async def scenario() -> None:
        first, second = PatientVerifier(3, "hang up"), FakeVerifier()
        router = FakeRouter(lambda open_: second.address if open_.epoch else first.address)
        async with first.listening(), second.listening(), contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(router.listening())
            async with device(url) as edge:
                answering = asyncio.ensure_future(answer(edge))
                await working.wait()
                await stack.aclose()
                while edge.link.welcome is not None:
                    await asyncio.sleep(0.01)
                edge.link.patience._lost -= 2 * NEVER_S
                router_was_away.set()
                while not first.closed:
                    await asyncio.sleep(0.01)
                async with router.listening():
                    assert await answering == TRUTH

    run(scenario())


def test_a_user_that_leaves_cancels_where_the_session_is() -> None:
    class SilentVerifier(FakeVerifier):
        async def opened(self, peer: ServerConnection, message: Open) -> None:
            pass

    async def scenario() -> None:
        verifier = SilentVerifier()
        router = FakeRouter(lambda _: verifier.address)
        async with verifier.listening(), router.listening() as url, device(url) as edge:
            answering = asyncio.ensure_future(answer(edge))
            while not verifier.opens:
                await asyncio.sleep(0.01)
            answering.cancel()
            while not any(isinstance(m, Cancel) for m in verifier.said):
                await asyncio.sleep(0.01)
        assert not any(isinstance(m, Cancel) for m in router.said)

    run(scenario())


def test_a_connection_without_sessions_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "IDLE_S", 0.05)

    async def scenario() -> None:
        verifier = FakeVerifier()
        router = FakeRouter(lambda _: verifier.address)
        async with verifier.listening(), router.listening() as url, device(url) as edge:
            assert await answer(edge) == TRUTH
            while not verifier.closed:
                await asyncio.sleep(0.01)
            assert router.closed == 0
            assert await answer(edge) == TRUTH  # by a new one
        assert verifier.connections == 2

    run(scenario())
