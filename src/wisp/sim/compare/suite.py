"""The cells of a comparison: scenarios by name or file, changes of them, and sampled ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from wisp.core.errors import ConfigError
from wisp.outputs import toml_lines, writable_folder
from wisp.sim.compare.sampler import at_load, sample
from wisp.sim.scenario import Scenario, changed, load_scenario

SHIPPED_SUITE = Path(__file__).with_name("suite.toml")


class Cell(msgspec.Struct, frozen=True):
    """One scenario of a comparison. sampled: drawn, not chosen."""

    name: str
    scenario: Scenario
    sampled: bool = False


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A scenario with changes. loads: a cell for each share of what central serving carries (`sampler.carried`)."""

    name: str
    scenario: str
    change: dict[str, Any] = {}
    loads: tuple[float, ...] = ()


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scenarios 0 to cells - 1 of a seed."""

    seed: int
    cells: int


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of cells. scenarios: by name, or files relative to the suite's folder or the current one."""

    scenarios: tuple[str, ...] = ()
    cells: tuple[Chosen, ...] = ()
    sample: Sample | None = None


def load_suite(path: Path | None = None) -> list[Cell]:
    """The cells of a suite; None: of the one that ships. Raises ConfigError."""
    path = path or SHIPPED_SUITE
    try:
        suite = msgspec.toml.decode(path.read_bytes(), type=Suite)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the suite {path}: {error}") from None
    cells = cells_of(suite.scenarios, path.parent)
    for chosen in suite.cells:
        cells += _chosen(chosen, path.parent)
    if suite.sample is not None:
        seed = suite.sample.seed
        cells += [Cell(f"sampled-{seed}-{i}", sample(seed, i), True) for i in range(suite.sample.cells)]
    if not cells:
        raise ConfigError(f"the suite {path} has no cells: give it scenarios, [[cells]] or a [sample]")
    return _distinct(cells, str(path))


def cells_of(scenarios: Iterable[str], folder: Path = Path()) -> list[Cell]:
    """Each of these scenarios as it is. Raises ConfigError."""
    return _distinct(
        [Cell(Path(name).name.removesuffix(".toml"), _loaded(name, folder)) for name in scenarios],
        "the comparison",
    )


def _distinct(cells: list[Cell], where: str) -> list[Cell]:
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where} has two cells with the name {', '.join(twice)}: rename one")
    return cells


def _loaded(name: str, folder: Path) -> Scenario:
    beside = folder / name
    return load_scenario(str(beside) if os.path.isfile(beside) else name)


def _chosen(chosen: Chosen, folder: Path) -> list[Cell]:
    where = f"the cell {chosen.name!r}"
    scenario = changed(_loaded(chosen.scenario, folder), chosen.change, where, folder)
    cells = []
    for share in chosen.loads:
        if not 0 < share <= 10 or scenario.population or scenario.arrivals:
            raise ConfigError(
                f"{where}: loads are shares above 0, of scenarios with devices_n or arrivals_per_s"
            )
        loaded = at_load(scenario, share)
        if loaded is None:
            raise ConfigError(
                f"{where}: central serving carries nobody there; leave out loads, or lower the rate"
            )
        cells.append(Cell(f"{chosen.name}-{share:g}", loaded))
    return cells or [Cell(chosen.name, scenario)]


def scenario_file(cell: Cell) -> str:
    """The cell's scenario as a TOML file."""
    fields = msgspec.to_builtins(cell.scenario)
    tables = {name: fields.pop(name) for name in ("slo", "devices")}
    lines = [f"# Cell {cell.name} of a comparison.", *toml_lines(fields)]
    for name, rows in tables.items():
        for row in rows:
            lines += ["", f"[[{name}]]", *toml_lines(row)]
    return "\n".join(lines) + "\n"


def write_scenarios(cells: Sequence[Cell], folder: Path) -> None:
    """A scenario file for each cell. Raises ConfigError."""
    names = [re.sub(r"[^\w.-]+", "-", cell.name) for cell in cells]
    known = [name.casefold() for name in names]  # the same file on some systems
    twice = [cell.name for cell, name in zip(cells, known, strict=True) if known.count(name) > 1]
    if twice:
        raise ConfigError(f"the cells {', '.join(twice)} would have files of the same name: rename one")
    writable_folder(folder)
    try:
        for cell, name in zip(cells, names, strict=True):
            (folder / f"{name}.toml").write_text(scenario_file(cell), "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror or error}") from None
