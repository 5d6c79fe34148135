"""`python -m benchmarks history`: drafts without a model from earlier texts, on the recorded texts of a real model.

Server: the shipped traces are sessions of one key, in random order, some at a time, which the verifier decodes by
itself. Tokens are the recorded ones, and the live verifier decides; the time of a step is that of an emulated
accelerator. Without a history, with one of all texts, and with one for each session (its prompt and its own words).

Edge: at each place of the recorded answers, what a drafter proposes behind the target's own text so far: n-grams of
this session, the recorded model, and both behind earlier answers (`engines.remembering`).

Host: CPU time of remembering and looking up.
"""

from __future__ import annotations

import datetime
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.calibrate.hardware import profiled
from wisp.calibrate.traces.format import Trace, TraceSet, trace_folder
from wisp.core.draft.signals import Signal
from wisp.core.history import History
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission
from wisp.engines.base import DraftEngine, Proposal
from wisp.engines.emulated import EmulatedTarget, hardware
from wisp.engines.ngram import NgramDraft
from wisp.engines.remembering import Remembering
from wisp.outputs import writable
from wisp.sim.sim_verifier import SimVerifier
from wisp.sim.timeline import Timeline

PROFILES = ("a100-qwen3-32b", "h200-qwen3-8b")
AT_A_TIME = (8, 32, 64)
TOKENS = VOCABULARY = 1 << 18
SEEDS = (1, 2)  # orders of the sessions


class Served(msgspec.Struct):
    """Sessions that the verifier decodes, `at_a_time`. tokens_a_slice: committed by a slice behind the first token;
    drafted_a_token, accepted: of the verifier's own drafts; tpot_ms: mean of the sessions, None where each has its own
    history: such sessions share no prefixes either, so that their pace cannot be compared with the others'."""

    texts: str
    hardware: str
    at_a_time: int
    depth: int
    history: str
    tokens_a_slice: float
    drafted_a_token: float
    accepted: float
    tpot_ms: float | None
    tokens_per_s: float


class Edge(msgspec.Struct):
    """Shares of all places: proposed, right (the target's token), and those for which a model was asked."""

    texts: str
    drafter: str
    places: int
    proposed: float
    right: float
    model_asked: float


class Host(msgspec.Struct):
    """Microseconds of CPU for each token."""

    what: str
    us: float


class Result(msgspec.Struct):
    """Everything."""

    command: str
    date: str
    served: list[Served]
    domains: list[Served]
    edge: list[Edge]
    host: list[Host]


class _Replay:
    """Traces as sessions of one key in virtual time."""

    def __init__(self, traces: Sequence[Trace], of: str, at_a_time: int, depth: int, history: str) -> None:
        profile = hardware(of)
        texts = [t.target.tolist() for t in traces]
        self.env = Timeline()
        engine = EmulatedTarget(
            of, profile, lambda seed, at: texts[seed][at], n_vocab=VOCABULARY, eos=frozenset()
        )
        self.verifier = SimVerifier(
            self.env, engine, "wisp", Admission(1 << 20), profiled(profile), 1,
            depth=depth, history_tokens=0 if history == "none" else TOKENS,
        )  # fmt: skip
        self.left = deque(enumerate(traces))
        self.salted = history == "own"
        self.paces: list[float] = []
        self.slices = self.tokens = self.busy_tokens = 0
        self.full_s = 0.0  # so long there were as many sessions as that
        for connection in range(at_a_time):
            self._next(connection)
        while self.env.step():
            pass

    def _next(self, connection: int) -> None:
        if not self.left:
            self.full_s = self.full_s or self.env.now
            return
        number, trace = self.left.popleft()
        said, began = trace.target.tolist(), [0.0]

        def heard(message: Verdict | Refused) -> None:
            assert isinstance(message, Verdict), message
            base, n, now = message.base, len(message.tokens), self.env.now
            assert message.tokens == said[base : base + n], "a wrong token"
            if not self.full_s:
                self.busy_tokens += n
            if base:
                self.slices, self.tokens = self.slices + 1, self.tokens + n
            else:
                began[0] = now
            if message.finish:
                if len(said) > 1:
                    self.paces.append((now - began[0]) / (len(said) - 1) * 1e3)
                self.env.soon(lambda: self._next(connection))

        self.verifier.senders[connection] = heard
        salt = str(number) if self.salted else ""
        opened = Open(
            f"replay-{number:06d}", 0, trace.prompt.tolist(), Sampling(seed=number), len(said),
            serve=True, ignore_eos=True, salt=salt,
        )  # fmt: skip
        self.verifier.receive(connection, opened)


def served(texts: str, traces: Sequence[Trace], of: str, at_a_time: int, depth: int, history: str) -> Served:
    """`history`: "none", "own" or "all"."""
    slices = tokens = proposed = accepted = 0
    paces: list[float] = []
    busy_tokens, full_s = 0, 0.0
    for seed in SEEDS:
        replay = _Replay(shuffled(traces, seed), of, at_a_time, depth, history)
        own = replay.verifier.verifier.own_drafts
        slices, tokens = slices + replay.slices, tokens + replay.tokens
        proposed, accepted = proposed + own.proposed, accepted + own.accepted
        paces += replay.paces
        busy_tokens, full_s = busy_tokens + replay.busy_tokens, full_s + replay.full_s
    pace = None if history == "own" else round(sum(paces) / len(paces), 2)
    return Served(
        texts, of, at_a_time, depth, history, round(tokens / slices, 3), round(proposed / tokens, 3),
        _share(accepted, proposed), pace, round(busy_tokens / full_s, 1),
    )  # fmt: skip


class _Recorded:
    """The drafter of a trace, on the target's path."""

    name = "recorded"

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.asked = 0

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        self.asked += 1
        return Proposal(self.tokens[position], Signal())

    def forget(self, session: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


def edge(texts: str, traces: Sequence[Trace], name: str) -> Edge:
    """One answer after another. `name`: "ngram" or "model", and "history+" before it."""
    places = proposed = right = asked = 0
    for seed in SEEDS:
        recorded = _Recorded()
        below: DraftEngine = recorded if name.endswith("model") else NgramDraft()
        memory = Remembering(below, TOKENS) if name.startswith("history+") else None
        drafter = memory or below
        for number, trace in enumerate(shuffled(traces, seed)):
            prompt, answer, recorded.tokens = (
                trace.prompt.tolist(),
                trace.target.tolist(),
                trace.draft.tolist(),
            )
            session = f"/{number}"
            for at, token in enumerate(answer):
                proposal = drafter.propose(session, prompt + answer[:at], at, trace.sampling)
                proposed += proposal is not None
                right += proposal is not None and proposal.token == token
            places += len(answer)
            drafter.forget(session)
            if memory is not None:
                memory.said(session, prompt, answer)
        asked += recorded.asked
    return Edge(texts, name, places, _share(proposed, places), _share(right, places), _share(asked, places))


def shuffled(traces: Sequence[Trace], seed: int) -> list[Trace]:
    """In random order."""
    order = list(traces)
    random.Random(seed).shuffle(order)
    return order


def host() -> list[Host]:
    """The costs of a history, without the verifier's around it."""
    rng = random.Random(1)
    fresh = array("I", [rng.randrange(VOCABULARY) for _ in range(20_000)])
    again = array("I", [*range(1000)] * 20)

    def decode(text: array[int]) -> None:
        history, part = History(), text[:40]
        history.extend(1, part, 0)
        for token in text[40:]:
            part.append(token)
            history.extend(1, part, len(part) - 1)
            match = history.find(1, part, 16)
            if match is not None:
                history.acceptance.learn(match, (token,))

    return [
        Host("of a prompt", _us(lambda: History().extend(1, fresh, 0), len(fresh))),
        Host("decoded, of a text that never repeats", _us(lambda: decode(fresh), len(fresh))),
        Host("decoded, of one that always does", _us(lambda: decode(again), len(again))),
    ]


def _us(do: Callable[[], None], tokens: int) -> float:
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        do()
        best = min(best, time.process_time() - started)
    return round(best / tokens * 1e6, 2)


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def run_bench_history(traces: Path, out: Path | None, *, as_json: bool) -> None:
    """Measure, print, and write the figures. Raises ConfigError."""
    if out is not None:
        writable(out)
    known = TraceSet.load(trace_folder(traces))
    greedy = known.select(label="greedy")
    sets = {
        "once, greedy": list(greedy),
        "once, T = 0.7": list(known.select(label="t0.7")),
        "twice": list(known),
    }
    result = Result("python -m benchmarks history", datetime.date.today().isoformat(), [], [], [], host())
    with Console(stderr=True).status("replaying"):
        for texts, some in sets.items():
            for of in PROFILES:
                for n in AT_A_TIME:
                    for depth in (1, 2):
                        result.served += [served(texts, some, of, n, depth, h) for h in ("none", "all")]
            result.served.append(served(texts, some, PROFILES[0], AT_A_TIME[0], 1, "own"))
            result.edge += [
                edge(texts, some, d) for d in ("ngram", "history+ngram", "model", "history+model")
            ]
        for domain in sorted({t.domain for t in known}):
            some = list(greedy.select(domain=domain))
            result.domains.append(served(domain, some, PROFILES[0], AT_A_TIME[0], 1, "all"))
    data = msgspec.json.format(msgspec.json.encode(result), indent=1)
    if out is not None:
        out.write_bytes(data + b"\n")
    if as_json:
        print(data.decode())
    else:
        _show(result)


def _show(result: Result) -> None:
    console = Console()
    parts: tuple[tuple[str, Sequence[msgspec.Struct]], ...] = (
        ("decoded by the verifier", [*result.served, *result.domains]),
        ("on an edge", result.edge),
        ("microseconds of CPU a token", result.host),
    )
    for title, rows in parts:
        table = Table(title=title)
        for name in rows[0].__struct_fields__:
            table.add_column(name.replace("_", " "))
        for row in rows:
            table.add_row(*(str(getattr(row, name)) for name in row.__struct_fields__))
        console.print(table)
