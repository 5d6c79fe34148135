"""Grammars are compiled beside the event loop: their sessions wait, others do not."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable

import pytest

from waiting import run
from wisp.api.prepare import AT_ONCE
from wisp.core.errors import GrammarBusyError, GrammarError
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.edits import Matcher
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission, KeyLimits
from wisp.engines.grammars import Grammars
from wisp.engines.null import NullTarget
from wisp.engines.plain import PlainTokenizer
from wisp.server.compiling import MOST_MESSAGES
from wisp.server.host import VerifierHost

LAMP = Grammar("choice", '["the lamp"]')


class Slow(Grammars):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__(PlainTokenizer())
        self.go = threading.Event()
        self.compiled: list[str] = []

    def compile(self, grammar: Grammar, key: str = "") -> None:
        self.go.wait()
        self.compiled.append(grammar.source)
        if grammar.source == "broken":
            raise RuntimeError("a bug")
        if grammar.source == "busy":
            raise GrammarBusyError("no process to try this grammar in")
        super().compile(grammar, key)

    def matcher(self, grammar: Grammar) -> Matcher:
        if not self.go.is_set():
            raise GrammarError("asked for before it is compiled")
        return super().matcher(grammar)


Scenario = Callable[[VerifierHost, Slow], Awaitable[None]]


def with_host(scenario: Scenario, admission: Admission | None = None) -> None:
    async def main() -> None:
        engine = NullTarget(slots=4)
        engine.constraints.grammars = grammars = Slow()
        host = VerifierHost(engine, PlainTokenizer(), admission or Admission(100), model="null")
        try:
            await scenario(host, grammars)
        finally:
            grammars.go.set()
            host.stop()

    run(main())


class Peer:
    """A connection, and what it is told."""

    def __init__(self, host: VerifierHost, key: str = "") -> None:
        self.host = host
        self.heard: asyncio.Queue[Verdict | Refused] = asyncio.Queue()
        self.connection = host.attach(key, self.heard.put_nowait)

    def open(self, session: str, grammar: Grammar | None, *, draft: list[int] | None = None) -> None:
        sampling = Sampling(constraints=Constraints(grammar=grammar) if grammar else None)
        open_ = Open(session, 0, [1, 2], sampling, 20, draft=draft or [], digest=self.host.limits.digest)
        self.host.receive(self.connection, open_)

    async def verdict(self) -> Verdict:
        message = await self.heard.get()
        assert isinstance(message, Verdict), message
        return message

    async def refused(self) -> Refused:
        message = await self.heard.get()
        assert isinstance(message, Refused), message
        return message


def test_a_session_waits_for_its_grammar_and_nobody_else_does() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer = Peer(host)
        peer.open("with-grammar", LAMP, draft=list(b"the"))
        peer.open("without-one", None)
        assert (await peer.verdict()).session == "without-one"
        assert host.n_sessions == 1
        grammars.go.set()
        verdict = await peer.verdict()
        assert (verdict.session, bytes(verdict.tokens), verdict.accepted) == ("with-grammar", b"the ", 3)

    with_host(scenario)


def test_frames_after_a_waiting_open_wait_behind_it() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer = Peer(host)
        peer.open("with-grammar", LAMP)
        host.receive(peer.connection, Draft("with-grammar", 1, 0, list(b"the lamp")))
        grammars.go.set()
        tokens = (await peer.verdict()).tokens
        if len(tokens) < 9:
            tokens = tokens[:1] + (await peer.verdict()).tokens[1:]
        assert tokens == [*b"the lamp", 256]

    with_host(scenario)


def test_a_grammar_that_cannot_be_compiled_is_refused_with_its_reason() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        grammars.go.set()
        peer = Peer(host)
        peer.open("not-a-regex", Grammar("regex", "(a"))
        refused = await peer.refused()
        assert (refused.session, refused.code, refused.fatal, refused.retry_after) == (
            "not-a-regex", "invalid_grammar", True, 0.0,
        )  # fmt: skip
        assert "unclosed group" in refused.message
        peer.open("our-own-bug", Grammar("regex", "broken"))
        assert "log" in (await peer.refused()).message
        assert host.n_sessions == 0

    with_host(scenario)


def test_a_grammar_that_is_not_to_blame_may_be_tried_again() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        grammars.go.set()
        peer = Peer(host)
        peer.open("the-session", Grammar("regex", "busy"))
        refused = await peer.refused()
        assert (refused.code, refused.fatal, refused.retry_after) == ("overloaded", True, 1.0)
        assert "no process" in refused.message

    with_host(scenario)


def test_a_second_session_with_the_same_grammar_does_not_wait() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        grammars.go.set()
        peer = Peer(host)
        peer.open("the-first", LAMP)
        await peer.verdict()
        peer.open("the-second", LAMP)
        assert host.verifier.knows("the-second")
        assert len(grammars.compiled) == 1

    with_host(scenario)


def test_grammars_of_waiting_sessions_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are kept, and more than there are slots."""
    monkeypatch.setattr("wisp.engines.grammars.KEPT", 1)
    made: list[str] = []
    compiled = Grammars._compiled

    def counted(self: Grammars, grammar: Grammar) -> object:
        made.append(grammar.source)
        return compiled(self, grammar)

    monkeypatch.setattr(Grammars, "_compiled", counted)

    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer, lamps = Peer(host), [Grammar("choice", json.dumps([f"lamp {i}"])) for i in range(12)]
        names = [f"session-{i}" for i in range(12)]
        for name, lamp in zip(names, lamps, strict=True):
            peer.open(name, lamp)
        held = [lamp.source for lamp in lamps]
        del lamp, lamps  # sessions alone have them now
        grammars.go.set()
        while names:
            session = (await peer.verdict()).session
            names.remove(session)
            host.receive(peer.connection, Cancel(session))  # the next one has its slot
        assert sorted(made) == sorted(held)

    with_host(scenario)


def test_cancelled_and_lost_sessions_are_not_opened() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer, gone = Peer(host), Peer(host)
        peer.open("cancelled-one", LAMP)
        host.receive(peer.connection, Cancel("cancelled-one"))
        gone.open("of-a-lost-peer", LAMP)
        host.detach(gone.connection)
        grammars.go.set()
        peer.open("the-last-one", None)
        while (await peer.verdict()).session != "the-last-one":
            pass
        while host.verifier.running or host._compiling._tasks:
            await asyncio.sleep(0)
        assert not host.verifier.knows("of-a-lost-peer")
        assert not host.verifier.knows("cancelled-one")

    with_host(scenario)


def test_nothing_is_compiled_for_a_key_that_may_open_nothing() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        grammars.go.set()
        peer = Peer(host, "limited")
        peer.open("the-first", None)
        await peer.verdict()
        peer.open("the-second", LAMP)
        assert (await peer.refused()).code == "rate_limit_exceeded"
        assert grammars.compiled == []

    with_host(scenario, Admission(100, {"limited": KeyLimits(sessions=1)}))


def test_another_open_under_the_same_name_waits_for_its_own_grammar() -> None:
    """Otherwise the engine would compile it, while all others wait."""

    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer, other = Peer(host), Grammar("choice", '["the door"]')
        peer.open("the-session", LAMP)
        host.receive(peer.connection, Cancel("the-session"))
        peer.open("the-session", other)
        grammars.go.set()
        while bytes((await peer.verdict()).tokens[:1]) != b"t":
            pass
        assert other.source in grammars.compiled

    with_host(scenario)


def test_as_many_sessions_wait_as_may_be_open() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer = Peer(host)
        for i in range(3):
            peer.open(f"session-{i}", Grammar("choice", f'["{i}"]'))
        refused = await peer.refused()
        assert (refused.session, refused.code, refused.fatal) == ("session-2", "overloaded", True)
        assert refused.retry_after > 0

    with_host(scenario, Admission(2))


def test_too_many_messages_behind_an_open_are_refused() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer = Peer(host)
        peer.open("with-grammar", LAMP)
        for i in range(MOST_MESSAGES):
            host.receive(peer.connection, Draft("with-grammar", i + 1, 0, [1]))
        refused = await peer.refused()
        assert (refused.code, refused.round, refused.fatal) == ("overloaded", MOST_MESSAGES, False)

    with_host(scenario)


def test_nothing_is_compiled_for_who_has_gone() -> None:
    async def scenario(host: VerifierHost, grammars: Slow) -> None:
        peer, gone = Peer(host), Peer(host)
        for i in range(8):
            gone.open(f"session-{i}", Grammar("choice", f'["{i}"]'))
        await asyncio.sleep(0)
        host.detach(gone.connection)
        grammars.go.set()
        peer.open("the-last-one", LAMP)
        await peer.verdict()
        assert len(grammars.compiled) <= AT_ONCE + 1

    with_host(scenario)
