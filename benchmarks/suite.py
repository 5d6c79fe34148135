"""`make bench-suite`: systems over the suite that ships, as a page. `wisp sim compare` makes the figures."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import msgspec

from benchmarks.pages import Data, render, table
from wisp.core.errors import ConfigError
from wisp.outputs import writable
from wisp.sim.compare.cell import CENTRAL, CellResult, is_wisp
from wisp.sim.compare.command import QUICK_SYSTEMS, SYSTEMS, compare, specs_of
from wisp.sim.compare.figures import SystemFigures
from wisp.sim.compare.results import Comparison, as_text
from wisp.sim.compare.suite import load_suite
from wisp.sim.compare.tables import difference, word
from wisp.sim.report_table import number
from wisp.sim.scenario import Scenario


def run_suite(out: Path, *, quick: bool, systems: str = "", jobs: int, as_json: bool) -> None:
    """Compare, going on with what is there, and write figures and page into the folder `out`. systems: by comma; "" for
    the usual ones. Raises ConfigError."""
    path = out / "suite.json"
    writable(path)
    specs = specs_of(systems or (QUICK_SYSTEMS if quick else SYSTEMS))
    if "wisp" not in specs:
        raise ConfigError("the page is about wisp: name it, as it is, in --systems")
    found = compare(load_suite(), specs, quick=quick, out=path, jobs=jobs)
    chosen = f" --systems {systems}" if systems else ""
    head = {
        "command": f"python -m benchmarks suite{' --quick' if quick else ''}{chosen}",
        "date": datetime.date.today().isoformat(),
    }
    text = as_text(head | msgspec.to_builtins(found))
    path.write_text(text)
    data = json.loads(text)
    (out / "suite.md").write_text(render("suite", data, figures(data)))
    if as_json:
        print(json.dumps(data))


def figures(data: Data) -> Data:
    """The tables of the page, and its sums."""
    found = msgspec.convert({k: v for k, v in data.items() if k not in ("command", "date")}, Comparison)
    cells = found.cells
    return {
        "n": len(cells),
        "n_sampled": sum(c.sampled for c in cells),
        "n_carried": sum(c.verdicts["wisp"].carried for c in cells),
        "fewest": min(c.compared for c in cells),
        "n_seeds": len(found.extent.seeds),
        "failures": list(_failures(cells)),
        "verdicts": _verdicts(cells),
        "all_systems": _all_systems(cells),
        "scenarios": table(("cell", "scenario"), ((c.name, described(c.scenario)) for c in cells)),
        "over": {
            name: (_over([c for c in cells if c.verdicts["wisp"].carried], name), _over(cells, name))
            for name in cells[0].systems
            if name != "wisp"
        },
    }


def _failures(cells: list[CellResult]) -> Iterator[str]:
    for cell in cells:
        for name, verdict in cell.verdicts.items():
            if is_wisp(name):
                yield from (f"{cell.name}: {difference(c)}" for c in verdict.missed)


def _verdicts(cells: list[CellResult]) -> str:
    rows = []
    for cell in cells:
        central, wisp = cell.systems[CENTRAL], cell.systems["wisp"]
        knobs = central.variant.partition(",")[2] or "as it is"
        each = [both(central, wisp) for both in (_met, _goodput, _ttft, _stall, _gap)]
        rows.append((cell.name, knobs, *each, word(cell.verdicts["wisp"])))
    head = ("cell", "central tuned to", "met", "goodput", "TTFT p50", "stall p50", "gap p50", "verdict")
    return table(head, rows)


def _pair(metric: str, how: str, factor: float = 1.0) -> Callable[[SystemFigures, SystemFigures], str]:
    def both(central: SystemFigures, wisp: SystemFigures) -> str:
        return " / ".join(_shown(of, metric, how, factor) for of in (central, wisp))

    return both


def _shown(of: SystemFigures, metric: str, how: str, factor: float = 1.0) -> str:
    value = of.mean(metric)
    return number(None if value is None else value * factor, how)


_met = _pair("attainment", ".1f", 100.0)
_goodput = _pair("goodput", ",.0f")
_ttft = _pair("ttft_p50_ms", ",.0f")
_stall = _pair("longest_stall_p50_ms", ",.0f")
_gap = _pair("longest_gap_p50_ms", ",.0f")


def _all_systems(cells: list[CellResult]) -> str:
    names = list(cells[0].systems)
    rows = []
    for cell in cells:
        each = [
            f"{_shown(of, 'attainment', '.0f', 100.0)}, {_shown(of, 'goodput', ',.0f')}, "
            f"{_shown(of, 'draft_steps_per_token', '.1f')}"
            for of in cell.systems.values()
        ]
        rows.append((cell.name, *each))
    return table(("cell", *names), rows)


def _over(cells: list[CellResult], name: str) -> str:
    """Geometric mean over cells of the goodput of `wisp` over another system's, each at least a token per second."""
    if not cells:
        return "-"

    def goodput(cell: CellResult, of: str) -> float:
        return max(cell.systems[of].mean("goodput") or 0.0, 1.0)

    return f"{geometric_mean([goodput(cell, 'wisp') / goodput(cell, name) for cell in cells]):.2f}"


def described(s: Scenario) -> str:
    """A scenario in a line."""
    parts: list[Any] = [s.hardware, f"{', '.join(f'{c.rate:g}' for c in s.slo)} tokens/s"]
    if s.arrivals:
        parts.append("recorded arrivals")
    elif s.arrivals_per_s:
        how = "Poisson" if s.arrivals_cv == 1.0 else f"bursts (CV {s.arrivals_cv:g})"
        parts.append(f"{s.arrivals_per_s:g} requests/s, {how}")
    else:
        n = f"up to {max(n for _, n in s.population)}" if s.population else f"{s.devices_n}"
        parts.append(f"{n} devices" + (f" that pause {s.think_s:g} s" if s.think_s else ""))
    parts.append(f"prompts {s.prompt_tokens[0]} to {s.prompt_tokens[1]}")
    parts.append(f"answers {s.output_tokens[0]} to {s.output_tokens[1]}")
    parts.append(f"TTFT {', '.join(f'{t:g}' for t in sorted({c.ttft_s for c in s.slo}))} s")
    drafts = ", ".join(f"{k.device} at {k.rtt_ms:g}+{k.jitter_ms:g} ms" for k in s.devices)
    parts.append(f"devices {drafts}")
    parts += [f"overlap {s.overlap:g}"] if s.overlap else []
    parts += [f"cost model times {s.profile_error:g}"] if s.profile_error != 1.0 else []
    parts += [f"{s.vanish:.0%} vanish"] if s.vanish else []
    return "; ".join(parts)
