"""Holds `lab.replay` against reality: a verifier process, a real edge, a socket between them, and both models.

`Edge.generate` lets a real edge generate what a trace was recorded of, and notes every event that its `Drafter`
sees. `fed_back` gives these events, with their times, to a fresh `Drafter` whose proposals and verdicts come from
the trace. `measure_ahead` times drafting ahead with all that, a line with an added delay and a paced device, and sets
beside it what a replay predicts.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import httpx
import msgspec
from rich.console import Console

from wisp import __version__
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
from wisp.engines.build import read_predictor
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.models import resolve
from wisp.lab.children import Child, Children, free_ports
from wisp.lab.devices import Device, Link, Server
from wisp.lab.replay import Bench, Tally, _Generation, replay
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
    signal: Signal


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
        self.story.events.append(Proposed(now_ms, token, took_ms, signal))
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
    """What a replay's `Drafter` makes of the recorded events: proposals and verdicts are the trace's.

    Times and the order of things are taken from the `stories`, which are those of one edge, in order. So are the
    signals that the policy hears: a drafter's logits depend a little on the shape of the batch they come from, and
    a recorder's batches are wide. The events told back have the trace's signals, to hold against the edge's.
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
            case Proposed(now, _, took, heard):
                token, signal = replayed._recorded()
                again.events.append(Proposed(now, token, took, signal))
                again.took(drafter.proposed(now, token, heard, took))
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
        self._tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> DelayedLine:
        self._server = await asyncio.start_server(self._line, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in self._ends:
            end.transport.abort()
        await asyncio.sleep(0)  # in which they go

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        self._ends += [writer, back]
        for way in (self._pass_on(reader, back), self._pass_on(there, writer)):
            self._tasks.append(asyncio.create_task(way))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for due, data in _chunks(reader, self._delay_s):
                loop.call_at(due, writer.write, data)
        except OSError:
            pass
        finally:
            loop.call_later(self._delay_s, writer.close)  # behind what is on its way


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


# --- drafting ahead, measured

RTTS_MS = (5.0, 20.0, 60.0, 150.0)
DRAFT_MS = 15.0  # 67 tokens per second: a small accelerator
SPECS = ("fixed:4", "gain")
PAIR = ("tiny-target", "tiny-draft")
TEXTS = ("Tell me a story about Belomi.", "Where is the lamp?")


@dataclass(frozen=True)
class Figures:
    """Of device, loopback line and verifier, measured with no delay added: medians in milliseconds."""

    draft_ms: float
    line_ms: float  # there and back, with everything that is neither queue nor engine
    server_ms: float  # queue and engine

    @classmethod
    def of(cls, stories: Sequence[Story]) -> Figures:
        """From generations without drafting ahead, in which a draft goes out with its last token."""
        took, line, server = [], [], []
        for story in stories:
            sent = 0.0
            for event in story.events:
                if isinstance(event, Proposed):
                    took.append(event.took_ms)
                    sent = event.now_ms
                elif isinstance(event, Heard) and sent:
                    there = event.verdict.queue_ms + event.verdict.engine_ms
                    server.append(there)
                    line.append(event.arrived_ms - sent - there)
                    sent = 0.0
        return cls(median(took), median(line), median(server))

    def bench(self, rtt_ms: float) -> Bench:
        """The same for a replay, with `rtt_ms` between edge and verifier."""
        return Bench(
            Device("paced", 1e3 / self.draft_ms),
            Link(rtt_ms + self.line_ms),
            Server("tiny", self.server_ms, 0.0, prefill_ms=self.server_ms),
        )


def measure_ahead(
    rtts_ms: Sequence[float] = RTTS_MS,
    *,
    draft_ms: float = DRAFT_MS,
    repeats: int = 3,
    max_tokens: int = 40,
    progress: Console | None = None,
) -> dict[str, Any]:
    """Time per token with and without drafting ahead over lines of these round trips, and what a replay predicts.

    Off and on take turns, `repeats` times; medians are reported. Server mode is off.
    """
    traces = _recorded(max_tokens)
    engine = LlamaDraft(resolve(PAIR[1]), threads=1)
    paced = PacedDraft(engine, draft_ms)
    cells: list[dict[str, Any]] = []
    with verifier(PAIR[0]) as child:
        figures = Figures.of(_timed(child, paced, traces, "fixed:4", None, 0.0))
        for rtt in rtts_ms:
            for spec in SPECS:
                runs: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(repeats):
                    for on in (False, True):
                        stories = _timed(child, paced, traces, spec, Ahead() if on else None, rtt)
                        runs[on].append(_ms_per_token(stories))
                cells.append(_cell(spec, rtt, runs, figures.bench(rtt), traces))
                if progress is not None:
                    progress.print(json.dumps(cells[-1]))
    engine.close()
    return {
        "wisp": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "wisp bench-ahead",
        "pair": PAIR,
        "draft_ms": draft_ms,
        "generations": len(traces),
        "max_tokens": max_tokens,
        "repeats": repeats,
        "figures": {k: round(v, 3) for k, v in asdict(figures).items()},
        "cells": cells,
    }


def _recorded(max_tokens: int) -> list[Trace]:
    from wisp.lab.traces.prompts import Prompt
    from wisp.lab.traces.record import Recording, Settings

    prompts = [Prompt(f"p{i}", "story", "train", text) for i, text in enumerate(TEXTS)]
    settings = Settings(max_tokens=max_tokens, mode="exact", group=len(prompts))
    target, draft = ((name, resolve(name)) for name in PAIR)
    with tempfile.TemporaryDirectory() as folder:
        return list(Recording(target, draft, prompts, settings, Path(folder) / "traces").run())


def _timed(
    child: Child, draft: DraftEngine, traces: Sequence[Trace], spec: str, ahead: Ahead | None, rtt_ms: float
) -> list[Story]:
    """A fresh edge generates what the traces have, over a line. Raises ValueError where the text is another."""
    policies = Policies(spec, read_predictor(), server_mode=False)

    async def generate() -> list[Story]:
        port = int(child.url.rsplit(":", 1)[1])
        async with DelayedLine(port, rtt_ms) as line, Edge(line.url, draft, policies, ahead) as edge:
            return [await edge.generate(t.prompt.tolist(), t.sampling, len(t)) for t in traces]

    stories = asyncio.run(generate())
    if any(s.tokens != t.target.tolist() for s, t in zip(stories, traces, strict=True)):
        raise ValueError(f"{spec}: the text is not the one that was recorded")
    return stories


def _ms_per_token(stories: Sequence[Story]) -> float:
    return sum(s.time_ms for s in stories) / sum(s.timed_tokens for s in stories)


def _cell(
    spec: str, rtt_ms: float, runs: dict[bool, list[float]], bench: Bench, traces: list[Trace]
) -> dict[str, Any]:
    measured = {on: median(some) for on, some in runs.items()}
    predicted = {}
    for on in (False, True):
        policies = Policies(spec, read_predictor(), server_mode=False)
        predicted[on] = 1e3 / replay(traces, bench, policies, Ahead() if on else None).tokens_per_s
    row: dict[str, Any] = {"policy": spec, "rtt_ms": rtt_ms}
    for on, name in ((False, "off"), (True, "ahead")):
        row[name] = {
            "measured_ms_per_token": round(measured[on], 2),
            "all_ms_per_token": [round(x, 2) for x in runs[on]],
            "tokens_per_s": round(1e3 / measured[on], 2),
            "predicted_ms_per_token": round(predicted[on], 2),
            "measured_over_predicted": round(measured[on] / predicted[on], 3),
        }
    row["speedup"] = round(measured[False] / measured[True], 3)
    row["predicted_speedup"] = round(predicted[False] / predicted[True], 3)
    return row


def run_ahead(out: Path | None, *, repeats: int, as_json: bool) -> None:
    """`wisp bench-ahead`: measure and report; with `out`, write a page and its data into that folder."""
    result = measure_ahead(repeats=repeats, progress=Console(stderr=True))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "ahead.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "ahead.md").write_text(_page(result))
    print(json.dumps(result) if as_json else _page(result))


def _page(result: dict[str, Any]) -> str:
    figures = result["figures"]
    worst = max(abs(c[n]["measured_over_predicted"] - 1) for c in result["cells"] for n in ("off", "ahead"))
    lines = [
        "# Drafting ahead, measured\n",
        f"`{result['command']} --out docs/results`, {result['date']}, wisp {result['wisp']}. Medians of "
        f"{result['repeats']} runs with and without drafting ahead in turn, {result['generations']} generations of "
        f"{result['max_tokens']} tokens each (half greedy, half at T = 0.7), text checked against a recording.\n",
        "**Real:** the verifier (a process of its own, exact mode), the edge, the TCP connection, both models "
        f"({' and '.join(result['pair'])}), the text. **Emulated:** distance (a proxy holds every byte back for half "
        f"of the round trip, each way) and the device's speed (every draft step takes {result['draft_ms']:g} ms). "
        "The verifier is as fast as the tiny target is, which is faster than a large one on an accelerator.\n",
        f"Predicted: `wisp.lab.replay` on traces of the same prompts, with figures measured once with no delay added: "
        f"a draft step {figures['draft_ms']:.2f} ms, queue and engine {figures['server_ms']:.2f} ms, the rest of a "
        f"round {figures['line_ms']:.2f} ms. Largest difference of time per token: {worst:.0%}.\n",
        "| policy | RTT ms | tokens/s | with ahead | speed-up | predicted speed-up | "
        "ms/token measured (predicted) | with ahead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in result["cells"]:
        off, on = c["off"], c["ahead"]
        lines.append(
            f"| {c['policy']} | {c['rtt_ms']:g} | {off['tokens_per_s']:.1f} | {on['tokens_per_s']:.1f} "
            f"| {c['speedup']:.2f} | {c['predicted_speedup']:.2f} "
            f"| {off['measured_ms_per_token']:.1f} ({off['predicted_ms_per_token']:.1f}) "
            f"| {on['measured_ms_per_token']:.1f} ({on['predicted_ms_per_token']:.1f}) |"
        )
    return "\n".join(lines) + "\n"
