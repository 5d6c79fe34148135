"""The report of a run, simulated or live: service by class, devices, the verifier's engine.

Only requests that arrived in the window count, as they stand when the run ends. Latencies are the user's, of all
requests that got so far, met or not. TPOT is per token, ITL per message: speculation makes them differ.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import msgspec

from wisp.calibrate.hardware import Measured
from wisp.core.protocol.slo import Served, account, met
from wisp.core.verify.cost import Load
from wisp.sim.request import Request
from wisp.sim.scenario import SloClass
from wisp.sim.sim_verifier import VerifierCounts
from wisp.sim.simulate import Fleet, Simulation, quantile
from wisp.sim.smooth import Pace, pace

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "longest_gap_ms", "longest_stall_ms")


class Spread(msgspec.Struct, frozen=True):
    """Mean, median and 99th percentile; None of nothing."""

    mean: float | None = None
    median: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of these values."""
        if not values:
            return cls()
        values = sorted(values)  # once; in order, it costs little to sort
        return cls(*(round(v, 3) for v in (fmean(values), quantile(values, 0.5), quantile(values, 0.99))))


class ClassReport(msgspec.Struct, frozen=True):
    """Service of one SLO class. attainment: share of arrived requests that met their SLO (None: nothing arrived)."""

    name: str
    arrived: int
    attainment: float | None
    goodput: float
    ttft_ms: Spread
    tpot_ms: Spread


class Engine(msgspec.Struct, frozen=True):
    """The verifier's engine in the window. utilisation: share of time with a step running; rows: tokens fed.

    Means are None where there was no step; acceptance is None where nothing was drafted.
    """

    steps_per_s: float
    utilisation: float
    step_ms: float | None
    slices_per_step: float | None
    rows_per_step: float | None
    tokens_per_s: float
    drafted_per_s: float
    acceptance: float | None

    @classmethod
    def between(cls, a: VerifierCounts, b: VerifierCounts, seconds: float) -> Engine:
        """From counters at the two ends of `seconds`."""
        steps, busy_ms, drafted = b.steps - a.steps, b.busy_ms - a.busy_ms, b.draft_rows - a.draft_rows

        def each(total: float) -> float | None:
            return total / steps if steps else None

        return cls(
            steps_per_s=steps / seconds,
            utilisation=busy_ms / 1e3 / seconds,
            step_ms=each(busy_ms),
            slices_per_step=each(b.slices - a.slices),
            rows_per_step=each(b.rows - a.rows),
            tokens_per_s=(b.tokens - a.tokens) / seconds,
            drafted_per_s=drafted / seconds,
            acceptance=(b.accepted - a.accepted) / drafted if drafted else None,
        )


class WholeRun(msgspec.Struct, frozen=True):
    """The simulated verifier over the whole run, warm-up and drain included. A live one does not tell all of it.

    busy:            share of time with a step in the engine
    prefill_share:   of the tokens fed, those of prompts
    acceptance:      share of draft tokens (None: there were none)
    interference_ms: for each slice, the time of its step less the fitted cost model's time for the slice alone
    price:           of a draft token in the verdicts, in tokens
    """

    steps: int
    step_ms: float
    busy: float
    sessions_a_step: float
    rows_a_step: float
    prefill_share: float
    drafts: int
    draft_tokens: int
    acceptance: float | None
    tokens: int
    interference_ms: Spread
    price: Spread
    kv_evictions: int

    @classmethod
    def of(cls, counts: VerifierCounts, seconds: float) -> WholeRun:
        """From the counters at the end of a run of `seconds`."""
        steps = max(counts.steps, 1)
        return cls(
            steps=counts.steps,
            step_ms=counts.busy_ms / steps,
            busy=counts.busy_ms / 1e3 / seconds,
            sessions_a_step=counts.slices / steps,
            rows_a_step=counts.rows / steps,
            prefill_share=counts.prefill_rows / max(counts.rows, 1),
            drafts=counts.drafts,
            draft_tokens=counts.draft_rows,
            acceptance=counts.accepted / counts.draft_rows if counts.draft_rows else None,
            tokens=counts.tokens,
            interference_ms=Spread.of(counts.interference_ms),
            price=Spread.of(counts.prices),
            kv_evictions=counts.evicted,
        )


class Machine(msgspec.Struct, frozen=True):
    """The load of a live run on this machine, and whether the machine kept up. CPU: shares of one core.

    loop_lag_ms:   how late the fleet's event loop was
    server_lag_ms: how long the verifier's event loop took to answer a ping
    stalled:       share of time in which a loop was later than a busy one is: the machine stood still
    problems:      why the run is not valid
    """

    fleet_cpu: float
    server_cpu: float | None
    loop_lag_ms_p50: float
    loop_lag_ms_p99: float
    server_lag_ms_p50: float
    server_lag_ms_p99: float
    stalled: float
    frames_per_s: float
    problems: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run. None is a value that does not exist, e.g. where nothing arrived.

    where:           "live" or "simulator"
    duration:        of the window, s; simulated_s: when the run ended, from its start
    cut:             the run was stopped early, its outcome being clear; rates are then estimates
    request_*:       requests per second; goodput: output tokens per second of requests that met their SLO
    violators_tpot_p99_ms: of requests that missed their SLO, unfinished ones as they stood (None: none had a second
                     token)
    refused, refusals: requests refused for good; refusals in all
    longest_gap_ms:  of each request with a token, the longest time between two messages
    longest_stall_ms: of each, the greatest lateness of a token against first token + i x TPOT target (see `smooth`)
    late_tokens:     share of tokens, first ones left out, that came later than that
    draft_steps_per_token: of all devices and requests over the whole run: the energy of drafting
    drafting_ms:     of all devices over the whole run; wasted_ms: of that, past a first rejection
    drafting_busy:   share of the devices' time; drafting_wasted: share of drafting time
    ahead_wasted:    tokens drafted ahead and thrown away
    interference_ms: of each answered draft or decoded token in the window, the time of its step less the hardware
                     profile's time for it alone
    tokens_checked:  committed tokens compared with their scripts; mismatches: those that differ
    engine:          None behind a router, whose replicas' counters end with the replicas
    verifier:        None for a live run
    """

    scenario: str
    system: str
    batching: str
    drafting: str
    where: str
    seed: int
    devices: int
    rates: tuple[float, ...]
    duration: float
    cut: bool
    simulated_s: float
    arrived: int
    met: int
    completed: int
    failed: int
    unfinished: int
    refused: int
    refusals: int
    violation_rate: float | None
    attainment: float | None
    request_goodput: float
    request_throughput: float
    goodput: float
    output_throughput: float
    total_output_tokens: int
    classes: tuple[ClassReport, ...]
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2el_ms: Spread
    longest_gap_ms: Spread
    longest_stall_ms: Spread
    late_tokens: float | None
    violators_tpot_p99_ms: float | None
    draft_steps_per_token: float | None
    drafting_ms: float
    wasted_ms: float
    drafting_busy: float
    drafting_wasted: float
    ahead_wasted: int
    interference_ms: Spread
    tokens_checked: int
    mismatches: int
    engine: Engine | None = None
    machine: Machine | None = None
    verifier: WholeRun | None = None

    @property
    def missed(self) -> float:
        """The violation rate; 1.0 where nothing arrived, since then nothing shows timely service."""
        return 1.0 if self.violation_rate is None else self.violation_rate

    def benchmark(self) -> dict[str, Any]:
        """As one JSON object, latencies under the names that serving benchmarks use."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        for name in (*LATENCIES, "interference_ms"):
            data |= {f"{kind}_{name}": value for kind, value in data.pop(name).items()}
        data["by_class"] = [
            {"name": c.name, "arrived": c.arrived, "attainment": c.attainment, "p99_tpot_ms": c.tpot_ms.p99}
            for c in self.classes
        ]
        return data | (data.pop("verifier") or {})


def report(
    fleet: Fleet,
    *,
    violation_rate: float | None = None,
    engine: Engine | None = None,
    machine: Machine | None = None,
) -> Report:
    """Of a run that is over. violation_rate: an estimate, for a run that was cut; engine, machine: of a live run."""
    s, counts, now, devices = fleet.scenario, fleet.shared.counts, fleet.env.now, fleet.devices
    start, end = s.warmup_s, s.warmup_s + s.window_s
    window = fleet.window()
    seconds = max(min(end, now) - start, 1e-9)
    served = [r.served() for r in window]
    good = account(served, start, start + seconds, now)
    cut = violation_rate is not None
    if violation_rate is None and window:
        violation_rate = good.violation_rate
    verifier = None
    if isinstance(fleet, Simulation):
        verifier = WholeRun.of(fleet.verifier.counts, now)
        ends = fleet.marks
        engine = Engine.between(ends[0], ends[1], s.window_s) if len(ends) == 2 else None
    compared = [d.compared() for d in devices]
    paces = [_pace(r, now) for r in window if r.tokens]
    completed, tokens = sum(r.ended is not None and r.ok for r in window), sum(r.tokens for r in window)
    return Report(
        scenario=s.title,
        system=fleet.system.name,
        batching=fleet.system.batching,
        drafting=fleet.system.drafting or "none",
        where="simulator" if verifier else "live",
        seed=fleet.seed,
        devices=len(devices) if s.open else max((n for _, n in s.population), default=s.devices_n),
        rates=tuple(c.rate for c in s.slo),
        duration=s.window_s,
        cut=cut,
        simulated_s=round(now, 3),
        arrived=len(window),
        met=good.met,
        completed=completed,
        failed=sum(not r.ok for r in window),
        unfinished=sum(r.ended is None for r in window),
        refused=sum(r.refused for r in window),
        refusals=sum(r.refusals for r in window),
        violation_rate=violation_rate,
        attainment=None if violation_rate is None else 1.0 - violation_rate,
        request_goodput=good.met / seconds,
        request_throughput=completed / seconds,
        goodput=good.goodput,
        output_throughput=tokens / seconds,
        total_output_tokens=tokens,
        classes=_classes(s.slo, window, start, start + seconds, now),
        ttft_ms=_ttft_ms(served),
        tpot_ms=_tpot_ms(served),
        itl_ms=Spread.of([gap for r in window for gap in r.gaps_ms]),
        e2el_ms=Spread.of([(s.last - s.arrived) * 1e3 for s in served if s.tokens and s.ended is not None]),
        longest_gap_ms=Spread.of([p.longest_gap_ms for p in paces]),
        longest_stall_ms=Spread.of([p.longest_stall_ms for p in paces]),
        late_tokens=_each(sum(p.late for p in paces), sum(p.tokens for p in paces)),
        violators_tpot_p99_ms=_violators_p99(window, now),
        draft_steps_per_token=_each(counts.draft_steps, sum(r.tokens for r in fleet.requests)),
        drafting_ms=counts.drafting_ms,
        wasted_ms=counts.wasted_ms,
        drafting_busy=counts.drafting_ms / 1e3 / (now * max(1, len(devices))),
        drafting_wasted=counts.wasted_ms / counts.drafting_ms if counts.drafting_ms else 0.0,
        ahead_wasted=counts.ahead_wasted,
        interference_ms=Spread.of(_interference_ms(fleet)),
        tokens_checked=sum(checked for checked, _ in compared),
        mismatches=sum(wrong for _, wrong in compared),
        engine=engine,
        machine=machine,
        verifier=verifier,
    )


def _interference_ms(fleet: Fleet) -> list[float]:
    """For each pass in the window; nothing where no hardware profile tells a step's time alone."""
    s = fleet.scenario
    profile = s.profile
    if s.as_recorded and not (isinstance(profile, Measured) or isinstance(fleet, Simulation)):
        return []

    @functools.cache  # few are different
    def alone_ms(new: int, cached: int) -> float:
        return profile.step_ms(Load().plus(new, cached))

    return [
        engine_ms - alone_ms(new, cached)
        for d in fleet.devices
        for at, engine_ms, new, cached in d.seen.passes
        if s.warmup_s <= at < s.warmup_s + s.window_s
    ]


def _ttft_ms(served: Sequence[Served]) -> Spread:
    return Spread.of([s.ttft_ms for s in served if s.tokens])


def _tpot_ms(served: Sequence[Served]) -> Spread:
    return Spread.of([s.tpot_ms for s in served if s.tokens > 1])


def _pace(request: Request, now: float) -> Pace:
    return pace(request.heard, request.slo.tpot_ms, None if request.ended is not None else now)


def _each(total: float, of: int) -> float | None:
    return total / of if of else None


def _violators_p99(requests: Sequence[Request], now: float) -> float | None:
    missed = [r for r in requests if r.tokens > 1 and not met(r.served(), now)]
    paces = [((r.last if r.ended is not None else now) - r.first) * 1e3 / (r.tokens - 1) for r in missed]
    return quantile(paces, 0.99) if paces else None


def _classes(
    named: Sequence[SloClass], window: Sequence[Request], start: float, end: float, now: float
) -> tuple[ClassReport, ...]:
    found = []
    classes = {c.slo: c for c in named}
    for r in window:  # recorded arrivals may bring their own
        classes.setdefault(r.slo, SloClass(round(1e3 / r.slo.tpot_ms, 3)))
    for key, slo in classes.items():
        served = [r.served() for r in window if r.slo == key]
        counted = account(served, start, end, now)
        found.append(
            ClassReport(
                slo.name or f"{slo.rate:g} tok/s",
                counted.arrived,
                counted.attainment if counted.arrived else None,
                counted.goodput,
                _ttft_ms(served),
                _tpot_ms(served),
            )
        )
    return tuple(found)
