"""One cell: tune the baselines, run every system under the same seeds, judge."""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path

import msgspec

from wisp.core.errors import ConfigError
from wisp.sim.compare.figures import SystemFigures
from wisp.sim.compare.suite import Cell
from wisp.sim.compare.tuning import grid, tuned
from wisp.sim.compare.verdict import Verdict, verdict
from wisp.sim.runs import Job, key, remembered
from wisp.sim.scenario import SHIPPED, Scenario
from wisp.sim.systems import System, system

CENTRAL = "central"
# That decide what a cell says, beside what runs depend on.
SOURCES = ("capacity", "fluid", *(f"compare/{name}" for name in ("cell", "figures", "tuning", "verdict")))
LEAST_S = 10.0  # of warm-up, and of a window
SLACK = 1.25  # more requests than are wanted: a server that is behind is asked for a fifth fewer


class Extent(msgspec.Struct, frozen=True):
    """How much is run for a cell. Requests are per seed; seeds for tuning are others than those reported.

    coarse: tune central serving alone, on a coarser grid
    """

    seeds: tuple[int, ...]
    requests: int
    tuning_seeds: tuple[int, ...]
    tuning_requests: int
    coarse: bool = False


FULL = Extent((101, 102, 103, 104, 105), 130, (91, 92), 40)
QUICK = Extent((81,), 50, (91,), 30, True)


class Task(msgspec.Struct, frozen=True):
    """A cell to do. systems: specs, as for `wisp sim run --system`."""

    cell: Cell
    systems: tuple[str, ...]
    extent: Extent


class CellResult(msgspec.Struct, frozen=True):
    """A cell that is done. digest: of all that it depends on; requests: the fewest that a system was asked."""

    name: str
    digest: str
    sampled: bool
    scenario: Scenario
    requests: int
    cpu_s: float
    systems: dict[str, SystemFigures]
    verdicts: dict[str, Verdict]

    @property
    def passes(self) -> bool:
        """Does WISP hold its promise here, in each form that was asked for?"""
        return all(v.passes for name, v in self.verdicts.items() if is_wisp(name))

    @property
    def says_nothing(self) -> bool:
        """Was nobody served in time, neither by WISP nor by central serving?"""
        return all(v.says_nothing for name, v in self.verdicts.items() if is_wisp(name))

    @property
    def compared(self) -> int:
        """The fewest requests that central serving or WISP was asked. One that is far behind is asked for fewer."""
        return min(found.requests for name, found in self.systems.items() if name == CENTRAL or is_wisp(name))


def is_wisp(spec: str) -> bool:
    """Is it the product's own system, whatever is changed?"""
    return spec.partition(",")[0] == "wisp"


def sized(scenario: Scenario, requests: int) -> Scenario:
    """With times in which about so many requests arrive, in bursts more. One whose load changes stays as it is."""
    if scenario.population or scenario.arrivals:
        return scenario
    answer_s = scenario.answer_s
    per_s = scenario.arrivals_per_s or scenario.devices_n / (answer_s + scenario.think_s)
    wait_s = max(c.ttft_s for c in scenario.slo)
    return scenario.brief(
        max(LEAST_S, 1.25 * answer_s),
        max(LEAST_S, SLACK * requests * scenario.arrivals_cv / per_s),
        1.5 * answer_s + wait_s,
    )


def measure(task: Task) -> CellResult:
    """Do it. Raises ConfigError where no request arrives, and for a scenario that cannot be run."""
    try:
        return _measured(task)
    except ConfigError as error:
        raise ConfigError(f"the cell {task.cell.name!r}: {error}") from None


def _measured(task: Task) -> CellResult:
    began = time.process_time()
    extent = task.extent
    brief, scenario = (sized(task.cell.scenario, n) for n in (extent.tuning_requests, extent.requests))
    central = tuned(grid(CENTRAL, brief, coarse=extent.coarse), brief, extent.tuning_seeds)
    systems = {}
    for spec in task.systems:
        choices = [central] if spec == CENTRAL else grid(spec, brief, central, coarse=extent.coarse)
        of = tuned(choices, brief, extent.tuning_seeds)
        systems[spec] = figures_of(scenario, of, extent.seeds)
    if systems[CENTRAL].mean("attainment") is None:
        raise ConfigError(f"no request arrived in its window of {scenario.window_s:g} s")
    tpot_ms = min(c.slo.tpot_ms for c in scenario.slo)
    verdicts = {
        name: verdict(found, systems[CENTRAL], tpot_ms) for name, found in systems.items() if name != CENTRAL
    }
    requests = min(found.requests for found in systems.values())
    cpu_s = round(time.process_time() - began, 2)
    return CellResult(
        task.cell.name, digest(task), task.cell.sampled, _named(scenario), requests, cpu_s, systems, verdicts
    )


def _named(scenario: Scenario) -> Scenario:
    """With a file that ships by its name, as a scenario that ships has it."""
    arrivals = Path(scenario.arrivals)
    return (
        msgspec.structs.replace(scenario, arrivals=arrivals.name) if arrivals.parent == SHIPPED else scenario
    )


def figures_of(scenario: Scenario, of: System, seeds: tuple[int, ...]) -> SystemFigures:
    """Of a system, under these seeds."""
    return SystemFigures.of(of.name, [remembered(Job(scenario, of, seed)) for seed in seeds])


def digest(task: Task) -> str:
    """Of everything a cell's result depends on: scenario and its files, systems, extent, source."""
    scenario = sized(task.cell.scenario, task.extent.requests)
    keys = [key(Job(scenario, system(spec), 0)) for spec in task.systems]
    own = msgspec.json.encode([task.extent, task.systems, task.cell.sampled])
    return hashlib.sha256(b"\0".join([own, _sources(), *map(str.encode, keys)])).hexdigest()


@functools.cache
def _sources() -> bytes:
    paths = [Path(__file__).parents[1] / f"{name}.py" for name in SOURCES]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).digest()
