"""Capacity: the most devices of which no more than a tolerated share of requests misses its SLO.

    estimate by the fluid bound  ->  a bracket, one seed  ->  bisection  ->  all seeds around the crossing

All systems see the same seeds. A baseline with something to tune is given its best: each variant is raced against the
best one so far, at slightly more devices than that can carry, and only a variant that manages is searched itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter

import msgspec
import numpy as np

from wisp.core.errors import ConfigError
from wisp.core.verify.batching.simple import FOR_PROMPTS
from wisp.sim.fluid import Bound, bound
from wisp.sim.paper import cap, paper_capacity
from wisp.sim.report import Report
from wisp.sim.runs import Job, Runs
from wisp.sim.scenario import Kit, Scenario
from wisp.sim.simulate import BESIDE
from wisp.sim.systems import PAPER_MODELS, SYSTEMS, System, system

STRICT = 0.01  # the tolerance that is always reported beside the one asked for
GRAIN = 0.02  # a crossing is searched to one device or this share
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
MOST = 4096  # devices
CHUNKS = (256, 128)  # tokens of a step that central serving may choose
FEWEST = 100  # requests by which a number of devices is judged, if windows need be no more than
LONGEST = 10.0  # times as long for it


class Capacity(msgspec.Struct, frozen=True):
    """The result of a search.

    variant:     the system as tuned
    rate:        tokens per second that users expect (None: there are classes of them)
    capacity:    devices; low, high: its confidence interval
    goodput, violation_rate, violators_tpot_p99_ms: at capacity, means over seeds
    capacity_at_1_percent: the same with a tolerance of 1 % (None: not searched for)
    bound:       the fluid bound for this kind of system (no drafts, drafts of devices, or of a drafter beside the
                 target), all devices being served
    bound_waiting: with devices that wait for a first token as long as they may
    fraction, fraction_waiting: capacity over these
    """

    scenario: str
    system: str
    variant: str
    rate: float | None
    tolerance: float
    seeds: tuple[int, ...]
    capacity: int
    low: int
    high: int
    goodput: float
    violation_rate: float
    violators_tpot_p99_ms: float | None
    capacity_at_1_percent: int | None
    bound: float
    fraction: float
    bound_waiting: float
    fraction_waiting: float
    runs: int = 0
    seconds: float = 0.0
    about: str = ""


def variants(policy: str, scenario: Scenario) -> list[System]:
    """The systems among which `policy` may choose. Raises ConfigError."""
    if policy == "sled":
        fixed = [system(f"sled,drafting=fixed:{k}") for k in (3, 4, 2, 6, 8)]
        return [*fixed, *(system(f"sled,drafting=confidence:{p}") for p in (0.4, 0.6, 0.2))]
    if policy == "central":
        return [system(f"central{limit}") for limit in _limits(scenario)]
    if policy == "central-speculative":
        drafts = [f"central-speculative,drafting=fixed:{k}" for k in (2, 1, 3, 4)]
        limited = [f"{of}{limit}" for limit in _limits(scenario) if limit for of in drafts[:2]]
        return [system(spec) for spec in (*drafts, *limited)]
    of = system(policy)
    if of.admission and "admission=" not in policy:
        # The search asks how many can be served. Who is refused asks again, and would count each time.
        return [system(f"{policy},admission=no")]
    return [of]


def _limits(scenario: Scenario) -> list[str]:
    """What a central server may limit, as changes of a system.

    Requests beyond a cap wait within their TTFT target instead of slowing all others down; smaller chunks of prompts
    slow decodes down less.
    """
    most = bound(scenario, central=True).devices
    caps = [f",slots={round(most * share)}" for share in (1.0, 0.93, 0.85) if most > 4]
    return [*caps, "", *(f"{cap},step_tokens={n}" for n in chunks(most) for cap in (*caps[:1], ""))]


def chunks(devices: float) -> list[int]:
    """Tokens of a step that leave room for so many decodes, fewer than a profile's own."""
    return [n for n in CHUNKS if devices < n - n // FOR_PROMPTS]


@dataclass
class Search:
    """Violation rates by number of devices, as far as they have been measured."""

    scenario: Scenario
    system: System
    seeds: Sequence[int]
    runs: Runs
    give_up: float
    grain: float = GRAIN
    watch: Callable[[str], None] = lambda what: None
    known: dict[int, dict[int, Report]] = field(default_factory=dict)  # by devices, by seed

    def rate(self, n: int, seeds: int) -> float:
        """Mean violation rate of `n` devices over the first `seeds` seeds."""
        found = self.known.setdefault(n, {})
        wanted = [s for s in self.seeds[:seeds] if s not in found]
        scenario = watched(self.scenario.with_devices(n))
        jobs = [Job(scenario, self.system, seed, self.give_up) for seed in wanted]
        found |= zip(wanted, self.runs.reports(jobs), strict=True)
        return fmean(found[s].missed for s in self.seeds[:seeds])

    def crossing(self, start: int, tolerance: float, seeds: int, stride: float = 0.12) -> int:
        """The most devices within tolerance: a bracket around `start`, then bisection. 0 if not even one is."""
        low, high, n = 0, MOST + 1, max(start, 1)
        while high - low > max(1, int(self.grain * low)):
            less, more = f"carries {low}, " if low else "", f", not {high}" if high <= MOST else ""
            self.watch(f"{self.system.name}, {tolerance:.0%} late: {less}trying {n}{more}")
            if self.rate(n, seeds) <= tolerance:
                low = n
            else:
                high = n
            if low and high <= MOST:
                n = (low + high) // 2
            elif low:
                n = min(max(n + 1, int(n * (1 + stride))), MOST)
            else:
                n = max(int(n * (1 - stride)), 1)
            stride = min(1.5 * stride, 0.5)
        return low

    def interval(self, at: int, tolerance: float) -> tuple[int, int]:
        """95 %: the spread over seeds, divided by how steeply violations rise with devices; at least as far as the
        next number that was tried.

        With one seed the spread is that of independent requests, which is too small.
        """
        near = {n: r for n, r in self.known.items() if 0.7 * at <= n <= 1.3 * at}
        rates = {n: [x.missed for x in r.values()] for n, r in near.items()}
        groups = [v for v in rates.values() if len(v) > 1]
        if groups:
            freedom = sum(len(v) - 1 for v in groups)
            spread = math.sqrt(sum((x - fmean(v)) ** 2 for v in groups for x in v) / freedom)
            error = T95[min(freedom, len(T95)) - 1] * spread / math.sqrt(max(map(len, groups)))
        else:
            arrived = fmean([x.arrived for r in near.values() for x in r.values()] or [1.0])
            error = 1.96 * math.sqrt(tolerance * (1 - tolerance) / max(arrived, 1.0))
        step = max(1, int(self.grain * at))
        low, high = at - step, at + step
        if len(rates) > 1:
            xs = np.array([n for n, v in rates.items() for _ in v], float)
            ys = np.array([x for v in rates.values() for x in v])
            slope = float(np.polyfit(xs - at, np.minimum(ys, 3 * tolerance), 1)[0])
            if slope > 0:
                half = math.ceil(error / slope)
                low, high = min(low, at - half), max(high, at + half)
        return max(low, 0), high


def capacity(
    scenario: Scenario,
    policy: str,
    *,
    tolerance: float = 0.1,
    seeds: Sequence[int] = (1, 2, 3),
    runs: Runs | None = None,
    strict: bool = True,
    grain: float = GRAIN,
    watch: Callable[[str], None] = lambda what: None,
) -> Capacity:
    """Search. strict: also at 1 %; grain: to one device or this share of them; watch: is told of each try. Raises
    ConfigError."""
    began = perf_counter()
    if scenario.open:
        raise ConfigError(
            f"{scenario.title}: its requests come by themselves, so it has no number of devices to search for; "
            "take a scenario without arrivals_per_s and arrivals, or `wisp sim run` this one"
        )
    name = policy.partition(",")[0]
    if name in PAPER_MODELS:
        return _by_paper(scenario, policy, tolerance)
    if name not in SYSTEMS:
        raise ConfigError(f"unknown policy {name!r}; choose one of {', '.join([*SYSTEMS, *PAPER_MODELS])}")
    runs = runs or Runs()
    limit = limit_of(system(policy), scenario)
    give_up = max(tolerance, STRICT)
    best: tuple[int, Search] | None = None
    searched: list[Search] = []
    for tuned in variants(policy, scenario):
        search = Search(scenario, tuned, seeds, runs, give_up, grain, watch)
        searched.append(search)
        start = max(1, round(_guess(policy) * limit.devices))
        if best is not None:
            start = best[0] + max(1, int(grain * best[0]))
            watch(f"{tuned.name}: does it carry {start}, more than {best[1].system.name}?")
            if search.rate(start, 1) > tolerance:
                continue
        found = search.crossing(start, tolerance, 1)
        if best is None or found > best[0]:
            best = found, search
    assert best is not None
    at, search = best
    if not at and not any(r.arrived for s in searched for of in s.known.values() for r in of.values()):
        raise ConfigError(
            f"{scenario.title}: no request arrived in the window of {scenario.window_s:g} s, so that nothing can be "
            "said of it: give the scenario a longer window_s, or less think_s"
        )
    if len(seeds) > 1 and at:
        at = search.crossing(at, tolerance, len(seeds), max(grain, GRAIN))
    strictly: int | None = None
    if strict:
        strictly = search.crossing(max(1, int(0.93 * at)), STRICT, len(seeds), 0.06) if at else 0
        strictly = min(at, strictly) if tolerance >= STRICT else strictly
    found_at = list(search.known.get(at, {}).values())
    low, high = search.interval(at, tolerance) if at else (0, 1)
    return Capacity(
        scenario=scenario.title,
        system=policy,
        variant=search.system.name,
        rate=scenario.slo[0].rate if len(scenario.slo) == 1 else None,
        tolerance=tolerance,
        seeds=tuple(seeds),
        capacity=at,
        low=low,
        high=high,
        goodput=fmean([r.goodput for r in found_at] or [0.0]),
        violation_rate=fmean([r.missed for r in found_at] or [0.0]),
        violators_tpot_p99_ms=max((r.violators_tpot_p99_ms or 0.0 for r in found_at), default=0.0) or None,
        capacity_at_1_percent=strictly,
        bound=_round(limit.devices),
        fraction=_share(at, limit.devices),
        bound_waiting=_round(limit.waiting),
        fraction_waiting=_share(at, limit.waiting),
        runs=sum(len(r) for s in searched for r in s.known.values()),
        seconds=round(perf_counter() - began, 2),
        about=search.system.about,
    )


def watched(scenario: Scenario) -> Scenario:
    """With a window long enough for few devices, so that a single late answer does not decide the rate."""
    each_s = scenario.answer_s + scenario.think_s
    window_s = max(scenario.window_s, min(FEWEST * each_s / scenario.devices_n, LONGEST * scenario.window_s))
    return msgspec.structs.replace(scenario, window_s=window_s)


def limit_of(of: System, scenario: Scenario) -> Bound:
    """The fluid bound for a kind of system."""
    if of.beside:  # no device drafts, and no draft is under way
        scenario = msgspec.structs.replace(scenario, devices=(Kit(f"{BESIDE:.0f}", 0.0),))
    return bound(scenario, central=not of.drafting)


def _guess(policy: str) -> float:
    """Where to begin, as a share of the bound."""
    name = policy.partition(",")[0]
    return {"wisp": 0.87, "central": 0.98, "paper": 0.7, "sled": 0.5}.get(name, 0.7)


def _round(devices: float) -> float:
    return round(devices, 1)


def _share(at: float, of: float) -> float:
    return round(at / max(of, 1e-9), 3)


def _by_paper(scenario: Scenario, policy: str, tolerance: float) -> Capacity:
    if policy not in PAPER_MODELS:
        raise ConfigError(f"{policy}: the paper's figures are as they are; leave out the changes")
    if len(scenario.slo) > 1:
        raise ConfigError(
            f"{policy} knows one pace, and {scenario.title} has {len(scenario.slo)} classes of users: "
            "give --rate, or take another policy"
        )
    of, rate = PAPER_MODELS[policy], scenario.slo[0].rate
    at = paper_capacity(scenario.hardware, of, rate)
    limit = bound(scenario, central=of == "central")
    return Capacity(
        scenario=scenario.title,
        system=policy,
        variant=policy,
        rate=rate,
        tolerance=tolerance,
        seeds=(),
        capacity=at,
        low=at,
        high=at,
        goodput=at * rate,
        violation_rate=0.0,
        violators_tpot_p99_ms=None,
        capacity_at_1_percent=at,
        bound=_round(limit.devices),
        fraction=_share(at, limit.devices),
        bound_waiting=_round(limit.waiting),
        fraction_waiting=_share(at, limit.waiting),
        about=f"no simulation: {cap(scenario.hardware, of):.0f} tokens/s, fitted to the paper's own {of} row",
    )
