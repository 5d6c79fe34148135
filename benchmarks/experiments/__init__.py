"""The experiments on simulated time: `make bench` writes a page, its data and a plot for each.

Each module has three functions:

    run(quick, runs) -> data            what to simulate; `runs` spreads it over processes and remembers it
    figures(data)    -> figures         tables, and what else the page's template needs (benchmarks/templates)
    draw(data, path)                    a picture of what came out

`reality` alone runs in real time, against live servers: how well the simulator foretells them.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from rich.console import Console

from benchmarks.experiments import ablations, bursts, overlap, paper, reality, regimes, table
from benchmarks.experiments.page import write
from wisp.core.errors import ConfigError
from wisp.sim.runs import Runs

EXPERIMENTS: dict[str, ModuleType] = {
    "table": table,
    "paper": paper,
    "regimes": regimes,
    "bursts": bursts,
    "ablations": ablations,
    "overlap": overlap,
    "reality": reality,
}


def run_experiments(names: list[str], *, quick: bool, out: Path, jobs: int, as_json: bool = False) -> None:
    """Run some, or all, and write their pages into the folder `out`; as_json: print their data. Raises ConfigError."""
    for name in names:
        if name not in EXPERIMENTS:
            raise ConfigError(f"unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}")
    console = Console(stderr=True)
    with Runs(jobs) as runs:
        for name in names or EXPERIMENTS:
            with console.status(name):
                seconds = write(name, EXPERIMENTS[name], quick=quick, runs=runs, out=out)
            console.print(f"{out / name}.md: {seconds:.0f} s", highlight=False)
    if as_json:
        data = {name: json.loads((out / f"{name}.json").read_bytes()) for name in names or EXPERIMENTS}
        print(json.dumps(data))


__all__ = ["EXPERIMENTS", "run_experiments"]
