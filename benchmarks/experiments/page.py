"""What experiments have in common: their data and page with command and date, and searches in bulk."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from types import ModuleType

import msgspec

from benchmarks.pages import Data, render, write_data
from wisp import __version__
from wisp.sim.capacity import GRAIN, Capacity, capacity
from wisp.sim.runs import Runs
from wisp.sim.scenario import Scenario, load_scenario

OVERLAP = 1.3  # of memory and arithmetic, with which the pages' figures were made


def scenario_of(target: str, rate: float) -> Scenario:
    """Of one of the targets that ship, at this rate, on its hardware as the pages have it."""
    return load_scenario(f"{target}@{OVERLAP:g}").at_rate(rate)


class Cell(msgspec.Struct, frozen=True):
    """One capacity to search."""

    scenario: Scenario
    policy: str
    seeds: tuple[int, ...] = (1,)
    strict: bool = False
    grain: float = GRAIN
    tolerance: float = 0.1


def search(cell: Cell) -> Capacity:
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
    command = f"python -m benchmarks experiments {name}{' --quick' if quick else ''}"
    today = datetime.date.today().isoformat()
    head = {"command": command, "date": today, "wisp": __version__, "seconds": round(seconds, 1)}
    data = write_data(out / f"{name}.json", head | data)
    module.draw(data, out / f"{name}.png")
    (out / f"{name}.md").write_text(render(name, data, module.figures(data)))
    return seconds


def interval(c: Capacity) -> str:
    """Capacity with its confidence interval."""
    return f"**{c.capacity}** ({c.low}–{c.high})"


def of_bound(c: Capacity) -> str:
    """The bound and our share of it."""
    return f"{c.bound:.0f}: {c.fraction:.0%} (w/ {c.fraction_waiting:.0%})"


def ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else ("-" if not a else "∞")
