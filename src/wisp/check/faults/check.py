"""Many seeds, in several processes, and their report. A report can be kept in a file, and gone on with."""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

import wisp
from wisp.check.faults.plan import plan_of
from wisp.check.faults.world import Outcome, run_plan
from wisp.core.errors import ConfigError
from wisp.progress import Tell
from wisp.sim.runs import Runs

AT_ONCE = 16  # seeds that a process is given at a time


class Report(msgspec.Struct):
    """What many runs came to: those of `seeds` seeds, without a gap.

    cpu_s:      of all processes
    violations: by seed
    source:     a hash of the code that was checked, of version `wisp`
    date:       of the last run
    """

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
    source: str = ""
    wisp: str = ""
    date: str = ""

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


def check(
    first: int,
    seeds: int,
    *,
    minutes: float,
    jobs: int,
    resume: Path | None = None,
    tell: Tell = lambda *_: None,
) -> Report:
    """Run `seeds` seeds from `first` on, or as many as `minutes` allow (0: all).

    resume: a file for the report. What it has is not run again. Raises ConfigError if that is not of this code and of
    the same first seed.
    """
    report = _begun(first, resume)
    until = time.monotonic() + minutes * 60.0 if minutes else float("inf")
    with Runs(jobs) as runs:
        for share in _shares(first + report.seeds, first + seeds, jobs):
            for batch in runs.finished(run_seeds, share):
                report.cpu_s = round(report.cpu_s + batch.cpu_s, 2)
                for outcome in batch.outcomes:
                    _add(report, outcome)
            report.date = datetime.date.today().isoformat()
            if resume is not None:
                _write(resume, report)
            tell("Seeds", report.seeds, seeds)
            if time.monotonic() >= until:
                break
    return report


def _begun(first: int, path: Path | None) -> Report:
    """The report to go on with."""
    source = source_hash()
    if path is None or not path.exists():
        return Report(first, source=source, wisp=wisp.__version__)
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as a report of `wisp check-faults`: {error}") from None
    if report.source != source:
        raise ConfigError(f"{path} is of other code: its runs and those to come cannot be added up")
    if report.first_seed != first:
        raise ConfigError(f"{path} begins with seed {report.first_seed}, and not with {first}")
    return report


def _write(path: Path, report: Report) -> None:
    """In one piece, or not at all."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    partial.replace(path)


def source_hash() -> str:
    """Of all of the product's code, the check's own included."""
    root, digest = Path(wisp.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _shares(first: int, end: int, jobs: int) -> Iterator[list[range]]:
    """Seeds for all processes, a list of ranges at a time."""
    size = AT_ONCE if jobs > 1 or end - first > AT_ONCE else 1
    for start in range(first, end, size * jobs):
        stop = min(end, start + size * jobs)
        yield [range(s, min(stop, s + size)) for s in range(start, stop, size)]


def _add(report: Report, outcome: Outcome) -> None:
    report.seeds += 1
    report.faults += sum(outcome.faults.values())
    report.requests += sum(outcome.asks.values())
    report.tokens += outcome.tokens
    report.events += outcome.events
    report.virtual_s = round(report.virtual_s + outcome.virtual_s, 3)
    for sums, counts in (
        (report.by_kind, outcome.faults),
        (report.by_situation, outcome.seen),
        (report.by_outcome, outcome.asks),
    ):
        for name, n in counts.items():
            sums[name] = sums.get(name, 0) + n
    if outcome.found is not None:
        report.violations[outcome.seed] = outcome.found.what
