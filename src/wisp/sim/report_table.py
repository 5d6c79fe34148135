"""Reports for people: runs of one scenario side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from rich.table import Table

from wisp.sim.report import ClassReport, Report


def number(value: float | None, how: str = ".1f") -> str:
    """For people; a dash for None."""
    return "-" if value is None else format(value, how)


def table(reports: Sequence[Report]) -> Table:
    """Runs of one scenario side by side, for people. Rows that none of them has are left out."""
    first = reports[0]
    rates = ", ".join(f"{rate:g}" for rate in first.rates)
    title = f"{first.scenario}: {first.devices} devices, {rates} tokens/s, seed {first.seed}, {first.duration:g} s"
    out = Table(title=title, min_width=len(title))  # a title of one line
    out.add_column("")
    for r in reports:
        batching = "" if r.batching == r.system else f", {r.batching}"
        out.add_column(f"{r.system}{batching}{' (live)' * (r.where == 'live')}", justify="right")
    several = len(first.classes) > 1
    for label, text in (
        *_SERVICE,
        *(_class_row(i, c.name) for i, c in enumerate(first.classes) if several),
        *_COST,
    ):
        cells = [text(r) for r in reports]
        if any(cells):
            out.add_row(label, *cells)
    return out


Row = tuple[str, Callable[[Report], str]]


def _class_row(i: int, name: str) -> Row:
    return f"  {name}", lambda r: f"{_attained(r.classes[i])}, {r.classes[i].goodput:,.0f} tokens/s"


def _attained(of: Report | ClassReport) -> str:
    return "nothing arrived" if of.attainment is None else f"{of.attainment:.1%} of {of.arrived}"


def _within(r: Report) -> str:
    rate = r.violation_rate
    return "" if rate is None else " / ".join("yes" if rate <= most else "no" for most in (0.1, 0.01))


def _three(name: str) -> Callable[[Report], str]:
    return lambda r: " / ".join(number(v) for v in msgspec.structs.astuple(getattr(r, name)))


def _of(part: str, text: Callable[[Any], str]) -> Callable[[Report], str]:
    """A row of a part that not every report has."""
    return lambda r: text(getattr(r, part)) if getattr(r, part) else ""


_SERVICE: tuple[Row, ...] = (
    ("within 10 % / 1 % violations", _within),
    ("goodput / output, tokens/s", lambda r: f"{r.goodput:,.0f} / {r.output_throughput:,.0f}"),
    ("requests that met their SLO", _attained),
)
_COST: tuple[Row, ...] = (
    ("refused for good / refusals", lambda r: f"{r.refused} / {r.refusals}"),
    ("TTFT mean / p50 / p99, ms", _three("ttft_ms")),
    ("TPOT mean / p50 / p99, ms", _three("tpot_ms")),
    ("between messages mean / p50 / p99, ms", _three("itl_ms")),
    ("longest gap mean / p50 / p99, ms", _three("longest_gap_ms")),
    ("longest stall mean / p50 / p99, ms", _three("longest_stall_ms")),
    ("tokens later than the TPOT target", lambda r: number(r.late_tokens, ".1%")),
    ("p99 TPOT of requests that missed, ms", lambda r: number(r.violators_tpot_p99_ms)),
    ("interference mean / p50 / p99, ms", _three("interference_ms")),
    ("drafting, share of time / of it wasted", lambda r: f"{r.drafting_busy:.0%} / {r.drafting_wasted:.0%}"),
    ("draft steps per token", lambda r: number(r.draft_steps_per_token, ".2f")),
    ("engine busy", _of("engine", lambda e: f"{e.utilisation:.0%}")),
    ("step, ms", _of("engine", lambda e: number(e.step_ms))),
    ("sequences per step", _of("engine", lambda e: number(e.slices_per_step))),
    ("tokens per step", _of("engine", lambda e: number(e.rows_per_step))),
    ("draft tokens accepted", _of("engine", lambda e: number(e.acceptance, ".0%"))),
    ("steps in all; prompts, share of tokens", _of("verifier", lambda v: f"{v.steps:,}; {v.prefill_share:.0%}")),
    ("price of a draft token, mean", _of("verifier", lambda v: number(v.price.mean, ".3f"))),
    ("KV evictions", _of("verifier", lambda v: str(v.kv_evictions))),
    ("CPU of fleet / server, cores", _of("machine", lambda m: f"{m.fleet_cpu:.2f} / {number(m.server_cpu, '.2f')}")),
    ("lag of fleet p50 / p99, ms", _of("machine", lambda m: f"{m.loop_lag_ms_p50:.1f} / {m.loop_lag_ms_p99:.1f}")),
    ("stood still, share of time", _of("machine", lambda m: f"{m.stalled:.1%}")),
    ("lag of server p50 / p99, ms", _of("machine", lambda m: f"{m.server_lag_ms_p50:.1f} / {m.server_lag_ms_p99:.1f}")),
)  # fmt: skip
