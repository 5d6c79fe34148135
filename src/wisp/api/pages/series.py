"""Figures of a verifier over time: one row for each second, the last few minutes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

KEPT = 300  # rows

# Per row, in the order of a row's values. Shares are of 1, None where there was nothing to measure.
COLUMNS = (
    "t",  # seconds: the row's end
    "tokens_per_s",  # committed
    "goodput",  # of these, by sessions within their SLO, or without one
    "steps_per_s",
    "step_ms",  # mean time of a step, from dispatch to commit
    "estimate_ms",  # and what the cost model said
    "verify_rows",  # tokens fed to the engine per second, by kind of slice
    "decode_rows",
    "prefill_rows",
    "busy",  # share of time with a step in the engine
    "slack_p10_ms",  # at dispatch, of sessions with an SLO
    "slack_p50_ms",
    "interference_p50_ms",  # time of a slice's step, less the estimate for the slice alone
    "interference_p95_ms",
    "price",  # of a draft token, in committed tokens
    "kv",  # share of KV that live sessions hold
    "running",  # sessions with a KV slot
    "waiting",  # sessions that could run but have no slot
    "admitted",  # sessions opened per second
    "refused",
    "met",  # sessions that ended per second within their SLO, and not
    "missed",
)


class Second:
    """What is counted between two rows."""

    __slots__ = (
        "admitted", "busy_s", "estimate_ms", "good", "interference_ms", "met", "missed", "refused", "rows", "slack_ms",
        "steps", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.tokens = self.good = self.steps = self.admitted = self.refused = self.met = self.missed = 0
        self.busy_s = self.estimate_ms = 0.0
        self.rows = [0, 0, 0]  # verify, decode, prefill
        self.slack_ms: list[float] = []
        self.interference_ms: list[float] = []


class Series:
    """Rows, the oldest first. width_s: the time between two of them."""

    def __init__(self, width_s: float = 1.0, kept: int = KEPT) -> None:
        self.width_s = width_s
        self._rows: deque[tuple[float | None, ...]] = deque(maxlen=kept)

    def add(self, t: float, s: Second, gauges: Mapping[str, float]) -> None:
        """The row that ends at `t`: what was counted, and how things stand."""
        per = 1.0 / self.width_s
        row: dict[str, float | None] = {
            "t": t,
            "tokens_per_s": s.tokens * per,
            "goodput": s.good * per,
            "steps_per_s": s.steps * per,
            "step_ms": s.busy_s * 1e3 / s.steps if s.steps else None,
            "estimate_ms": s.estimate_ms / s.steps if s.steps else None,
            "verify_rows": s.rows[0] * per,
            "decode_rows": s.rows[1] * per,
            "prefill_rows": s.rows[2] * per,
            "busy": min(1.0, s.busy_s * per),
            "admitted": s.admitted * per,
            "refused": s.refused * per,
            "met": s.met * per,
            "missed": s.missed * per,
            **quantiles("slack", s.slack_ms, (10, 50)),
            **quantiles("interference", s.interference_ms, (50, 95)),
            **gauges,
        }
        self._rows.append(tuple(_short(row[name]) for name in COLUMNS))

    def since(self, t: float) -> dict[str, list[float | None]]:
        """The rows after `t`, by column."""
        rows = [row for row in self._rows if (row[0] or 0.0) > t]
        return {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}


def quantiles(name: str, values: Sequence[float], wanted: Sequence[int]) -> dict[str, float | None]:
    """Of milliseconds, in per cent, by nearest rank: {"slack_p10_ms": ...}."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        f"{name}_p{p}_ms": ordered[min(last, len(ordered) * p // 100)] if ordered else None for p in wanted
    }


def _short(value: float | None) -> float | None:
    """Three digits behind the point are enough for a picture."""
    return None if value is None else round(value, 3)


def summed(parts: Sequence[Mapping[str, Sequence[Any]]], width_s: float) -> dict[str, list[float | None]]:
    """Rows of several verifiers as those of one: counts added, times weighted by their steps, shares averaged.

    Quantiles are the worst of all: those of the whole cannot be had from those of its parts.
    """
    by_time: dict[int, list[dict[str, Any]]] = {}
    for part in parts:
        for i, t in enumerate(part.get("t", ())):
            by_time.setdefault(round(t / width_s), []).append({name: part[name][i] for name in COLUMNS})
    rows = [_one(found) for _, found in sorted(by_time.items())]
    return {name: [row[name] for row in rows] for name in COLUMNS}


_MEAN = frozenset({"t", "busy", "kv", "price"})
_WEIGHTED = frozenset({"step_ms", "estimate_ms"})


def _one(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    made: dict[str, float | None] = {}
    steps = sum(r["steps_per_s"] or 0.0 for r in rows)
    for name in COLUMNS:
        known = [r for r in rows if r[name] is not None]
        values = [r[name] for r in known]
        if not values:
            made[name] = None
        elif name in _WEIGHTED:
            made[name] = _short(sum(r[name] * r["steps_per_s"] for r in known) / steps if steps else None)
        elif name in _MEAN:
            made[name] = _short(sum(values) / len(values))
        elif name.startswith("slack"):
            made[name] = min(values)
        elif name.startswith("interference"):
            made[name] = max(values)
        else:
            made[name] = _short(sum(values))
    return made
