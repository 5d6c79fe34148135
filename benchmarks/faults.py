"""The page of `wisp check-faults`: the report that `--resume docs/results/faults.json` keeps, as tables."""

from __future__ import annotations

import msgspec

from benchmarks.pages import Data, table
from wisp.check.faults.check import Report
from wisp.check.faults.plan import FAULTS


def figures(data: Data) -> Data:
    """The tables of the page, and its sums."""
    report = msgspec.convert(data, Report, strict=False)  # seeds are numbers, and keys of JSON are not
    return {
        "last_seed": report.first_seed + report.seeds - 1,
        "cpu_hours": report.cpu_s / 3600,
        "virtual_hours": report.virtual_s / 3600,
        "a_second": report.faults / max(report.cpu_s, 1.0),
        "kinds": table(
            ("fault", "effect", "times"),
            ((name, fault.about, f"{report.by_kind.get(name, 0):,}") for name, fault in FAULTS.items()),
        ),
        "situations": _counts("at verifiers", report.by_situation),
        "outcomes": _counts("requests", report.by_outcome),
        "found": "\n".join(f"- {seed}: {what.splitlines()[0]}" for seed, what in report.violations.items()),
    }


def _counts(head: str, counts: dict[str, int]) -> str:
    return table((head, "times"), ((name, f"{n:,}") for name, n in sorted(counts.items())))
