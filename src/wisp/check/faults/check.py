"""Many seeds, in several processes, and their report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from wisp.check.faults.plan import plan_of
from wisp.check.faults.world import Outcome, run_plan
from wisp.progress import Tell
from wisp.sim.runs import Runs

AT_ONCE = 16  # seeds that a process is given at a time


class Report(msgspec.Struct):
    """What many runs came to. `cpu_s`: of all processes. violations: by seed."""

    first_seed: int
    seeds: int = 0
    faults: int = 0
    requests: int = 0
    tokens: int = 0
    events: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    by_kind: dict[str, int] = {}
    by_situation: dict[str, int] = {}
    by_outcome: dict[str, int] = {}
    violations: dict[int, str] = {}

    @property
    def passed(self) -> bool:
        return self.seeds > 0 and not self.violations


class Batch(msgspec.Struct):
    """Runs that one process has done, and what they took."""

    outcomes: list[Outcome]
    cpu_s: float


def run_seeds(seeds: Sequence[int]) -> Batch:
    """One after another."""
    began = time.process_time()
    return Batch([run_plan(plan_of(seed)) for seed in seeds], time.process_time() - began)


def check(first: int, seeds: int, *, minutes: float, jobs: int, tell: Tell = lambda *_: None) -> Report:
    """Run `seeds` seeds from `first` on, or as many as `minutes` allow (0: all)."""
    report = Report(first)
    kinds, situations, outcomes = Counter[str](), Counter[str](), Counter[str]()
    until = time.monotonic() + minutes * 60.0 if minutes else float("inf")
    with Runs(jobs) as runs:
        for share in _shares(first, seeds, jobs):
            for batch in runs.finished(run_seeds, share):
                report.cpu_s = round(report.cpu_s + batch.cpu_s, 2)
                for outcome in batch.outcomes:
                    _add(report, outcome)
                    kinds.update(outcome.faults)
                    situations.update(outcome.seen)
                    outcomes.update(outcome.asks)
            tell("Seeds", report.seeds, seeds)
            if time.monotonic() >= until:
                break
    report.by_kind, report.by_outcome = dict(sorted(kinds.items())), dict(sorted(outcomes.items()))
    report.by_situation = dict(sorted(situations.items()))
    report.virtual_s = round(report.virtual_s, 1)
    return report


def _shares(first: int, seeds: int, jobs: int) -> Iterator[list[range]]:
    """Seeds for all processes, a list of ranges at a time."""
    size = AT_ONCE if jobs > 1 or seeds > AT_ONCE else 1
    for start in range(first, first + seeds, size * jobs):
        end = min(first + seeds, start + size * jobs)
        yield [range(s, min(end, s + size)) for s in range(start, end, size)]


def _add(report: Report, outcome: Outcome) -> None:
    report.seeds += 1
    report.faults += sum(outcome.faults.values())
    report.requests += sum(outcome.asks.values())
    report.tokens += outcome.tokens
    report.events += outcome.events
    report.virtual_s += outcome.virtual_s
    if outcome.found is not None:
        report.violations[outcome.seed] = outcome.found.what
