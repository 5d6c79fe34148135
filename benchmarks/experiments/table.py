"""The paper's table, and the main comparison.

Main rows: one A100 with Qwen3-32B at 8 to 20 tokens/s, every baseline at its best. Then the paper's own table, three
targets at its four rates: our rows beside its rows, our ratios beside its ratios. What is unknown about its set-up (how
many sessions shared a step) is fitted to its centralised row alone; its row of WISP is then predicted.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import geometric_mean

import msgspec

from benchmarks.experiments.page import Cell, interval, of_bound, ratio, scenario_of, search_all
from benchmarks.pages import Data, table
from wisp.core.verify.cost import Load
from wisp.sim.capacity import Capacity
from wisp.sim.fluid import demand_of, operating_points
from wisp.sim.paper import PAPER, RATES, cap, paper_capacity
from wisp.sim.plots import picture
from wisp.sim.report_table import number
from wisp.sim.runs import Runs
from wisp.sim.scenario import Scenario

MAIN = "a100-qwen3-32b"
MAIN_RATES = (8.0, 12.0, 16.0, 20.0)
SYSTEMS = ("wisp", "paper", "central", "central-speculative", "sled")
TARGETS = {"a100-qwen3-32b": MAIN, "a100-qwen3-14b": "a100-qwen3-14b", "a100-llama-70b": "a100-llama-70b-w4"}
THEIRS = ("paper", "central", "sled")
OVERLAPS = (1.0, 2.0)
OVERLAP_RATES = (8.0, 16.0)


def run(quick: bool, runs: Runs) -> Data:
    """Search all cells at once; then fit and predict."""
    main = {
        (s, r): _main(s, r, quick)
        for r in (MAIN_RATES[-1:] if quick else MAIN_RATES)
        for s in (("wisp", "central") if quick else SYSTEMS)
    }
    paper = {
        (t, s, r): _paper(t, s, r)
        for t in ([] if quick else TARGETS)
        for r in RATES
        for s in ("wisp", *THEIRS)
    }
    overlap = {
        (s, o, r): _overlap(s, o, r)
        for o in ([] if quick else OVERLAPS)
        for s in ("wisp", "paper", "central")
        for r in OVERLAP_RATES
    }
    cells = [*main.values(), *paper.values(), *overlap.values()]
    found = dict(zip(cells, search_all(cells, runs), strict=True))
    return {
        "main": [msgspec.to_builtins(found[c]) for c in main.values()],
        "paper": [{"target": k[0], **msgspec.to_builtins(found[c])} for k, c in paper.items()],
        "overlap": [{"overlap": k[1], **msgspec.to_builtins(found[c])} for k, c in overlap.items()],
        "predicted": _predictions(),
    }


def _main(policy: str, rate: float, quick: bool) -> Cell:
    scenario = scenario_of(MAIN, rate)
    if quick:
        return Cell(scenario.brief(8.0, 8.0, 15.0), policy, grain=0.2)
    tuned = policy not in ("wisp", "paper", "central")
    return Cell(scenario.brief(25.0, 60.0, 50.0), policy, (1,) if tuned else (1, 2), strict=not tuned)


def _paper(target: str, policy: str, rate: float) -> Cell:
    answer_s = 200.0 / rate
    scenario = scenario_of(target, rate)
    brief = scenario.brief(1.25 * answer_s, 30.0, min(60.0, 1.2 * answer_s))
    return Cell(brief, policy, grain=0.06)


def _overlap(policy: str, overlap: float, rate: float) -> Cell:
    scenario = scenario_of(MAIN, rate).brief(20.0, 40.0, 40.0)
    return Cell(msgspec.structs.replace(scenario, overlap=overlap), policy, grain=0.04)


# --- the paper's rows, by a limit on sessions in a step


def _predictions() -> Data:
    """The sessions in a step that explain the paper's centralised row, and what that makes of its other rows."""
    scenario = scenario_of(MAIN, RATES[-1])
    target = cap(MAIN, "central")
    sessions = min(
        range(1, 257), key=lambda n: abs(math.log(_throughput(scenario, n, drafts=False) / target))
    )
    kv = scenario.profile.kv_tokens / demand_of(scenario, scenario.slo[0], scenario.devices[0]).context
    tokens = _throughput(scenario, sessions, drafts=True)
    of_sled = cap(MAIN, "sled")
    sled = min(
        range(1, 65), key=lambda n: abs(math.log(_throughput(scenario, n, drafts=True, k=4) / of_sled))
    )
    return {
        "sessions_a_step": sessions,
        "sled_sessions_a_step": sled,
        "kv_devices": kv,
        "wisp_tokens_per_s": tokens,
        "paper": [int(min(kv, tokens / rate)) for rate in RATES],
        "central": [paper_capacity(MAIN, "central", rate) for rate in RATES],
        "sled": [paper_capacity(MAIN, "sled", rate) for rate in RATES],
    }


def _throughput(scenario: Scenario, sessions: int, *, drafts: bool, k: int = 0) -> float:
    """Tokens per second of steps with so many sessions, prompts included; drafts as good as can be, or of k tokens."""
    from wisp.calibrate.traces.scripts import library

    demand = demand_of(scenario, scenario.slo[0], scenario.devices[0])
    points = operating_points(library(Path(scenario.traces), scenario.domain))
    if not drafts:
        points = points[:1]
    elif k:
        points = (min(points, key=lambda p: abs(p.sent - k)),)
    best = 0.0
    for p in points:
        rows = sessions * (p.sent + 1 + p.committed * demand.prompt / demand.output)
        cached = int(sessions * demand.context)
        ms = scenario.profile.step_ms(Load(round(rows), int(rows * demand.context), cached, sessions))
        best = max(best, sessions * p.committed / ms * 1e3)
    return best


# --- the page


def figures(data: Data) -> Data:
    """The tables of the page, and the figures of its text."""
    found = [msgspec.convert(c, Capacity) for c in data["main"]]
    head = (
        "tokens/s",
        "system",
        "10 %",
        "1 %",
        "goodput",
        "p99 TPOT of violators",
        "bound: share",
        "over central",
    )
    made: Data = {"capacities": table(head, (_main_row(c, found) for c in found))}
    if data["paper"]:
        rows = {(c["target"], c["system"], c["rate"]): c for c in data["paper"]}
        made |= {"beside_paper": _beside_paper(rows), "ratios": _ratios(rows), "overlaps": _overlaps(data)}
        made |= _against_caps(data) | {"predictions": _predicted(data["predicted"], rows)}
    return made


def _main_row(c: Capacity, found: list[Capacity]) -> tuple[str, ...]:
    central = next((o.capacity for o in found if o.system == "central" and o.rate == c.rate), 0)
    variant = c.variant.partition(",")[2]
    return (
        f"{c.rate:g}",
        f"{c.system} ({variant})" if variant and c.variant != c.system else c.system,
        interval(c),
        number(c.capacity_at_1_percent if len(c.seeds) > 1 else None, "d"),
        f"{c.goodput:.0f}",
        f"{number(c.violators_tpot_p99_ms, '.0f')} ms",
        of_bound(c),
        ratio(c.capacity, central),
    )


Rows = dict[tuple[str, str, float], Data]  # by target, system and rate


def _beside_paper(rows: Rows) -> str:
    body = []
    for target, hardware in TARGETS.items():
        for system in ("wisp", *THEIRS):
            at = [rows[target, system, rate] for rate in RATES]
            theirs = PAPER[hardware].get(system)
            goodput = geometric_mean([max(c["goodput"], 0.1) for c in at])
            body.append(
                (
                    target,
                    system,
                    " / ".join(str(c["capacity"]) for c in at),
                    " / ".join(map(str, theirs.capacity)) if theirs and theirs.capacity else "-",
                    f"{goodput:.0f}",
                    f"{theirs.goodput:.0f}" if theirs else "-",
                    " / ".join(f"{c['bound']:.0f} ({c['fraction']:.0%})" for c in at),
                )
            )
    head = (
        "target",
        "system",
        "capacity at 2/4/6/8",
        "the paper's",
        "goodput",
        "the paper's",
        "bound (share)",
    )
    return table(head, body)


def _ratios(rows: Rows) -> str:
    ratios = []
    for target, hardware in TARGETS.items():
        for other in ("central", "sled"):
            for ours in ("wisp", "paper"):
                simulated = [
                    ratio(rows[target, ours, r]["capacity"], rows[target, other, r]["capacity"])
                    for r in RATES
                ]
                paper = PAPER[hardware]
                published = paper["paper"].goodput / paper[other].goodput
                ratios.append((target, f"{ours} / {other}", " / ".join(simulated), f"{published:.2f}"))
    return table(("target", "ratio", "capacity, simulated", "goodput, the paper's"), ratios)


def _against_caps(data: Data) -> Data:
    """Beside the paper's baselines, as throughput caps fitted to its rows."""
    ours = next(c["capacity"] for c in data["main"] if (c["system"], c["rate"]) == ("wisp", 8.0))
    capped = {of: paper_capacity(MAIN, of, 8.0) for of in ("central", "sled")}
    return {
        "carried": ours,
        "central_paper": capped["central"],
        "sled_paper": capped["sled"],
        "over_central": ratio(ours, capped["central"]),
        "over_sled": ratio(ours, capped["sled"]),
        "central_cap": cap(MAIN, "central"),
        "sled_cap": cap(MAIN, "sled"),
    }


def _predicted(predicted: Data, rows: Rows) -> str:
    return table(
        ("", *(f"{r:g} tok/s" for r in RATES)),
        (
            ("predicted from the centralised row", *map(str, predicted["paper"])),
            ("the paper's WISP", *map(str, PAPER[MAIN]["paper"].capacity)),
            (
                "`paper`, simulated without that limit",
                *(str(rows[MAIN, "paper", r]["capacity"]) for r in RATES),
            ),
        ),
    )


def _overlaps(data: Data) -> str:
    rows = {(c["overlap"], c["system"], c["rate"]): c for c in data["overlap"]}
    body = []
    for rate in OVERLAP_RATES:
        for overlap in OVERLAPS:
            at = {s: rows[overlap, s, rate] for s in ("wisp", "paper", "central")}
            body.append(
                (
                    f"{rate:g}",
                    f"{overlap:g}",
                    *(f"{c['capacity']} of {c['bound']:.0f} ({c['fraction']:.0%})" for c in at.values()),
                    ratio(at["wisp"]["capacity"], at["central"]["capacity"]),
                    ratio(at["wisp"]["capacity"], at["paper"]["capacity"]),
                )
            )
    return table(("tokens/s", "overlap", "wisp", "paper", "central", "wisp/central", "wisp/paper"), body)


def draw(data: Data, path: Path) -> None:
    """Capacity by rate for each system, with both bounds."""
    found = [msgspec.convert(c, Capacity) for c in data["main"]]
    with picture(path, figsize=(8, 4.5)) as axis:
        for system in dict.fromkeys(c.system for c in found):
            of = [c for c in found if c.system == system]
            at = [c.capacity for c in of]
            below, above = [c.capacity - c.low for c in of], [c.high - c.capacity for c in of]
            axis.errorbar([c.rate for c in of], at, (below, above), marker="o", capsize=3, label=system)
        for system, style in (("wisp", "k--"), ("central", "k:")):
            of = [c for c in found if c.system == system]
            axis.plot(
                [c.rate for c in of], [c.bound for c in of], style, lw=0.9, label=f"fluid bound, {system}"
            )
        axis.set_xlabel("token speed that users expect (tokens/s)")
        axis.set_ylabel("devices, at most 10 % violations")
        axis.set_ylim(bottom=0)
        axis.legend()
