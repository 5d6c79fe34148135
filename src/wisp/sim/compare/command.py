"""`wisp sim compare` on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from wisp.core.errors import ConfigError
from wisp.outputs import writable
from wisp.progress import progress_bar
from wisp.sim.compare.cell import CENTRAL, FULL, QUICK, CellResult, Extent, Task, digest, is_wisp, measure
from wisp.sim.compare.results import Comparison, comparison, read, write
from wisp.sim.compare.suite import Cell, cells_of, load_suite, write_scenarios
from wisp.sim.compare.tables import WIDTH, summary, table
from wisp.sim.runs import Runs
from wisp.sim.systems import system

SYSTEMS = "central,central-wisp,central-speculative,paper,sled,wisp"
QUICK_SYSTEMS = "central,central-wisp,wisp"  # those that a change of WISP's scheduling moves


def run_compare(
    scenarios: Sequence[str],
    *,
    suite: Path | None,
    systems: str,
    quick: bool,
    out: Path | None,
    scenario_files: Path | None,
    jobs: int,
    check: bool,
    as_json: bool,
) -> int:
    """Compare, and print what came out. systems: "" for the usual ones. Returns the exit code. Raises ConfigError."""
    if scenarios and suite is not None:
        raise ConfigError("give scenarios or --suite, not both")
    cells = cells_of(scenarios) if scenarios else load_suite(suite)
    if scenario_files is not None:
        write_scenarios(cells, scenario_files)
        Console(stderr=True, highlight=False).print(f"{len(cells)} scenarios written into {scenario_files}")
        return 0
    specs = specs_of(systems or (QUICK_SYSTEMS if quick else SYSTEMS))
    if check and not any(map(is_wisp, specs)):
        raise ConfigError("--check is about wisp: name it in --systems")
    if out is not None:
        writable(out)
    found = compare(cells, specs, quick=quick, out=out, jobs=jobs)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    else:
        console = Console(highlight=False, markup=False)
        console.width = max(console.width, WIDTH)
        console.print(table(found.cells))
        for line in summary(found):
            console.print(line, soft_wrap=True)
    return int(check and bool(found.failing))


def specs_of(systems: str) -> tuple[str, ...]:
    """Systems by comma, each with its changes: "central,wisp,ahead=no" are two. Central serving is always there."""
    specs: list[str] = []
    for part in filter(None, map(str.strip, systems.split(","))):
        if "=" in part and specs:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    specs = [system(spec).name for spec in specs]
    for spec in specs:
        if spec.startswith(f"{CENTRAL},"):
            raise ConfigError(f"{spec}: {CENTRAL} is tuned in each cell; leave out the changes")
    return tuple(dict.fromkeys((CENTRAL, *specs)))


def compare(
    cells: Sequence[Cell], systems: tuple[str, ...], *, quick: bool, out: Path | None = None, jobs: int = 1
) -> Comparison:
    """Every cell: as `out` has it, if all that it depends on is the same, or done now and added to `out`."""
    extent = QUICK if quick else FULL
    tasks = {cell.name: Task(cell, systems, extent) for cell in cells}
    before = read(out) if out is not None else None
    if before is not None and before.quick != quick:
        kind = "quick" if before.quick else "full"
        raise ConfigError(f"{out} has the figures of a {kind} run: give another --out, or remove it")
    kept = before.cells if before is not None else []
    others = {c.name for c in kept} - set(tasks) or {name for c in kept for name in c.systems} - set(systems)
    if others:
        raise ConfigError(
            f"{out} has figures that are not compared now ({', '.join(sorted(others))}): "
            "give another --out, or remove it"
        )
    done = {c.name: c for c in kept if c.digest == digest(tasks[c.name])}
    todo = sorted((t for name, t in tasks.items() if name not in done), key=_load, reverse=True)

    def so_far() -> Comparison:
        return _ordered(done, cells, quick, extent)

    with Runs(jobs) as runs, progress_bar() as tell:
        tell("comparing", len(done), len(cells))
        for result in runs.finished(measure, todo):
            done[result.name] = result
            if out is not None:
                write(out, so_far())
            tell(f"compared {result.name}", len(done), len(cells))
    found = so_far()
    if out is not None:
        write(out, found)
    return found


def _ordered(done: dict[str, CellResult], cells: Sequence[Cell], quick: bool, extent: Extent) -> Comparison:
    known = [done[cell.name] for cell in cells if cell.name in done]
    return comparison(known, quick=quick, extent=extent, of=len(cells))


def _load(task: Task) -> float:
    """The longest first, so that no process ends with one alone."""
    s = task.cell.scenario
    return s.arrivals_per_s * s.answer_s if s.arrivals_per_s else float(s.devices_n)
