"""What a run has shown, as data: service by class, batches, interference, waste; and as a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
from rich.table import Table

from wisp.core.protocol.slo import account, met
from wisp.sim.scenario import Scenario, SloClass
from wisp.sim.simulate import Simulation, quantile
from wisp.sim.world import Request


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
        return cls(*(round(v, 3) for v in (fmean(values), quantile(values, 0.5), quantile(values, 0.99))))


class ClassReport(msgspec.Struct, frozen=True):
    """Service of one SLO class. attainment: share of arrived requests that met their SLO (None: nothing arrived)."""

    name: str
    arrived: int
    attainment: float | None
    goodput: float
    ttft_ms: Spread
    tpot_ms: Spread


class Report(msgspec.Struct, frozen=True):
    """A run. Latencies at the user, of requests that arrived in the window; counts of batches of the whole run.

    violation_rate:    nan if nothing arrived
    cut:               the run was stopped early, its outcome being clear; rates are then estimates
    violators_tpot_p99_ms: of requests that missed their SLO, unfinished ones as they stood (None: none had a second
                       token)
    acceptance:        share of draft tokens (None: there were none)
    busy:              share of time with a step in the engine
    interference_ms:   by slice: its step's time, less the cost model's for it alone
    wasted_ms:         drafting past a first rejection, in all; ahead_wasted: tokens drafted ahead and thrown away
    price:             what verdicts asked for a draft token, in tokens
    refused, refusals: requests that were refused for good; times that any was refused
    """

    scenario: str
    system: str
    seed: int
    devices: int
    cut: bool
    simulated_s: float
    arrived: int
    violation_rate: float
    request_goodput: float
    goodput: float
    output_throughput: float
    completed: int
    failed: int
    classes: tuple[ClassReport, ...]
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2el_ms: Spread
    violators_tpot_p99_ms: float | None
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
    drafting_ms: float
    wasted_ms: float
    ahead_wasted: int
    price: Spread
    kv_evictions: int
    refused: int = 0
    refusals: int = 0

    def benchmark(self) -> dict[str, Any]:
        """As one JSON object, latencies under the names that serving benchmarks use. Null is what there is not."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        if math.isnan(self.violation_rate):
            data["violation_rate"] = None
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
            spread = data.pop(name)
            data |= {f"{kind}_{name}": spread[kind] for kind in ("mean", "median", "p99")}
        return data


def report(
    simulation: Simulation, seed: int, *, cut: bool = False, violation_rate: float | None = None
) -> Report:
    """Of a simulation that has run. `violation_rate`: an estimate, for a run that was cut."""
    s, counts, now = simulation.scenario, simulation.counts, simulation.env.now
    start, end = s.warmup_s, s.warmup_s + s.window_s
    window = [r for r in simulation.requests if start <= r.arrived < end]
    seconds = max(min(end, now) - start, 1e-9)
    good = account([r.served() for r in window], start, start + seconds, now)
    steps = max(counts.steps, 1)
    return Report(
        scenario=s.title,
        system=simulation.system.name,
        seed=seed,
        devices=len(simulation.handsets)
        if s.open
        else max((n for _, n in s.population), default=s.devices_n),
        cut=cut,
        simulated_s=round(now, 3),
        arrived=len(window),
        violation_rate=good.violation_rate if violation_rate is None else violation_rate,
        request_goodput=good.met / seconds,
        goodput=good.goodput,
        output_throughput=sum(r.tokens for r in window) / seconds,
        completed=sum(r.ended is not None and r.ok for r in window),
        failed=sum(not r.ok for r in window),
        classes=_classes(s, window, start, start + seconds, now),
        **_latencies(window),
        violators_tpot_p99_ms=_violators_p99(window, now),
        steps=counts.steps,
        step_ms=counts.busy_ms / steps,
        busy=counts.busy_ms / 1e3 / now,
        sessions_a_step=counts.slices / steps,
        rows_a_step=counts.rows / steps,
        prefill_share=counts.prefill_rows / max(counts.rows, 1),
        drafts=counts.drafts,
        draft_tokens=counts.draft_rows,
        acceptance=counts.accepted / counts.draft_rows if counts.draft_rows else None,
        tokens=counts.tokens,
        interference_ms=Spread.of(counts.interference_ms),
        drafting_ms=counts.drafting_ms,
        wasted_ms=counts.wasted_ms,
        ahead_wasted=counts.ahead_wasted,
        price=Spread.of(counts.prices),
        kv_evictions=counts.evicted,
        refused=sum(r.refused for r in window),
        refusals=sum(r.refusals for r in window),
    )


def _latencies(requests: Sequence[Request]) -> dict[str, Spread]:
    served = [r.served() for r in requests if r.tokens]
    return {
        "ttft_ms": Spread.of([s.ttft_ms for s in served]),
        "tpot_ms": Spread.of([s.tpot_ms for s in served if s.tokens > 1]),
        "itl_ms": Spread.of([gap for r in requests for gap in r.gaps_ms]),
        "e2el_ms": Spread.of([(s.last - s.arrived) * 1e3 for s in served if s.ended is not None]),
    }


def _violators_p99(requests: Sequence[Request], now: float) -> float | None:
    missed = [r for r in requests if r.tokens > 1 and not met(r.served(), now)]
    paces = [((r.last if r.ended is not None else now) - r.first) * 1e3 / (r.tokens - 1) for r in missed]
    return quantile(paces, 0.99) if paces else None


def _classes(
    scenario: Scenario, window: Sequence[Request], start: float, end: float, now: float
) -> tuple[ClassReport, ...]:
    found = []
    classes = {c.slo: c for c in scenario.slo}
    for r in window:  # recorded arrivals may bring their own
        classes.setdefault(r.slo, SloClass(round(1e3 / r.slo.tpot_ms, 3)))
    for key, slo in classes.items():
        of_class = [r for r in window if r.slo == key]
        counted = account([r.served() for r in of_class], start, end, now)
        latencies = _latencies(of_class)
        found.append(
            ClassReport(
                slo.name or f"{slo.rate:g} tok/s",
                counted.arrived,
                counted.attainment if counted.arrived else None,
                counted.goodput,
                latencies["ttft_ms"],
                latencies["tpot_ms"],
            )
        )
    return tuple(found)


def number(value: float | None, how: str = ".1f") -> str:
    """For people; a dash for what there is not."""
    return "-" if value is None else format(value, how)


def table(r: Report) -> Table:
    """For people."""
    out = Table(title=f"{r.scenario}: {r.devices} devices, {r.system}, seed {r.seed}", show_header=False)
    out.add_column()
    out.add_column(justify="right")
    for c in r.classes:
        kept = "nothing arrived" if c.attainment is None else f"{c.attainment:.1%} of {c.arrived}"
        out.add_row(f"{c.name}: SLO met", kept)
        out.add_row(f"{c.name}: goodput", f"{c.goodput:.1f} tokens/s")
    out.add_row("goodput, all", f"{r.goodput:.1f} of {r.output_throughput:.1f} tokens/s")
    out.add_section()
    for name, spread in (("TTFT", r.ttft_ms), ("TPOT", r.tpot_ms), ("gap between messages", r.itl_ms)):
        shown = " / ".join(number(v) for v in (spread.mean, spread.median, spread.p99))
        out.add_row(f"{name}, ms: mean / median / p99", shown)
    out.add_row("p99 TPOT of those that missed, ms", number(r.violators_tpot_p99_ms))
    out.add_section()
    out.add_row("steps; mean time; engine busy", f"{r.steps}; {r.step_ms:.1f} ms; {r.busy:.0%}")
    out.add_row("sessions and tokens a step", f"{r.sessions_a_step:.1f}; {r.rows_a_step:.1f}")
    out.add_row("of these prompts", f"{r.prefill_share:.0%}")
    out.add_row("draft tokens; accepted", f"{r.draft_tokens}; {number(r.acceptance, '.0%')}")
    out.add_row(
        "verification interference, ms: mean / p99",
        f"{number(r.interference_ms.mean)} / {number(r.interference_ms.p99)}",
    )
    out.add_row("drafting wasted, ms a token", f"{r.wasted_ms / max(r.tokens, 1):.2f}")
    out.add_row(
        "price of a draft token: mean / p99", f"{number(r.price.mean, '.3f')} / {number(r.price.p99, '.3f')}"
    )
    out.add_row("KV evictions", str(r.kv_evictions))
    out.add_row("refused for good; refusals in all", f"{r.refused}; {r.refusals}")
    return out


def chrome_trace(simulation: Simulation) -> str:
    """What a traced simulation did, for chrome://tracing: the server's steps, each device's drafts and waits."""
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
        for pid, name in ((0, "verifier"), (1, "devices drafting"), (2, "devices waiting"))
    ]
    for what, at, ms, who, tokens in simulation.counts.events:
        step = what == "step"
        events.append(
            {
                "name": what,
                "ph": "X",
                "ts": round(at * 1e6),
                "dur": round(ms * 1e3),
                "pid": {"step": 0, "draft": 1}.get(what, 2),
                "tid": 0 if step else who,
                "args": {"sessions": who, "tokens": tokens} if step else {"tokens": tokens},
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def draw(simulation: Simulation, path: Path) -> None:
    """Plot each request of a traced run at its arrival, and the sizes of steps over time."""
    from wisp.sim.plots import ACCEPTED, OWN, REJECTED, pyplot

    plt = pyplot()
    figure, (first, pace, steps) = plt.subplots(3, 1, figsize=(10, 7.5), sharex=True)
    now = simulation.env.now
    served = [r.served() for r in simulation.requests if r.tokens > 1]
    colours = [ACCEPTED if met(s, now) else REJECTED for s in served]
    arrived = [s.arrived for s in served]
    first.scatter(arrived, [s.ttft_ms for s in served], s=8, c=colours)
    first.set_ylabel("TTFT (ms)")
    first.set_title("requests at their arrival; green met their SLO", loc="left", fontsize=9)
    pace.scatter(arrived, [s.tpot_ms for s in served], s=8, c=colours)
    for slo in simulation.scenario.slo:
        pace.axhline(slo.slo.tpot_ms, lw=0.8, color="black")
    pace.set_ylabel("TPOT (ms)")
    runs = [e for e in simulation.counts.events if e[0] == "step"]
    steps.plot([e[1] for e in runs], [e[4] for e in runs], lw=0.5, color=OWN)
    steps.set_ylabel("tokens a step")
    steps.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def missed_for_sure(request: Request, now: float) -> bool:
    """Whatever happens from now on, has it missed its SLO?"""
    served = request.served()
    if served.ended is not None or not served.ok or served.tokens == 0:
        return not met(served, now)
    if served.slo.ttft_ms and served.ttft_ms > served.slo.ttft_ms:
        return True
    longest = (request.max_tokens - 1) * served.slo.tpot_ms
    return bool(longest) and (now - served.first) * 1e3 > longest
