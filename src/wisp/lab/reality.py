"""Holds `lab.replay` against reality: a verifier process, a real edge, a socket between them, and both models.

`Edge.generate` lets a real edge generate what a trace was recorded of, and notes every event that its `Drafter`
sees. `fed_back` gives these events, with their times, to a fresh `Drafter` whose proposals and verdicts come from
the trace. `DelayedLine` and `PacedDraft` emulate a distant verifier and a slow device, for `lab.ahead`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import httpx
import msgspec

from wisp.api.backend import Generation
from wisp.core.drafter import Action, Drafter
from wisp.core.drafting import Ahead, Policies
from wisp.core.messages import Draft, Open, Verdict
from wisp.core.pace import Pace
from wisp.core.sampling import Sampling
from wisp.core.signals import Signal
from wisp.core.work import Committed
from wisp.edge import backend
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.base import DraftEngine, Proposal
from wisp.lab.children import Child, Children, free_ports
from wisp.lab.devices import Device, Link, Server
from wisp.lab.replay import Bench, Tally, _Generation
from wisp.lab.traces.format import Trace

# --- what happened on a real edge


@dataclass(frozen=True)
class Connected:
    """`Drafter.connected` was called."""

    now_ms: float
    max_draft: int


@dataclass(frozen=True)
class Asked:
    """`Drafter.wants_token` was called, and said `wants`."""

    now_ms: float
    wants: bool


@dataclass(frozen=True)
class Proposed:
    """`Drafter.proposed` was called."""

    now_ms: float
    token: int | None
    took_ms: float


@dataclass(frozen=True)
class Heard:
    """`Drafter.verdict` was called."""

    now_ms: float
    verdict: Verdict
    arrived_ms: float


Event = Connected | Asked | Proposed | Heard


class Told(msgspec.Struct, frozen=True):
    """One verdict as its user saw it."""

    base: int
    drafted: int
    accepted: int


@dataclass
class Story:
    """One generation: events in, messages out, and what was committed."""

    events: list[Event] = field(default_factory=list)
    messages: list[Open | Draft] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rounds: list[Told] = field(default_factory=list)
    finish: str = ""
    time_ms: float = 0.0  # from the first commitment to the last
    timed_tokens: int = 0  # committed in this time

    def took(self, actions: list[Action]) -> None:
        """Note what the drafter did."""
        for action in actions:
            if isinstance(action, Open | Draft):
                self.messages.append(action)
            elif isinstance(action, Committed):
                self.rounds.append(Told(len(self.tokens), action.drafted, action.accepted))
                self.tokens += action.tokens
                self.finish = action.finish

    @property
    def drafts(self) -> list[tuple[int, int, list[int], bool]]:
        """Every message to the verifier: round, base, tokens, and whether it is to decode by itself."""
        return [
            (m.round, len(m.committed), m.draft, m.serve)
            if isinstance(m, Open)
            else (m.round, m.base, m.tokens, m.serve)
            for m in self.messages
        ]


class _NotingDrafter(Drafter):
    """The edge's own, which also writes its story."""

    story: Story

    def wants_token(self, now_ms: float) -> bool:
        wants = super().wants_token(now_ms)
        self.story.events.append(Asked(now_ms, wants))
        return wants

    def connected(self, now_ms: float, max_draft: int) -> list[Action]:
        self.story.events.append(Connected(now_ms, max_draft))
        return self._noted(super().connected(now_ms, max_draft))

    def proposed(
        self, now_ms: float, token: int | None, signal: Signal, took_ms: float = 0.0
    ) -> list[Action]:
        self.story.events.append(Proposed(now_ms, token, took_ms))
        return self._noted(super().proposed(now_ms, token, signal, took_ms))

    def verdict(self, now_ms: float, verdict: Verdict, arrived_ms: float | None = None) -> list[Action]:
        self.story.events.append(Heard(now_ms, verdict, now_ms if arrived_ms is None else arrived_ms))
        return self._noted(super().verdict(now_ms, verdict, arrived_ms))

    def _noted(self, actions: list[Action]) -> list[Action]:
        self.story.took(actions)
        return actions


class Edge:
    """A real edge of this process, with a connection to `server`. `draft` stays the caller's."""

    def __init__(self, server: str, draft: DraftEngine, policies: Policies, ahead: Ahead | None) -> None:
        self._link = VerifierLink(server)
        self._backend = EdgeBackend(self._link, TokenizerCache(server), _Lent(draft), policies, ahead)

    async def __aenter__(self) -> Edge:
        self._link.start()
        await self._link.connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._link.close()
        self._backend.close()

    async def generate(self, prompt: list[int], sampling: Sampling, max_tokens: int) -> Story:
        """One generation, to its end."""
        story = Story()
        noting = type("Noting", (_NotingDrafter,), {"story": story})
        first_at = 0.0
        with patch.object(backend, "Drafter", noting):
            async for item in self._backend.generate(Generation(prompt, sampling, max_tokens)):
                if not first_at:
                    first_at = time.monotonic()
                else:
                    story.timed_tokens += len(item.tokens)
        story.time_ms = (time.monotonic() - first_at) * 1e3
        return story


class _Lent:
    """A draft engine that outlives the edge."""

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self.name = engine.name
        self.propose = engine.propose
        self.forget = engine.forget

    def close(self) -> None:
        return None


@contextlib.contextmanager
def verifier(target: str = "tiny-target") -> Iterator[Child]:
    """`wisp serve` in exact mode, as a child process, until the context is left."""
    (port,) = free_ports(1)
    words = ["-m", "wisp.cli", "serve", "--target", target, "--mode", "exact", "--threads", "1"]
    words += ["--slots", "4", "--context", "1024", "--port", str(port)]
    with Children() as children, httpx.Client(trust_env=False, verify=False) as client:
        child = children.start("verifier", words, port)
        child.wait_healthy(client)
        yield child


# --- the same, with the trace in place of models and processes


def fed_back(
    stories: Sequence[Story], traces: Sequence[Trace], policies: Policies, ahead: Ahead | None
) -> list[Story]:
    """What a replay's `Drafter` makes of the recorded events: proposals, signals and verdicts are the trace's.

    Only times and the order of things are taken from the `stories`, which are those of one edge, in order.
    """
    pace = Pace()
    told = []
    for story, trace in zip(stories, traces, strict=True):
        bench = Bench(Device("", 1.0), Link(0.0), Server("", 0.0, 0.0))
        replayed = _Generation(trace, bench, policies, ahead, pace.successor(), Tally(), random.Random(0))
        told.append(_feed(story, replayed))
        pace = replayed.drafter.pace
    return told


def _feed(story: Story, replayed: _Generation) -> Story:
    drafter, again = replayed.drafter, Story()
    answered: set[int] = set()
    for event in story.events:
        match event:
            case Connected(now, max_draft):
                again.events.append(event)
                again.took(drafter.connected(now, max_draft))
            case Asked(now):
                again.events.append(Asked(now, drafter.wants_token(now)))
            case Proposed(now, _, took):
                token, signal = replayed._recorded()
                again.events.append(Proposed(now, token, took))
                again.took(drafter.proposed(now, token, signal, took))
            case Heard(now, verdict, arrived):
                same = _verdict(verdict, again, replayed, answered)
                again.events.append(Heard(now, same, arrived))
                again.took(drafter.verdict(now, same, arrived))
    return again


def _verdict(real: Verdict, again: Story, replayed: _Generation, answered: set[int]) -> Verdict:
    """The trace's verdict on the draft of that round, or on none: a token that the verifier decodes by itself."""
    server = replayed.server
    sent = next((draft for draft in again.drafts if draft[0] == real.round), None)
    if sent is None or real.round in answered:
        draft = Draft(real.session, real.round, server.committed, [])
    else:
        draft = Draft(real.session, real.round, sent[1], sent[2])
    answered.add(real.round)
    server.round = real.round
    _, verdict = server._step(0.0, draft, 0.0)
    return msgspec.structs.replace(
        verdict,
        session=real.session,
        queue_ms=real.queue_ms,
        engine_ms=real.engine_ms,
        price=real.price,
    )


# --- distance and slowness


class DelayedLine:
    """A TCP proxy to `port` of the loopback address: every byte arrives half of `rtt_ms` later, in order."""

    def __init__(self, port: int, rtt_ms: float) -> None:
        self._to = port
        self._delay_s = rtt_ms / 2e3
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> DelayedLine:
        self._server = await asyncio.start_server(self._line, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        for way in (self._pass_on(reader, back), self._pass_on(there, writer)):
            task = asyncio.create_task(way)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for due, data in _chunks(reader, self._delay_s):
                loop.call_at(due, writer.write, data)
        except OSError:
            pass
        finally:
            loop.call_later(self._delay_s, writer.close)


async def _chunks(reader: asyncio.StreamReader, delay_s: float) -> AsyncIterator[tuple[float, bytes]]:
    """What arrives, and when it is to go on (loop time)."""
    while data := await reader.read(65536):
        yield asyncio.get_running_loop().time() + delay_s, data


class PacedDraft:
    """A draft engine whose every step takes `draft_ms`, or longer if the engine itself does."""

    def __init__(self, engine: DraftEngine, draft_ms: float) -> None:
        self._engine = engine
        self._draft_s = draft_ms / 1e3
        self.name = engine.name
        self.forget = engine.forget
        self.close = engine.close

    def propose(
        self, session: str, context: Sequence[int], position: int, sampling: Sampling
    ) -> Proposal | None:
        """See DraftEngine.propose."""
        due = time.monotonic() + self._draft_s
        proposal = self._engine.propose(session, context, position, sampling)
        time.sleep(max(0.0, due - time.monotonic()))
        return proposal
