"""What the pages of experiments have in common: a heading with command and date, tables, and searches in bulk."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import msgspec

from wisp import __version__
from wisp.sim.capacity import GRAIN, Capacity, capacity
from wisp.sim.runs import Runs
from wisp.sim.scenario import Scenario

Data = dict[str, Any]
MODELLED = (
    "**Time is modelled**: the live server's and devices' decisions on recorded drafts, steps as long as a hardware "
    "profile says, which is derived from data sheets and not measured. These are comparisons of systems under one "
    "model of one machine."
)
BOUND = (
    "`bound` is the fluid bound with every device being served (central: without drafts, and without preemption), and "
    "the percentage is what share of it was reached. Devices that wait for a first token within the TTFT target need "
    "nothing meanwhile, so a share above 100 % is no contradiction; `w/` is the share of the bound that counts such "
    "waiting."
)


class Cell(msgspec.Struct, frozen=True):
    """One capacity to search."""

    scenario: Scenario
    policy: str
    seeds: tuple[int, ...] = (1,)
    strict: bool = False
    grain: float = GRAIN
    tolerance: float = 0.1


def search(cell: Cell) -> Capacity:
    """Find it."""
    return capacity(
        cell.scenario,
        cell.policy,
        tolerance=cell.tolerance,
        seeds=cell.seeds,
        strict=cell.strict,
        grain=cell.grain,
    )


def search_all(cells: Sequence[Cell], runs: Runs) -> list[Capacity]:
    """Find all of them, each only once, the longest (by load) first."""
    known = sorted(dict.fromkeys(cells), key=_load, reverse=True)
    found = dict(zip(known, runs.map(search, known), strict=True))
    return [found[cell] for cell in cells]


def _load(cell: Cell) -> float:
    s = cell.scenario
    tuned = 3.0 if cell.policy in ("sled", "central-speculative") else 1.0
    return (s.warmup_s + s.window_s) * len(cell.seeds) * tuned / s.profile.parameters


def write(name: str, module: ModuleType, *, quick: bool, runs: Runs, out: Path) -> float:
    """Run an experiment, write its page, data and plot. Seconds it took."""
    began = perf_counter()
    data: Data = module.run(quick, runs)
    seconds = perf_counter() - began
    out.mkdir(parents=True, exist_ok=True)
    module.draw(data, out / f"{name}.png")
    command = f"python -m benchmarks experiments {name}{' --quick' if quick else ''}"
    today = datetime.date.today().isoformat()
    head = {"command": command, "date": today, "wisp": __version__, "seconds": round(seconds, 1)}
    (out / f"{name}.json").write_text(json.dumps(head | data, indent=1, default=msgspec.to_builtins) + "\n")
    lines: list[str] = module.lines(data)
    title, *rest = lines
    short = ["", "**A quick run: few cells, short windows. Its figures mean little.**"] if quick else []
    about = getattr(module, "ABOUT", MODELLED)
    page = [f"# {title}", "", f"`{command}`, {today}, wisp {__version__}. {about}", *short, ""]
    page += [f"![{title}]({name}.png)", "", *rest]
    (out / f"{name}.md").write_text("\n".join(page) + "\n")
    return seconds


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table and an empty line."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def interval(c: Capacity) -> str:
    """Capacity with its confidence interval."""
    return f"**{c.capacity}** ({c.low}–{c.high})"


def of_bound(c: Capacity) -> str:
    """The bound and our share of it."""
    return f"{c.bound:.0f}: {c.fraction:.0%} (w/ {c.fraction_waiting:.0%})"


def ratio(a: float, b: float) -> str:
    """a / b, for people."""
    return f"{a / b:.2f}" if b else ("-" if not a else "∞")
