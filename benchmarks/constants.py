"""`python -m benchmarks constants`: what each constant of the `wisp` policy and of preemption is for.

Each is set to a value that takes its effect away, one at a time, and cells of the suite are run again, under seeds
that no other command has. Those of preemption matter where KV is short, and only such cells are run for them.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import ModuleType

import msgspec

from benchmarks.pages import table
from wisp.core.errors import ConfigError
from wisp.core.verify import preemption
from wisp.core.verify.batching import wisp
from wisp.outputs import writable
from wisp.sim.compare.cell import sized
from wisp.sim.compare.sampler import at_load
from wisp.sim.compare.suite import load_suite
from wisp.sim.runs import Job, run
from wisp.sim.systems import system

CELLS = (
    "a100-16-1.4",
    "slow-far-0.85",
    "rates-4-10-20-1.5",
    "few-long-slow-1",
    "bursts-cv3-0.8",
    "sampled-29-14",
)
# For preemption: a cell of the suite with so many times what central serving carries, more than fit into the KV.
# Nobody is refused there, so that it is preemption that decides.
CROWDED = {"a100-4-1.1": ("a100-4-0.85", 1.1)}
SEEDS = (31, 32, 33, 34, 35)
REQUESTS = 50
COMMAND = "python -m benchmarks constants"
# Constant, where it is, and a value at which it does nothing.
WITHOUT: tuple[tuple[str, ModuleType, float], ...] = (
    ("URGENT", wisp, 1000.0),  # no lateness makes a token worth more
    ("MOST", wisp, 20.0),  # urgency without a bound
    ("FLOOR", wisp, 1e-3),  # sessions far ahead weigh nothing
    ("FIRST", wisp, 1.0),  # answers that have not begun are like others
    ("PACE_S", wisp, 1.0),  # sessions without an SLO are ten times as patient
    ("SPARE_S", preemption, 0.0),  # a session is far ahead as soon as its KV is worth it
    ("WORTH", preemption, 0.0),  # whatever it takes to compute its KV again
    ("ENDING", preemption, 0),  # however little it still has to say
    ("URGENT_S", preemption, 0.0),  # a prompt takes a slot only once it is due to be read
    ("EARLY_S", preemption, 0.0),  # and KV, likewise
)


class Row(msgspec.Struct, frozen=True):
    """One cell with one constant changed ("": with none). Means over seeds; stall_ms: p99 of an answer's longest."""

    cell: str
    changed: str
    attainment: float
    goodput: float
    ttft_ms: float
    stall_ms: float


class Result(msgspec.Struct, frozen=True):
    """The file of figures."""

    command: str
    date: str
    rows: list[Row]


@contextmanager
def changed(module: ModuleType, name: str, value: float) -> Iterator[None]:
    """With another value of a constant."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def measured(cell: str, changed_: str, seeds: Sequence[int], requests: int) -> Row:
    """A cell as things are set now. Raises ConfigError for one that the suite does not have."""
    known, of = {c.name: c.scenario for c in load_suite()}, "wisp"
    if cell in CROWDED:
        name, load = CROWDED[cell]
        known[cell], of = at_load(known[name], load) or known[name], "wisp,admission=no"
    if cell not in known:
        raise ConfigError(f"the suite has no cell {cell!r}")
    scenario = sized(known[cell], requests)
    reports = [run(Job(scenario, system(of), seed)) for seed in seeds]

    def mean(values: Sequence[float | None]) -> float:
        return round(fmean(v for v in values if v is not None), 4)  # a run without a first token has no TTFT

    return Row(
        cell,
        changed_,
        mean([r.attainment for r in reports]),
        mean([r.goodput for r in reports]),
        mean([r.ttft_ms.median for r in reports]),
        mean([r.longest_stall_ms.p99 for r in reports]),
    )


def run_bench_constants(
    out: Path | None,
    *,
    as_json: bool,
    cells: Sequence[str] = CELLS,
    crowded: Sequence[str] = tuple(CROWDED),
    requests: int = REQUESTS,
) -> None:
    """Run all, print a table, and write the figures into `out`. crowded: cells for preemption. Raises ConfigError."""
    if out is not None:
        writable(out)
    rows = [measured(cell, "", SEEDS, requests) for cell in (*cells, *crowded)]
    for name, module, value in WITHOUT:
        with changed(module, name, value):
            of = crowded if module is preemption else cells
            rows += [measured(cell, f"{name} {value:g}", SEEDS, requests) for cell in of]
    today = datetime.date.today().isoformat()
    encoded = msgspec.json.format(msgspec.json.encode(Result(COMMAND, today, rows)), indent=1) + b"\n"
    if out is not None:
        out.write_bytes(encoded)
    if as_json:
        sys.stdout.buffer.write(encoded)
    else:
        print(rendered(rows))


def rendered(rows: Sequence[Row]) -> str:
    """A Markdown table: for each change and cell the share of SLOs met in percent, the median TTFT in seconds, and the
    goodput in tokens per second."""
    cells = list(dict.fromkeys(r.cell for r in rows))
    shown = {
        (r.changed, r.cell): f"{100 * r.attainment:.0f}, {r.ttft_ms / 1e3:.2f}, {r.goodput:.0f}" for r in rows
    }
    changes = dict.fromkeys(r.changed for r in rows)
    lines = [[change or "none", *(shown.get((change, cell), "-") for cell in cells)] for change in changes]
    return table(["changed", *cells], lines)
