"""`make bench-policy`: what one decision costs, by policy, and how that grows with the pending work.

Three things are timed, in turn, so that what else the machine does hits all alike; after a warm-up, and with the
garbage collector run between measurements and not within. Times are CPU time of this thread: what a decision costs,
not what it waits for on a busy machine.

*mix*     `plan` of the usual mix of pending work. Of the sessions, half have a draft of 1 to 8 tokens to verify, a
          quarter have an edge that is drafting (offered only to policies that want them), 15 % are
          decoded by the server, 10 % are prompts of 60 to 800 tokens. Three classes of users give a token 62, 125 or
          250 ms; one in ten has no due time. Most are up to 1.5 s ahead, some are late, a few have lost their SLO.
*strict*  the same, but everybody is in the last round of an answer or a newcomer, and there is much too much of it:
          the worst that a policy has to sort out.
*tick*    `Verifier.handle(now, Tick())` of a server with so many sessions, the work described and the slices made.
          Its edges answer in virtual time, a verdict after the other, and open a new session when one is over.

The pending work is for an engine as fast as a 32B model on an A100, about 40 ms a step and 0.4 ms a token; the
server's is eight times as fast, so that it keeps up with a thousand sessions.
"""

from __future__ import annotations

import gc
import heapq
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.core.protocol.messages import Draft, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import Slice, SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import POLICIES, Candidate, Kind, StepLimits, batching_policy
from wisp.core.verify.cost import Coefficients, CostModel, load_of
from wisp.core.verify.events import Action, InEvent, Limits, Received, Run, Send, StepDone, Tick
from wisp.core.verify.verifier import Verifier

COST = Coefficients(step=38.0, token=0.42, cached=0.00005, attention=1e-6)
# An engine that keeps up with 1,000 sessions.
BIG = Coefficients(step=15.0, token=0.05, cached=0.00001, attention=1e-7)
SIZES = (10, 100, 1_000, 10_000)
STEP_TOKENS = 2048
SLOTS = 512
PACES_S = (0.0625, 0.125, 0.25)
LISTS = 8  # of pending work, for each size
BUDGET_S = 0.5  # of measuring, per policy, mix and size
AIM_MS = 1.0  # median at 1,000 pending


class Timing(msgspec.Struct):
    """Milliseconds per decision."""

    pending: int
    median: float
    p99: float


class Report(msgspec.Struct):
    """exponent: of the growth of the median with the pending work, from 1,000 to 10,000 pieces (n log n: 1.12)."""

    policy: str
    mix: list[Timing]
    strict: list[Timing]
    tick: Timing
    done: Timing
    exponent: float
    strict_exponent: float


def pending(n: int, seed: int, *, strict: bool = False) -> list[Candidate]:
    """Pending work at time 0; see the module."""
    rng = random.Random(seed)
    return [_piece(i, rng, strict=strict) for i in range(n)]


def _piece(session: int, rng: random.Random, *, strict: bool) -> Candidate:
    what = rng.choices(["verify", "drafting", "decode", "prompt"], [50, 25, 15, 10])[0]
    pace = rng.choice(PACES_S)
    n_draft = rng.randint(1, 8) if what == "verify" else 0
    gain = (1 - 0.8 ** (n_draft + 1)) / 0.2 if n_draft else 1.0
    prompt = what == "prompt"
    slack = rng.uniform(-0.2, 1.5) if not prompt else rng.uniform(0.1, 2.0)
    in_hurry = strict or rng.random() > 0.1
    return Candidate(
        session=session,
        kind=Kind.PREFILL if prompt else Kind.VERIFY if n_draft else Kind.DECODE,
        new=rng.randint(60, 800) if prompt else 1 + n_draft,
        cached=0 if prompt else rng.randint(60, 2000),
        n_draft=n_draft,
        since=-rng.random(),
        opened=-rng.uniform(1.0, 30.0),
        due=slack if in_hurry else math.inf,
        tpot_s=pace if in_hurry else 0.0,
        expected_tokens=gain,
        remaining=1 if strict and not prompt else rng.randint(n_draft + 1, 300),
        edge_drafting=what == "drafting",
        first=prompt,
        lag_s=0.0 if prompt or not in_hurry else pace - slack,
        slo_lost=in_hurry and not strict and rng.random() < 0.03,
    )


class Edges:
    """A verifier and its edges in virtual time; notes how long it takes over ticks and ended steps."""

    def __init__(self, policy: str, n: int, seed: int) -> None:
        limits = Limits(50_000, frozenset({0}), n, 1024, n * 1024, STEP_TOKENS)
        self.verifier = Verifier(limits, batching_policy(policy), Admission(n), CostModel(BIG))
        self.rng = random.Random(seed)
        self.now = 0.0
        self.opened = 0
        self.tick_ms: list[float] = []
        self.done_ms: list[float] = []
        self.arrivals: list[tuple[float, str]] = []  # drafts: when, of which session
        self.drafting: set[str] = set()
        self.truth: dict[str, int] = {}  # what a session's text is made from
        self.known: dict[str, tuple[int, int]] = {}  # last round, tokens committed
        for _ in range(n):
            self._open()

    def step(self) -> None:
        """One step: plan it, let it take its time, commit it; drafts come in meanwhile."""
        while True:
            started = time.thread_time()
            actions = self.verifier.handle(self.now, Tick())
            took = (time.thread_time() - started) * 1e3
            run = next((a for a in actions if isinstance(a, Run)), None)
            if run is not None:
                break
            self._until(self.now + 0.01)
        self.tick_ms.append(took)
        self._until(self.now + BIG.ms(load_of(run.slices)) / 1e3)
        done = StepDone([self._result(s) for s in run.slices], BIG.ms(load_of(run.slices)))
        started = time.thread_time()
        actions = self.verifier.handle(self.now, done)
        self.done_ms.append((time.thread_time() - started) * 1e3)
        self._take(actions)

    def forget(self) -> None:
        """Measure from here."""
        self.tick_ms.clear()
        self.done_ms.clear()

    def _open(self) -> None:
        self.opened += 1
        session = f"session-{self.opened}"
        self.truth[session] = self.opened
        self.known[session] = (0, 0)
        prompt = [(self.opened * 31 + i) % 40_000 + 1 for i in range(self.rng.randint(60, 200))]
        slo = Slo(2000.0, self.rng.choice(PACES_S) * 1e3)
        max_tokens = self.rng.randint(60, 300)
        self._feed(
            Received(1, "", Open(session, 0, prompt, Sampling(), max_tokens, ignore_eos=True, slo=slo))
        )

    def _feed(self, event: InEvent) -> None:
        self._take(self.verifier.handle(self.now, event))

    def _take(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if not isinstance(action, Send):
                continue
            verdict = action.message
            assert isinstance(verdict, Verdict), verdict
            if verdict.finish:
                self.truth.pop(verdict.session)
                self.known.pop(verdict.session)
                self.drafting.discard(verdict.session)
                self._open()
            else:
                round_, _ = self.known[verdict.session]
                self.known[verdict.session] = (round_, verdict.base + len(verdict.tokens))
                if verdict.session not in self.drafting:  # else it brought a token that nobody asked for
                    self.drafting.add(verdict.session)
                    heapq.heappush(self.arrivals, (self.now + self.rng.uniform(0.05, 0.5), verdict.session))

    def _until(self, at: float) -> None:
        while self.arrivals and self.arrivals[0][0] <= at:
            when, session = heapq.heappop(self.arrivals)
            if session not in self.drafting:
                continue
            self.drafting.discard(session)
            round_, base = self.known[session]
            round_ += 1
            self.known[session] = (round_, base)
            self.now = max(self.now, when)
            n = self.rng.randint(1, 8)
            right = sum(self.rng.random() < 0.8 for _ in range(n))
            text = self.truth[session]
            tokens = [_token(text, base + i) + (i >= right) for i in range(n)]
            self._feed(Received(1, "", Draft(session, round_, base, tokens)))
        self.now = max(self.now, at)

    def _result(self, s: Slice) -> SliceResult:
        if not s.sample:
            return SliceResult(s.session)
        text = self.truth[self.verifier.sessions[s.session].id]
        tokens = [_token(text, s.position + i) for i in range(s.n_draft + 1)]
        draft = s.tokens[len(s.tokens) - s.n_draft :]
        accepted = next((i for i, t in enumerate(draft) if t != tokens[i]), s.n_draft)
        return SliceResult(s.session, accepted, tokens[: accepted + 1])


def _token(text: int, position: int) -> int:
    return (text * 7919 + position * 104_729) % 40_000 + 1


def measure(n: int, *, budget_s: float = BUDGET_S, sizes: Sequence[int] = SIZES) -> list[Report]:
    """Time every policy, in turn."""
    wanted = sorted({*sizes, n})
    taken: dict[tuple[str, bool, int], list[float]] = {}
    for strict in (False, True):
        for size in wanted:
            lists = [pending(size, seed, strict=strict) for seed in range(LISTS)]
            _in_turn(lists, strict, size, taken, budget_s)
    edges = {name: Edges(name, n, 1) for name in POLICIES}
    _steps(edges, 40)
    for e in edges.values():
        e.forget()
    _steps(edges, 120)
    reports = []
    for name in POLICIES:
        mix, hard = ([_timing(s, taken[name, strict, s]) for s in wanted] for strict in (False, True))
        e = edges[name]
        tick, done = _timing(n, e.tick_ms), _timing(n, e.done_ms)
        reports.append(Report(name, mix, hard, tick, done, _exponent(mix), _exponent(hard)))
    return reports


def _in_turn(
    lists: list[list[Candidate]],
    strict: bool,
    size: int,
    taken: dict[tuple[str, bool, int], list[float]],
    budget_s: float,
) -> None:
    limits = StepLimits(STEP_TOKENS, SLOTS, {}, CostModel(COST))
    plans: list[tuple[list[float], list[Callable[[], object]]]] = []
    for name in POLICIES:
        policy = batching_policy(name)
        shown = [[w for w in work if policy.wants_drafting or not w.edge_drafting] for work in lists]
        calls = [_call(policy.plan, work, limits) for work in shown]
        plans.append((taken.setdefault((name, strict, size), []), calls))
    until = time.perf_counter() + 2 * budget_s * len(plans)
    for turn in range(10**6):
        gc.collect()
        gc.disable()
        for times, calls in plans:
            for call in calls:
                started = time.thread_time()
                call()
                times.append((time.thread_time() - started) * 1e3)
        gc.enable()
        if turn == 0:  # warm-up
            for times, _ in plans:
                times.clear()
        elif time.perf_counter() > until:
            return


def _call(
    plan: Callable[[float, Sequence[Candidate], StepLimits], object],
    work: list[Candidate],
    limits: StepLimits,
) -> Callable[[], object]:
    return lambda: plan(0.0, work, limits)


def _steps(edges: dict[str, Edges], steps: int) -> None:
    for turn in range(steps):
        if turn % 10 == 0:
            gc.collect()
        gc.disable()
        for e in edges.values():
            e.step()
        gc.enable()


def _timing(n: int, times: list[float]) -> Timing:
    ordered = sorted(times)
    return Timing(n, statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])


def _exponent(timings: list[Timing]) -> float:
    large = [t for t in timings if t.pending >= 1_000]
    if len(large) < 2:
        return math.nan
    a, b = large[0], large[-1]
    return math.log(b.median / a.median) / math.log(b.pending / a.pending)


def run_bench_policy(n: int, *, as_json: bool) -> None:
    reports = measure(n)
    if as_json:
        print(json.dumps({"pending": n, "aim_ms": AIM_MS, "policies": {r.policy: _row(r) for r in reports}}))
        return
    console = Console(highlight=False)
    usual = [(r.policy, r.mix, r.exponent) for r in reports]
    strict = [(r.policy, r.strict, r.strict_exponent) for r in reports]
    for title, rows in (("usual mix", usual), ("strict, overloaded", strict)):
        table = Table(title=f"One decision, ms: median / p99 ({title})", box=None, padding=(0, 2, 0, 0))
        table.add_column("policy", no_wrap=True)
        for t in rows[0][1]:
            table.add_column(f"{t.pending:,}", justify="right", no_wrap=True)
        table.add_column("growth", justify="right")
        for policy, timings, exponent in rows:
            cells = [f"{t.median:.3f}/{t.p99:.3f}" for t in timings]
            table.add_row(policy, *cells, f"{exponent:.2f}")
        console.print(table)
    table = Table(title=f"A server with {n:,} sessions, ms: median / p99", box=None, padding=(0, 2, 0, 0))
    for column in ("policy", "tick that starts a step", "step done"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for r in reports:
        table.add_row(r.policy, *(f"{t.median:.3f} / {t.p99:.3f}" for t in (r.tick, r.done)))
    console.print(table)


def _row(r: Report) -> dict[str, object]:
    def rounded(t: Timing) -> dict[str, object]:
        return {"pending": t.pending, "median_ms": round(t.median, 4), "p99_ms": round(t.p99, 4)}

    return {
        "mix": [rounded(t) for t in r.mix],
        "strict": [rounded(t) for t in r.strict],
        "tick": rounded(r.tick),
        "step_done": rounded(r.done),
        "exponent": round(r.exponent, 3),
        "strict_exponent": round(r.strict_exponent, 3),
    }
