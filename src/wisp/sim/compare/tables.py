"""A comparison for people: a row for each system of a cell, the verdicts, and the cells that fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from wisp.sim.compare.cell import CellResult, is_wisp
from wisp.sim.compare.figures import SystemFigures
from wisp.sim.compare.results import Comparison
from wisp.sim.compare.verdict import Criterion, Verdict
from wisp.sim.report_table import number

NAMES = {  # of a metric; factor and unit for people
    "attainment": ("met", 100.0, " %"),
    "ttft_p50_ms": ("TTFT", 1.0, " ms"),
    "longest_stall_p50_ms": ("stall", 1.0, " ms"),
    "goodput": ("goodput", 1.0, " tokens/s"),
}
COLUMNS = ("met, %", "goodput", "TTFT p50/p99", "stall p50/p99", "gap p50/p99", "late", "drafts")
CAPTION = (
    "Means over seeds, times in milliseconds. stall: longest lateness of a token in an answer; late: share of tokens; "
    "drafts: draft steps per token; ?: the interval does not decide."
)
WIDTH = 160  # of the table, at least


def table(cells: Sequence[CellResult]) -> Table:
    """Each system in each cell."""
    out = Table(caption=CAPTION, caption_justify="left")
    out.add_column("cell")
    out.add_column("system")
    for name in COLUMNS:
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("against central")
    for cell in cells:
        for i, (name, found) in enumerate(cell.systems.items()):
            judged = cell.verdicts.get(name)
            out.add_row("" if i else cell.name, found.variant, *row(found), word(judged) if judged else "")
        out.add_section()
    return out


def row(found: SystemFigures) -> list[str]:
    """A system's figures, for COLUMNS."""
    attained = found.mean("attainment")

    def both(name: str) -> str:
        return "/".join(number(found.mean(f"{name}_{q}_ms"), ".0f") for q in ("p50", "p99"))

    return [
        number(None if attained is None else attained * 100),
        number(found.mean("goodput"), ".0f"),
        *(both(name) for name in ("ttft", "longest_stall", "longest_gap")),
        number(found.mean("late_tokens"), ".1%"),
        number(found.mean("draft_steps_per_token"), ".2f"),
    ]


def word(judged: Verdict) -> str:
    """A verdict in a few words."""
    if judged.says_nothing:
        return "nobody in time"
    if judged.passes:
        return "ok" if judged.carried else "ok, overload"
    return "worse: " + ", ".join(NAMES[c.metric][0] + ("" if c.clear else "?") for c in judged.missed)


def summary(found: Comparison) -> Iterator[str]:
    """Lines about the cells in which `wisp` is worse than central serving, and about how much was run."""
    judged = [cell for cell in found.cells if any(is_wisp(name) for name in cell.verdicts)]
    telling = [cell for cell in judged if not cell.says_nothing]
    if telling:
        passing = sum(cell.passes for cell in telling)
        yield f"{passing} of {len(telling)} cells pass" + ":" * bool(found.failing)
    if len(telling) < len(judged):
        empty = ", ".join(cell.name for cell in judged if cell.says_nothing)
        yield f"Nobody was served in time by either system, so that nothing is compared: {empty}"
    for cell in judged:
        for name, verdict in cell.verdicts.items():
            if is_wisp(name):
                for criterion in verdict.missed:
                    yield f"  {cell.name}: {name}: {difference(criterion)}"
    few = min((cell.compared for cell in found.cells), default=0)
    yield (
        f"{len(found.cells)} of {found.of} cells done, {len(found.extent.seeds)} seeds, "
        f"at least {few} requests a cell, {found.cpu_s:,.0f} s of CPU"
    )
    if found.quick:
        yield "A quick run: few requests, so its figures mean little."


def difference(c: Criterion) -> str:
    """Both figures, and how far beyond the limit, with its interval."""
    name, factor, unit = NAMES[c.metric]

    def shown(value: float | None) -> str:
        return number(None if value is None else value * factor)

    text = f"{name} {shown(c.system)}{unit}, central {shown(c.central)}{unit}"
    if c.excess is not None:
        text += f"; beyond the limit by {shown(c.excess.mean)}"
        if c.excess.low is not None:  # more than one seed
            text += f" ({shown(c.excess.low)} to {shown(c.excess.high)})"
    return text
