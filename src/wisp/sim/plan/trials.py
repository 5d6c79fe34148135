"""Simulations that overrule an estimate: with as many devices as are asked for and, where these are too many, with
fewer, until a number is found that is carried."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from wisp.sim.capacity import watched
from wisp.sim.plan.estimate import Estimate, cap
from wisp.sim.runs import Job, Runs, remembered
from wisp.sim.scenario import Scenario
from wisp.sim.systems import System, system

SEEDS = (1, 2)
GRAIN = 0.1  # a search ends once it knows the number of devices to this share
Watch = Callable[[str, int, int], None]  # the numbers simulated, runs done, runs known to be needed


class Trials:
    """Simulations of a scenario with different numbers of devices. Centrally, sessions are capped where steps would
    grow too long."""

    def __init__(self, scenario: Scenario, tolerance: float, runs: Runs, watch: Watch) -> None:
        self.scenario = scenario
        self.tolerance = tolerance
        self.runs = runs
        self.watch = watch
        self.done = self.known = 0

    def overrule(self, found: dict[str, Estimate]) -> dict[str, Estimate]:
        """Estimates as simulations have them."""
        n = self.scenario.devices_n
        rates = self.violations([(name, n) for name in found])
        settled = {}
        for (name, e), rate in zip(found.items(), rates, strict=True):
            devices, tried = max(e.devices, n), e.devices <= n
            if rate > self.tolerance:
                devices, tried = self.most(name, e.devices), True
            settled[name] = msgspec.structs.replace(e, devices=devices, tried=tried, simulated=rate)
        return settled

    def most(self, name: str, start: int) -> int:
        """The most devices, fewer than asked for, that are carried; 0 if not even one is."""
        low, high = 0, self.scenario.devices_n
        at, less = max(1, min(start, int(0.9 * high))), 0.85
        while high - low > max(1, GRAIN * low):
            (rate,) = self.violations([(name, at)])
            if rate <= self.tolerance:
                low = at
            else:
                high = at
            at, less = (low + high) // 2 if low else max(1, int(at * less)), max(0.5, 0.85 * less)
        return low

    def violations(self, tried: Sequence[tuple[str, int]]) -> list[float]:
        """Share of requests that miss their SLO, for each system and number of devices."""
        jobs = [
            Job(scenario, _at_its_best(name, scenario), seed, self.tolerance)
            for name, scenario in ((name, watched(self.scenario.with_devices(n))) for name, n in tried)
            for seed in SEEDS
        ]
        what = " and ".join(f"{n} {'with WISP' if name == 'wisp' else 'without'}" for name, n in tried)
        self.known += len(jobs)
        self.watch(what, self.done, self.known)
        reports = []
        for found in self.runs.map(remembered, jobs):
            reports.append(found)
            self.done += 1
            self.watch(what, self.done, self.known)
        rates = []
        for i in range(len(tried)):
            of = reports[i * len(SEEDS) : (i + 1) * len(SEEDS)]
            arrived = sum(r.arrived for r in of)
            rates.append(sum(r.missed * r.arrived for r in of) / arrived if arrived else 1.0)
        return rates


def _at_its_best(name: str, scenario: Scenario) -> System:
    most = cap(scenario)
    return system(f"central,slots={most}" if name == "central" and most else name)
