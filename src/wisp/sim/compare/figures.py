"""Figures of a system in a cell: one value for each seed, and estimates from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import msgspec

from wisp.sim.capacity import T95
from wisp.sim.report import Report

# What is kept of a run. None: there was nothing to measure.
METRICS: dict[str, Callable[[Report], float | None]] = {
    "attainment": lambda r: r.attainment,
    "goodput": lambda r: r.goodput,
    "ttft_p50_ms": lambda r: r.ttft_ms.median,
    "ttft_p99_ms": lambda r: r.ttft_ms.p99,
    "longest_gap_p50_ms": lambda r: r.longest_gap_ms.median,
    "longest_gap_p99_ms": lambda r: r.longest_gap_ms.p99,
    "longest_stall_p50_ms": lambda r: r.longest_stall_ms.median,
    "longest_stall_p99_ms": lambda r: r.longest_stall_ms.p99,
    "tpot_p50_ms": lambda r: r.tpot_ms.median,
    "late_tokens": lambda r: r.late_tokens,
    "draft_steps_per_token": lambda r: r.draft_steps_per_token,
    "requests": lambda r: r.arrived,
    "refused": lambda r: r.refused,
    "refusals": lambda r: r.refusals,
}


class Estimate(msgspec.Struct, frozen=True):
    """A mean over seeds and its 95 % interval by Student's t (None: one seed, or none)."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one value."""
        mean, n = fmean(values), len(values)
        if n < 2:
            return cls(_rounded(mean))
        half = T95[min(n - 1, len(T95)) - 1] * stdev(values) / math.sqrt(n)
        return cls(*map(_rounded, (mean, mean - half, mean + half)))


class SystemFigures(msgspec.Struct, frozen=True):
    """One system in a cell. variant: as tuned; seeds: each metric's value under each seed; estimates: of these."""

    variant: str
    seeds: dict[str, list[float | None]]
    estimates: dict[str, Estimate | None]

    @classmethod
    def of(cls, variant: str, reports: Sequence[Report]) -> SystemFigures:
        """Of its runs, one for each seed."""
        seeds = {name: [_value(value_of(r)) for r in reports] for name, value_of in METRICS.items()}
        return cls(variant, seeds, {name: _estimate(values) for name, values in seeds.items()})

    def mean(self, metric: str) -> float | None:
        """Over seeds."""
        found = self.estimates[metric]
        return None if found is None else found.mean

    @property
    def requests(self) -> int:
        """Counted, under all seeds."""
        return int(sum(n or 0 for n in self.seeds["requests"]))


def _estimate(values: Sequence[float | None]) -> Estimate | None:
    known = [v for v in values if v is not None]
    return Estimate.of(known) if known else None


def _value(value: float | None) -> float | None:
    return None if value is None else _rounded(value)


def _rounded(value: float) -> float:
    return round(value, 4)
