"""`python -m benchmarks history`: drafts without a model from earlier texts, on the recorded texts of a real model.

Server: the shipped traces are sessions of one key, in an order by chance, SESSIONS at a time, which the verifier decodes
by itself. Tokens are the recorded ones, and the simulator's verifier decides; the time of a step is that of an emulated
A100 with Qwen3-32B. Without a history, with one for each session alone (its prompt and its own words), and with one for
all.

Edge: at each place of the recorded answers, what the history says, and what the recorded drafter says there.

Host: what finding and remembering cost for a token, on texts that never repeat and on one that always does.
"""

from __future__ import annotations

import datetime
import random
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.calibrate.hardware import profiled
from wisp.calibrate.traces.format import Trace, TraceSet, trace_folder
from wisp.core.history import LONGEST, History
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission
from wisp.engines.both import SURE
from wisp.engines.emulated import EmulatedTarget, hardware
from wisp.outputs import writable
from wisp.sim.sim_verifier import SimVerifier
from wisp.sim.timeline import Timeline

HARDWARE = "a100-qwen3-32b"
SESSIONS = 8  # at a time
TOKENS = 1 << 18
VOCABULARY = 1 << 18
SEEDS = (1, 2, 3)  # orders of the sessions


class Served(msgspec.Struct):
    """A replay: tokens that a slice of a decode or draft commits; draft tokens for each token, and the share of them that
    is accepted; mean milliseconds for a token."""

    texts: str
    history: str
    depth: int
    sessions: int
    tokens: int
    tokens_a_slice: float
    drafted_a_token: float
    acceptance: float
    tpot_ms: float


class Edge(msgspec.Struct):
    """Places of answers. sure: share at which the history is asked alone; right, drafter_right: shares of these at which
    each of both says the target's token. found, found_right: where it says anything."""

    texts: str
    places: int
    found: float
    found_right: float
    sure: float
    right: float
    drafter_right: float


class Host(msgspec.Struct):
    """Microseconds for each token."""

    what: str
    us: float


class Result(msgspec.Struct):
    """Everything."""

    command: str
    date: str
    served: list[Served]
    edge: list[Edge]
    host: list[Host]


class _Replay:
    """Traces as sessions that the verifier decodes, a few at a time, in virtual time."""

    def __init__(self, traces: Sequence[Trace], kind: str, depth: int) -> None:
        profile = hardware(HARDWARE)
        texts = [t.target.tolist() for t in traces]

        def text(seed: int, position: int) -> int:
            return int(texts[seed][min(position, len(texts[seed]) - 1)])

        self.env = Timeline()
        engine = EmulatedTarget(HARDWARE, profile, text, n_vocab=VOCABULARY, eos=frozenset())
        tokens = TOKENS if kind else 0
        self.verifier = SimVerifier(
            self.env, engine, "wisp", Admission(1 << 20), profiled(profile), 1, depth=depth, history_tokens=tokens
        )
        self.left = deque(enumerate(traces))
        self.kind = kind
        self.paces: list[float] = []
        self.slices = self.tokens = 0

    def run(self) -> None:
        for connection in range(SESSIONS):
            self._next(connection)
        while self.env.step():
            pass

    def _next(self, connection: int) -> None:
        if not self.left:
            return
        number, trace = self.left.popleft()
        first: list[float] = []
        n = len(trace)

        def heard(message: Verdict | Refused) -> None:
            assert isinstance(message, Verdict), message
            now = self.env.now
            assert message.tokens == trace.target.tolist()[message.base : message.base + len(message.tokens)]
            if first:
                self.slices += 1
                self.tokens += len(message.tokens)
            first.append(now)
            if message.finish:
                if n > 1:
                    self.paces.append((now - first[0]) / (n - 1) * 1e3)
                self.env.after(0.0, lambda: self._next(connection))

        self.verifier.senders[connection] = heard
        name, salt = f"replay-{number:06d}", f"{number}" if self.kind == "own" else ""
        prompt, sampling = trace.prompt.tolist(), Sampling(seed=number)
        opened = Open(name, 0, prompt, sampling, n, serve=True, ignore_eos=True, salt=salt)
        self.verifier.receive(connection, opened)


def served(texts: str, traces: Sequence[Trace], kind: str, depth: int) -> Served:
    """`kind`: "" (no history), "own" or "all"."""
    slices = tokens = proposed = accepted = 0
    paces: list[float] = []
    for seed in SEEDS:
        order = list(traces)
        random.Random(seed).shuffle(order)
        replay = _Replay(order, kind, depth)
        replay.run()
        own = replay.verifier.verifier.own_drafts
        slices, tokens = slices + replay.slices, tokens + replay.tokens
        proposed, accepted = proposed + own.proposed, accepted + own.accepted
        paces += replay.paces
    return Served(
        texts, kind or "none", depth, len(traces), tokens, round(tokens / slices, 3), round(proposed / tokens, 3),
        round(accepted / proposed, 3) if proposed else 0.0, round(sum(paces) / len(paces), 2),
    )  # fmt: skip


def edge(texts: str, traces: Sequence[Trace]) -> Edge:
    """One answer after another, as `engines.remembering` keeps them."""
    found = right = sure = sure_right = drafter_right = places = 0
    for seed in SEEDS:
        order = list(traces)
        random.Random(seed).shuffle(order)
        history = History()
        for name, trace in enumerate(order, 1):
            n, text = trace.n_prompt, array("I", [*trace.prompt.tolist(), *trace.target.tolist()])
            drafts = trace.draft.tolist()
            places += len(trace) - 1
            for at in range(n + 1, len(text)):
                match = history.find(-1, text[max(0, at - LONGEST) : at], 1)
                if match is None:
                    continue
                said, is_sure = match.tokens[0], history.acceptance.of(match.length) >= SURE
                found, right = found + 1, right + (said == text[at])
                if is_sure:
                    sure, sure_right = sure + 1, sure_right + (said == text[at])
                    drafter_right += drafts[at - n] == text[at]
                history.acceptance.learn(match, (text[at],))
            history.extend(name, text, 0)
    return Edge(
        texts, places, _share(found, places), _share(right, found), _share(sure, places), _share(sure_right, sure),
        _share(drafter_right, sure),
    )  # fmt: skip


def host() -> list[Host]:
    """Costs of a history, without those of a verifier around it."""
    rng = random.Random(1)
    fresh = array("I", [rng.randrange(VOCABULARY) for _ in range(100_000)])
    again = array("I", [*range(1000)] * 100)
    found = [Host("a prompt of 4,000 tokens is remembered", _us(lambda: History().extend(1, fresh[:4000], 0), 4000))]
    for what, text in (("never repeats", fresh), ("always does", again)):
        history = History()
        started = time.process_time()
        for end in range(4, 20_000):
            part = text[:end] if end < 40 else text[end - 40 : end]
            history.extend(1, part, len(part) - 1)
            history.find(1, part, 16)
        found.append(Host(f"a decoded token of a text that {what}", (time.process_time() - started) / 2e4 * 1e6))
    return [Host(h.what, round(h.us, 2)) for h in found]


def _us(do: object, tokens: int) -> float:
    assert callable(do)
    best = 1e9
    for _ in range(20):
        started = time.process_time()
        do()
        best = min(best, time.process_time() - started)
    return best / tokens * 1e6


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def run_bench_history(traces: Path, out: Path | None, *, as_json: bool) -> None:
    """Measure, print, and write the figures. Raises ConfigError."""
    if out is not None:
        writable(out)
    known = TraceSet.load(trace_folder(traces))
    result = Result("python -m benchmarks history", datetime.date.today().isoformat(), [], [], host())
    sets = {
        "each prompt once, greedy": list(known.select(label="greedy")),
        "each prompt once, T = 0.7": list(known.select(label="t0.7")),
        "each prompt twice": list(known),
        **{f"{d}, twice": list(known.select(domain=d)) for d in sorted({t.domain for t in known})},
    }
    for texts, some in sets.items():
        for depth in (1, 2) if "each" in texts else (1,):
            result.served += [served(texts, some, kind, depth) for kind in ("", "own", "all")]
        result.edge.append(edge(texts, some))
    data = msgspec.json.format(msgspec.json.encode(result), indent=1)
    if out is not None:
        out.write_bytes(data + b"\n")
    if as_json:
        print(data.decode())
    else:
        _show(result)


def _show(result: Result) -> None:
    console = Console()
    for title, rows in (("served", result.served), ("edge", result.edge), ("host, microseconds a token", result.host)):
        table = Table(title=title)
        for name in rows[0].__struct_fields__:
            table.add_column(name)
        for row in rows:
            table.add_row(*(str(getattr(row, name)) for name in row.__struct_fields__))
        console.print(table)
