"""Bursts: how many SLOs each system keeps at several times the usual load, and how soon it recovers.

A user's request counts once, however often it had to be sent. A refused request is sent again after its Retry-After,
until it is served; the time to the first token counts from the first attempt. So refusing early and serving late are
measured alike: neither user had an answer in time. The benefit of refusals (no work on answers that come too late, the
others in time) shows in goodput and attainment; their cost to users, in how many were refused and how often.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from benchmarks.pages import Data, table
from wisp.core.protocol.slo import met
from wisp.sim.fluid import bound
from wisp.sim.plots import picture
from wisp.sim.report import report
from wisp.sim.request import Request
from wisp.sim.runs import Runs
from wisp.sim.scenario import Scenario, load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

SYSTEMS = ("wisp", "paper", "central", "sled")
WELL = 0.9  # attainment that counts as recovered
SPAN_S = 5.0  # over which it is taken


class Burst(msgspec.Struct, frozen=True):
    """One run of a population."""

    scenario: Scenario
    system: str
    seed: int


def run(quick: bool, runs: Runs) -> Data:
    scenario = load_scenario("bursts")
    if quick:
        scenario = msgspec.structs.replace(
            scenario.brief(8.0, 30.0, 20.0), population=((0.0, 10), (15.0, 110), (25.0, 20))
        )
    slots = round(bound(scenario, central=True).devices)
    specs = {s: f"central,slots={slots}" if s == "central" else s for s in SYSTEMS[: 2 if quick else 4]}
    seeds = (1,) if quick else (1, 2, 3)
    jobs = [Burst(scenario, spec, seed) for spec in specs.values() for seed in seeds]
    found = list(runs.map(burst, jobs))
    by = {
        name: [f for f, j in zip(found, jobs, strict=True) if j.system == spec]
        for name, spec in specs.items()
    }
    return {
        "population": scenario.population,
        "spikes": spikes(scenario),
        "bound": bound(scenario).devices,
        "bound_central": bound(scenario, central=True).devices,
        "systems": {name: _mean(of) for name, of in by.items()},
        "variants": specs,
    }


def spikes(scenario: Scenario) -> list[tuple[float, float, int]]:
    """From, until, devices: where the population jumps to what is at least double, for a while."""
    steps = scenario.population
    return [
        (at, until, n)
        for (_, before), (at, n), (until, after) in zip(steps, steps[1:], steps[2:], strict=False)
        if n >= 1.9 * before and n > 1.9 * after
    ]


def burst(job: Burst) -> dict[str, Any]:
    """Attainment by class, in all and of what arrived in each spike; and the seconds until all was well again.

    requests: distinct ones per second of the window; met: those that met their SLO
    refused:  share that was refused at least once; refusals: how often, on average, a request was
    """
    simulation = Simulation(job.scenario, system(job.system), job.seed)
    simulation.run()
    found, window, now, s = report(simulation), simulation.window(), simulation.env.now, job.scenario
    names = [c.name for c in s.slo]
    of = {c.name: [r for r in window if r.slo == c.slo] for c in s.slo}
    periods = spikes(s)
    ends = [at for at, _, _ in periods[1:]] + [s.warmup_s + s.window_s]
    return {
        "all": _share(window, now),
        "requests": found.arrived / s.window_s,
        "met": found.met / s.window_s,
        "goodput": found.goodput,
        "refused": fmean([r.refusals > 0 for r in window]),
        "refusals": fmean([r.refusals for r in window]),
        "classes": {name: _share(of[name], now) for name in names},
        "spikes": [
            {name: _share([r for r in of[name] if at <= r.arrived < until], now) for name in names}
            | {"all": _share([r for r in window if at <= r.arrived < until], now)}
            for at, until, _ in periods
        ],
        "recovery_s": [
            _recovery(window, until, end, now) for (_, until, _), end in zip(periods, ends, strict=True)
        ],
        "timeline": _timeline(window, s, now),
    }


def _share(requests: list[Request], now: float) -> float:
    return fmean([met(r.served(), now) for r in requests]) if requests else 1.0


def _recovery(requests: list[Request], since: float, end: float, now: float) -> float:
    """Seconds after `since` until enough meets its SLO of what arrives in each of three spans in a row.

    While the server works off what the spike left, nothing may arrive: such spans are not well.
    """
    at = since
    while at < end:
        spans = [
            [r for r in requests if t <= r.arrived < t + SPAN_S] for t in (at, at + SPAN_S, at + 2 * SPAN_S)
        ]
        if all(of and _share(of, now) >= WELL for of in spans):
            return at - since
        at += SPAN_S
    return end - since


def _timeline(requests: list[Request], s: Scenario, now: float) -> list[tuple[float, float]]:
    spans = [s.warmup_s + i * SPAN_S for i in range(int(s.window_s / SPAN_S))]
    return [(t, _share([r for r in requests if t <= r.arrived < t + SPAN_S], now)) for t in spans]


def _mean(found: list[Any]) -> Any:
    """The mean of nested figures."""
    first = found[0]
    if isinstance(first, dict):
        return {key: _mean([f[key] for f in found]) for key in first}
    if isinstance(first, list | tuple):
        return [_mean(list(of)) for of in zip(*found, strict=True)]
    return round(fmean(found), 4)


def figures(data: Data) -> Data:
    systems = data["systems"]
    names = list(next(iter(systems.values()))["classes"])
    attainment = [
        (
            s,
            *(f"{of['classes'][n]:.0%}" for n in names),
            f"{of['all']:.0%}",
            f"{of['requests']:.2f}",
            f"{of['met']:.2f}",
            f"{of['goodput']:.0f}",
            f"{of['refused']:.0%}",
            f"{of['refusals']:.1f}",
        )
        for s, of in systems.items()
    ]
    rows = []
    for i, (at, until, n) in enumerate(data["spikes"]):
        for s, of in systems.items():
            spike = of["spikes"][i]
            shares = [f"{spike[name]:.0%}" for name in (*names, "all")]
            rows.append((f"{n} for {until - at:g} s", s, *shares, f"{of['recovery_s'][i]:.0f} s"))
    head = ("system", *names, "all")
    measured = ("requests", "met", "goodput, tokens/s", "refused", "times")
    return {
        "attainment": table((*head, *measured), attainment),
        "recovery": table(("spike", *head, "recovery"), rows),
    }


def draw(data: Data, path: Path) -> None:
    """Attainment over time, above the population."""
    with picture(path, 2, 1, figsize=(9, 5), sharex=True, height_ratios=(3, 1)) as (above, below):
        for name, of in data["systems"].items():
            above.plot([t for t, _ in of["timeline"]], [v for _, v in of["timeline"]], label=name)
        above.set_ylabel("SLO met, by arrival")
        above.legend()
        below.step(
            [t for t, _ in data["population"]],
            [n for _, n in data["population"]],
            where="post",
            color="black",
        )
        below.set_ylabel("devices")
        below.set_xlabel("seconds")
