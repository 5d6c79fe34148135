"""What is reported of a run, live or simulated: the usual benchmark names, the SLO's account, and what it cost.

Only requests that arrived in the window count, as they stand when the run ends. Latencies are the user's: of all
requests that got so far, met or not. TPOT is per token, ITL per chunk: speculation makes them differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from wisp.core.verify.cost import Load
from wisp.core.draft.drafter import Action
from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Draft, Open, Refused, Verdict
from wisp.core.protocol.slo import met
from wisp.sim.simulate import Fleet, Simulation, quantile
from wisp.sim.world import SimDevice, Request


@dataclass(frozen=True)
class Pass:
    """One answered draft, or one token decoded by the verifier, in the engine: `new` tokens behind `cached`."""

    at: float
    engine_ms: float
    new: int
    cached: int


class Watched(SimDevice):
    """A device that keeps what reports are made of, and holds every committed token against its script."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.passes: list[Pass] = []
        self.gaps: list[tuple[Request, float]] = []  # between chunks that the user saw, ms
        self.checked = 0  # tokens
        self.wrong = 0  # of them, and verdicts that contradict what was committed
        self._last_draft = (-1, 0)  # round, tokens

    def start(self, request: Request) -> None:
        """Begin a generation."""
        self._last_draft = (-1, 0)  # round, tokens
        super().start(request)

    def check(self) -> None:
        """Hold what is committed of the present generation against the script; once, at its end."""
        committed, script = self.drafter.committed, self.script.tokens
        self.checked += len(committed)
        self.wrong += sum(a != b for a, b in zip(committed, script, strict=False))
        self.wrong += max(0, len(committed) - len(script))

    def vanish(self) -> None:
        """Switched off in mid-sentence."""
        if self.request is not None:
            self.check()
        super().vanish()

    def _finish(self, request: Request, pause: float) -> None:
        self.check()
        if request.ok and len(self.drafter.committed) != min(len(self.script), request.max_tokens):
            self.wrong += 1  # ended too early
        super()._finish(request, pause)

    def _take(self, arrived: float, message: Verdict | Refused) -> None:
        request = self.request
        try:
            super()._take(arrived, message)
        except ProtocolError:
            assert request is not None
            self.wrong += 1
            request.ok, request.ended = False, self.env.now
            self._finish(request, 1.0)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Draft):
                self._last_draft = (action.round, len(action.tokens))
            elif isinstance(action, Open):
                self._last_draft = (action.round, len(action.draft))
        super()._carry_out(actions)

    def _seen(self, request: Request, verdict: Verdict) -> None:
        now, tokens = self.env.now, verdict.base + len(verdict.tokens)
        if tokens > request.tokens > 0:
            self.gaps.append((request, (now - request.last) * 1e3))
            drafted = self._last_draft[1] if verdict.round == self._last_draft[0] else 0
            self.passes.append(Pass(now, verdict.engine_ms, drafted + 1, len(request.prompt) + verdict.base))
        super()._seen(request, verdict)


class Totals(NamedTuple):
    """Counters of a verifier since it started."""

    steps: float = 0.0
    busy_ms: float = 0.0
    slices: float = 0.0
    rows: float = 0.0
    tokens: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0


class Engine(msgspec.Struct):
    """The verifier's engine over the window.

    utilisation: share of the time in which a step was running
    rows:        tokens fed
    """

    steps_per_s: float
    utilisation: float
    step_ms: float
    slices_per_step: float
    rows_per_step: float
    tokens_per_s: float
    drafted_per_s: float
    acceptance: float

    @classmethod
    def between(cls, before: Totals, after: Totals, seconds: float) -> Engine:
        """From counters at the two ends of `seconds`."""
        d = Totals(*(b - a for a, b in zip(before, after, strict=True)))
        steps, drafted = d.steps or math.nan, d.drafted or math.nan
        return cls(
            steps_per_s=d.steps / seconds,
            utilisation=d.busy_ms / 1e3 / seconds,
            step_ms=d.busy_ms / steps,
            slices_per_step=d.slices / steps,
            rows_per_step=d.rows / steps,
            tokens_per_s=d.tokens / seconds,
            drafted_per_s=d.drafted / seconds,
            acceptance=d.accepted / drafted,
        )


class OfClass(msgspec.Struct):
    """The account of users who expect the same."""

    name: str
    arrived: int
    attainment: float
    p99_tpot_ms: float


class Machine(msgspec.Struct):
    """What a live run asked of this machine, and whether it kept up. CPU: shares of one core.

    loop_lag_ms_p99:   how late the fleet's loop came to what was due
    server_lag_ms_p99: how long the verifier's loop took to answer a ping
    stalled:           share of the time by which one of them was later than a busy loop is: the machine stood still
    """

    fleet_cpu: float
    server_cpu: float | None
    loop_lag_ms_p50: float
    loop_lag_ms_p99: float
    server_lag_ms_p50: float
    server_lag_ms_p99: float
    stalled: float
    frames_per_s: float
    problems: list[str] = []


class Figures(msgspec.Struct, kw_only=True):
    """All of a run. Names as benchmark tools have them; goodput is output tokens, request_goodput requests, of those
    that met their SLO, per second of window. What there is not, as where nothing arrived, is nan, and null in JSON.

    interference_ms: of answered drafts and decoded tokens: time of the step they were in, less what it would have
                     taken alone
    """

    scenario: str
    system: str
    batching: str
    drafting: str
    where: str  # "live" or "simulator"
    devices: int
    rates: list[float]
    seed: int
    duration: float  # of the window, s
    arrived: int
    met: int
    completed: int
    failed: int
    refused: int
    unfinished: int
    violation_rate: float
    attainment: float
    goodput: float
    request_goodput: float
    request_throughput: float
    output_throughput: float
    total_output_tokens: int
    mean_ttft_ms: float
    median_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    p99_itl_ms: float
    mean_e2el_ms: float
    median_e2el_ms: float
    p99_e2el_ms: float
    mean_interference_ms: float
    p99_interference_ms: float
    drafting_busy: float  # share of the devices' time, over the whole run
    drafting_wasted: float  # share of drafting time
    by_class: list[OfClass]
    tokens_checked: int
    mismatches: int
    engine: Engine | None = None
    machine: Machine | None = None


def figures(fleet: Fleet, *, where: str, seed: int) -> Figures:
    """What came of a fleet of `Watched` devices. Call it once, when the run is over."""
    s, system = fleet.scenario, fleet.system
    start, end, now = s.warmup_s, s.warmup_s + s.window_s, fleet.env.now
    result = fleet.outcome()
    window = [r for r in result.requests if start <= r.arrived < end]
    good = [r for r in window if met(r.served(), now)]
    done = [r for r in window if r.ended is not None and r.ok]
    devices = [h for h in fleet.handsets if isinstance(h, Watched)]
    for device in devices:
        if device.request is not None:
            device.check()
    gaps = [ms for d in devices for r, ms in d.gaps if start <= r.arrived < end]
    profile = s.profile
    interference = [
        p.engine_ms - profile.step_ms(Load().plus(p.new, p.cached))
        for d in devices
        for p in d.passes
        if start <= p.at < end
    ]
    first = [r for r in window if r.tokens]
    tokens = sum(r.tokens for r in window)
    latencies = {
        "ttft": [r.served().ttft_ms for r in first],
        "tpot": [r.served().tpot_ms for r in window if r.tokens > 1],
        "itl": gaps,
        "e2el": [(r.ended - r.arrived) * 1e3 for r in done if r.ended is not None],
    }
    three = {k: v for name, values in latencies.items() for k, v in _three(name, values).items()}
    counts = result.counts
    drafting_s = counts.drafting_ms / 1e3
    return Figures(
        scenario=s.title,
        system=system.name,
        batching=system.batching,
        drafting=system.drafting or "none",
        where=where,
        devices=len(fleet.handsets),
        rates=[c.rate for c in s.slo],
        seed=seed,
        duration=s.window_s,
        arrived=result.account.arrived,
        met=result.account.met,
        completed=len(done),
        failed=sum(not r.ok for r in window),
        refused=sum(r.refused for r in window),
        unfinished=sum(r.ended is None for r in window),
        violation_rate=result.account.violation_rate,
        attainment=result.account.attainment,
        goodput=result.account.goodput,
        request_goodput=len(good) / s.window_s,
        request_throughput=len(done) / s.window_s,
        output_throughput=tokens / s.window_s,
        total_output_tokens=tokens,
        drafting_busy=drafting_s / (now * max(1, len(devices))),
        drafting_wasted=counts.wasted_ms / counts.drafting_ms if counts.drafting_ms else 0.0,
        by_class=[
            _of_class(c.name or f"{c.rate:g} tok/s", [r for r in window if r.slo == c.slo], now)
            for c in s.slo
        ],
        tokens_checked=sum(d.checked for d in devices),
        mismatches=sum(d.wrong for d in devices),
        mean_interference_ms=statistics.fmean(interference) if interference else math.nan,
        p99_interference_ms=quantile(interference, 0.99),
        engine=None,
        machine=None,
        **three,
    )


def _of_class(name: str, requests: Sequence[Request], now: float) -> OfClass:
    served = [r.served() for r in requests]
    share = sum(met(r, now) for r in served) / len(served) if served else math.nan
    return OfClass(name, len(served), share, quantile([r.tpot_ms for r in served if r.tokens > 1], 0.99))


def _three(name: str, values: Sequence[float]) -> dict[str, float]:
    mean = statistics.fmean(values) if values else math.nan
    return {
        f"mean_{name}_ms": mean,
        f"median_{name}_ms": quantile(values, 0.5),
        f"p99_{name}_ms": quantile(values, 0.99),
    }


class Watching(Simulation):
    """A simulation that reports as a live fleet does."""

    handset = Watched

    def figures(self, seed: int) -> Figures:
        """Run it."""
        s = self.scenario
        marks: list[Totals] = []
        for at in (s.warmup_s, s.warmup_s + s.window_s - 1e-6):
            self.env.after(at, lambda: marks.append(self._totals()))
        self.run()
        found = figures(self, where="simulator", seed=seed)
        found.engine = Engine.between(marks[0], marks[1], s.window_s)
        return found

    def _totals(self) -> Totals:
        c = self.counts
        return Totals(c.steps, c.busy_ms, c.slices, c.rows, c.tokens, c.draft_rows, c.accepted)
