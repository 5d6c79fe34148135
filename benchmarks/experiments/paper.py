"""The paper's scheduler and its table: readings of it that were tried, and which set-up gives which of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import msgspec

from benchmarks.experiments.page import ratio, scenario_of
from benchmarks.experiments.readings import NAMED
from benchmarks.pages import Data, table
from wisp.core.draft.policies import Confidence, Predicted
from wisp.core.verify.batching import POLICIES
from wisp.core.verify.cost import Load, load_of
from wisp.core.verify.events import Run
from wisp.sim import runs as simulated
from wisp.sim.capacity import Search, limit_of
from wisp.sim.paper import PAPER, RATES
from wisp.sim.report import Report, report
from wisp.sim.report_table import number
from wisp.sim.runs import Job, Runs
from wisp.sim.scenario import Scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

MAIN = "a100-qwen3-32b"
MAIN_RATES = (8.0, 12.0, 16.0, 20.0)
READ_AT = 16.0  # tokens/s, where readings are compared
READ_WITH = 42  # devices
TOLERANCE = 0.1
GRAIN = 0.04  # of a capacity
QUICK_GRAIN = 0.3
NEAR = 0.15  # largest difference from a published row that is called near
GUESS = 0.6  # of the fluid bound: where a search begins
FEW = "fcfs/16"
SEARCHED = (1, 2, 3)  # seeds that readings were chosen with
UNSEARCHED = (101, 102, 103)


class Setup(msgspec.Struct, frozen=True):
    """A system with what is particular about it. keeps: the token that a predictor doubts is not sent; padded: every
    sequence of a step is as long as the longest."""

    about: str
    spec: str
    keeps: bool = False
    padded: bool = False


READINGS = (
    Setup("as shipped", "paper"),
    Setup("the doubtful token is not sent", "paper", keeps=True),
    Setup("a deadline for each token, from the first token on", "paper,batching=paper/each-token"),
    Setup("a deadline for each round, from the last verdict on", "paper,batching=paper/each-round"),
    Setup("missed deadlines keep nobody out", "paper,batching=paper/late-apart"),
    Setup("prompts at once", "paper,batching=paper/prompts-at-once"),
    Setup(
        "a deadline for each token, the urgent are asked, too, missed deadlines keep nobody out",
        "paper,batching=paper/check-all",
    ),
    Setup("the same, the doubtful token not sent", "paper,batching=paper/check-all", keeps=True),
    Setup("no scheduler: first come first served", "paper,batching=fcfs"),
    Setup("as shipped, drafting during verification", "paper,ahead=yes"),
)  # fmt: skip
ROWS = {
    "central": (
        Setup("at most 16 sequences a step, first come first served, 97 held", f"central,batching={FEW},slots=97"),
    ),
    "sled": (
        Setup("drafts of 4, at most 16 sequences a step", f"sled,drafting=fixed:4,batching={FEW}"),
        Setup("the same, padded to the longest", f"sled,drafting=fixed:4,batching={FEW}", padded=True),
    ),
    "paper": (
        Setup("as shipped, no limit", "paper"),
        Setup("at most 16 sequences a step", "paper,batching=paper/16"),
        Setup("deadlines of tokens, the urgent are asked, no limit", "paper,batching=paper/check-all", keeps=True),
    ),
}  # fmt: skip
BASELINES = (
    Setup("sled, drafts of 2", "sled,drafting=fixed:2"),
    Setup("sled, drafts of 3", "sled,drafting=fixed:3"),
    Setup("sled, by confidence 0.6", "sled,drafting=confidence:0.6"),
    Setup("central, at most 16 a step, 97 held", f"central,batching={FEW},slots=97"),
)


class Cell(msgspec.Struct, frozen=True):
    """A capacity to search; or, with `devices`, how so many fare."""

    setup: Setup
    rate: float
    seeds: tuple[int, ...]
    quick: bool = False
    devices: int = 0


def run(quick: bool, runs: Runs) -> Data:
    """Search all cells at once."""
    most = 1 if quick else None
    rates, theirs = (MAIN_RATES[-1:], RATES[-1:]) if quick else (MAIN_RATES, RATES)
    main = [
        Cell(setup, rate, UNSEARCHED[:most], quick)
        for rate in rates
        for setup in (READINGS[0], *BASELINES[:most])
    ]
    tried = [Cell(setup, READ_AT, SEARCHED[:most], quick, READ_WITH) for setup in READINGS[:most]]
    rows = [
        (of, Cell(setup, rate, (1,), quick))
        for of, setups in ROWS.items()
        for setup in setups[:most]
        for rate in theirs
    ]
    cells = [*main, *tried, *(cell for _, cell in rows)]
    found = dict(zip(cells, runs.map(search, cells), strict=True))
    return {
        "main": [_told(cell, found[cell]) for cell in main],
        "readings": [_told(cell, found[cell]) for cell in tried],
        "rows": [{"row": of, **_told(cell, found[cell])} for of, cell in rows],
    }


def _told(cell: Cell, found: Data) -> Data:
    setup = cell.setup
    bound = round(limit_of(system(setup.spec), _scenario(cell)).devices, 1)
    about = {"setup": setup.about, "spec": setup.spec, "rate": cell.rate, "seeds": cell.seeds}
    return {**about, "bound": bound, **found}


def search(cell: Cell) -> Data:
    """The most devices with at most a tenth of requests late, or those given, and how it went with so many."""
    scenario, of = _scenario(cell), system(cell.setup.spec)
    at, here, seeds = cell.devices, _Here(cell.setup), cell.seeds
    if at:
        jobs = [Job(scenario.with_devices(at), of, seed) for seed in seeds]
        found = here.reports(jobs)
    else:
        looking = Search(scenario, of, seeds, here, TOLERANCE, QUICK_GRAIN if cell.quick else GRAIN)
        guess = max(1, round(GUESS * limit_of(of, scenario).devices))
        at = looking.crossing(guess, TOLERANCE, 1)
        if len(seeds) > 1 and at:
            at = looking.crossing(at, TOLERANCE, len(seeds))
        found = list(looking.known.get(at, {}).values())
    return {
        "devices": at,
        "late": fmean([r.missed for r in found] or [0.0]),
        "goodput": fmean([r.goodput for r in found] or [0.0]),
        "ttft_s": fmean([(r.ttft_ms.median or 0.0) / 1e3 for r in found] or [0.0]),
        "tpot_ms": fmean([r.tpot_ms.median or 0.0 for r in found] or [0.0]),
        "tpot_p99_ms": fmean([r.tpot_ms.p99 or 0.0 for r in found] or [0.0]),
    }


def _scenario(cell: Cell) -> Scenario:
    scenario = scenario_of(MAIN, cell.rate)
    if cell.quick:
        return scenario.brief(8.0, 8.0, 15.0)
    answer_s = scenario.answer_s
    return scenario.brief(1.25 * answer_s, 30.0, min(60.0, 1.5 * answer_s))


class _Here(Runs):
    """Runs of a set-up, in this process. Not remembered: their policies are no part of the package."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup

    def reports(self, jobs: Sequence[Job]) -> list[Report]:
        return [self._report(job) for job in jobs]

    def _report(self, job: Job) -> Report:
        take = Predicted.take
        if self.setup.keeps:
            Predicted.take = Confidence.take  # type: ignore[method-assign]
        try:
            with patch.dict(POLICIES, NAMED):
                return _padded(job) if self.setup.padded else simulated.run(job)
        finally:
            Predicted.take = take  # type: ignore[method-assign]


def _padded(job: Job) -> Report:
    """The run on an engine for which all sequences of a step are as long as the longest."""
    simulation = Simulation(job.scenario, job.system, job.seed)
    verifier = simulation.verifier
    profile, run_step = verifier.engine.profile, verifier.run

    class Longest:
        """The profile; `load` is that of the step under way, padded."""

        load = Load()

        def __getattr__(self, name: str) -> Any:
            return getattr(profile, name)

        def step_ms(self, load: Load) -> float:
            return profile.step_ms(self.load)

    padded = Longest()

    def run_padded(step: Run) -> None:
        load, n = load_of(step.slices), len(step.slices)
        longest = max(len(s.tokens) for s in step.slices)
        padded.load = msgspec.structs.replace(load, new=n * longest)
        run_step(step)

    verifier.engine.profile = padded  # type: ignore[assignment]
    verifier.run = run_padded  # type: ignore[method-assign]
    estimate: list[float] = []

    def enough(simulation: Simulation) -> bool:
        share = simulated.clearly_missed(simulation, job.give_up) if job.give_up else None
        if share is not None:
            estimate.append(share)
        return bool(estimate)

    simulation.run(enough)
    return report(simulation, violation_rate=estimate[0] if estimate else None)


# --- the page


def figures(data: Data) -> Data:
    """The tables."""
    cells = [*data["main"], *data["readings"], *data["rows"]]
    return {
        "capacities": _main(data["main"]),
        "tried": _readings(data["readings"]),
        "missing": any(c["devices"] is None for c in cells),
        "seeds": ", ".join(map(str, UNSEARCHED)),
        "searched": ", ".join(map(str, SEARCHED)),
        "read_at": f"{READ_AT:g}",
        "read_with": READ_WITH,
        "due_ms": f"{1e3 / READ_AT:.1f}",
        **_rows(data["rows"]),
    }


def _n(devices: int | None) -> str:
    return "-" if devices is None else str(devices)


def _main(found: list[Data]) -> str:
    rates = sorted({c["rate"] for c in found})
    by = {(c["setup"], c["rate"]): c["devices"] for c in found}
    shipped = READINGS[0].about
    body = [
        ("**`paper`**" if setup == shipped else setup, *(_n(by[setup, r]) for r in rates))
        for setup in dict.fromkeys(c["setup"] for c in found)
    ]
    bounds = [max(c["bound"] for c in found if c["rate"] == r) for r in rates]
    body.append(("fluid bound, with drafts of devices", *(f"{bound:.0f}" for bound in bounds)))
    best = [
        max(n or 0 for (setup, at), n in by.items() if at == r and setup.startswith("sled")) for r in rates
    ]
    ours = [by[shipped, r] for r in rates]
    body.append(
        ("`paper` / best `sled`", *(ratio(a, b) if a else "-" for a, b in zip(ours, best, strict=True)))
    )
    return table(("", *(f"{r:g} tok/s" for r in rates)), body)


def _readings(found: list[Data]) -> str:
    body = [
        (
            c["setup"],
            number(c["late"], ".0%"),
            number(c["goodput"], ".0f"),
            number(c["ttft_s"], ".1f") + " s",
            f"{number(c['tpot_ms'], '.0f')} / {number(c['tpot_p99_ms'], '.0f')} ms",
        )
        for c in found
    ]
    return table(("reading", "late", "goodput", "median TTFT", "TPOT, median / p99"), body)


def _rows(found: list[Data]) -> Data:
    """The table, and the set-ups that are near a published row at every rate."""
    rates = sorted({c["rate"] for c in found})
    body, near = [], []
    for of in ROWS:
        theirs = dict(zip(RATES, PAPER[MAIN][of].capacity, strict=True))
        body.append((f"**{of}, published**", *(f"**{theirs[r]}**" for r in rates), ""))
        by = {(c["setup"], c["rate"]): c["devices"] for c in found if c["row"] == of}
        for setup in dict.fromkeys(s for s, _ in by):
            each = [by[setup, r] for r in rates]
            searched = [n / theirs[r] - 1.0 for n, r in zip(each, rates, strict=True) if n is not None]
            off = max(map(abs, searched), default=None)
            body.append((f"{of}: {setup}", *map(_n, each), number(off, ".0%")))
            if off is not None and off <= NEAR and len(searched) == len(rates):
                near.append(f"{of} ({setup})")
    head = ("", *(f"{r:g} tok/s" for r in rates), "largest difference")
    return {"table": table(head, body), "near": "; ".join(near) or "none", "within": f"{NEAR:.0%}"}


def draw(data: Data, path: Path) -> None:
    """The paper's rows, and what each set-up gives."""
    from wisp.sim.plots import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, len(ROWS), figsize=(12, 4), sharey=True)
    for axis, of in zip(axes, ROWS, strict=True):
        axis.plot(RATES, PAPER[MAIN][of].capacity, "k--", label="published")
        mine = [c for c in data["rows"] if c["row"] == of]
        for setup in dict.fromkeys(c["setup"] for c in mine):
            its = [c for c in mine if c["setup"] == setup]
            axis.plot([c["rate"] for c in its], [c["devices"] for c in its], marker="o", label=setup)
        axis.set_title(of)
        axis.set_xlabel("tokens/s")
        axis.legend(fontsize=6)
    axes[0].set_ylabel("devices, at most 10 % late")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
