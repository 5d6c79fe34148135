"""What each part of WISP is worth, and what upsets it: one part out at a time, one thing wrong at a time."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.experiments.page import Cell, interval, of_bound, ratio, scenario_of, search_all
from benchmarks.pages import Data, table
from wisp.sim.capacity import Capacity
from wisp.sim.plots import OWN, picture
from wisp.sim.runs import Runs
from wisp.sim.scenario import Scenario, load_scenario

WITHOUT = {
    "wisp": "all parts",
    "wisp,drafting=predictor": "the paper's predictor instead of gain",
    "wisp,drafting=fixed:4": "four tokens instead of gain",
    "wisp,ahead=no": "no drafting ahead",
    "wisp,server_mode=no": "no server mode",
    "wisp,batching=continuous": "continuous batching instead of our own",
    "wisp,batching=wisp:keep": "no preemption",
    "wisp,batching=paper": "the paper's scheduler instead of our own",
    "wisp,admission=yes": "with SLO admission, where those who are refused ask again and count each time",
}
NAMES = WITHOUT | {"wisp,admission=no": "no SLO admission"}  # in figures of searches that still refused
RATES = (4.0, 8.0, 16.0)
SYSTEMS = ("wisp", "central")
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)


def trouble(quick: bool) -> dict[str, Scenario]:
    """What goes wrong, at 12 tokens/s."""
    plain = scenario_of("a100-qwen3-32b", 12.0)
    if quick:
        return {"loss of packets": load_scenario("jitter-loss").at_rate(20.0)}
    return {
        "nothing": plain,
        **{f"acceptance {a:g}": msgspec.structs.replace(plain, acceptance=a) for a in ACCEPTANCES},
        "cost model a third too low": load_scenario("wrong-cost-model"),
        "cost model half too high": msgspec.structs.replace(plain, profile_error=1.5),
        "jitter and loss, RTT 60": load_scenario("jitter-loss"),
        "devices throttle": load_scenario("throttle"),
        "20 % vanish": load_scenario("vanish"),
        "slow devices": load_scenario("slow-devices"),
        "mixed devices and classes": load_scenario("mixed"),
    }


def run(quick: bool, runs: Runs) -> Data:
    rates = (20.0,) if quick else RATES
    parts = list(WITHOUT)[: 2 if quick else None]
    without = {
        (spec, r): _cell(scenario_of("a100-qwen3-32b", r), spec, quick) for r in rates for spec in parts
    }
    wrong = {
        (name, s): _cell(scenario, s, quick)
        for name, scenario in trouble(quick).items()
        for s in SYSTEMS[: 1 if quick else None]
    }
    cells = [*without.values(), *wrong.values()]
    found = dict(zip(cells, search_all(cells, runs), strict=True))
    return {
        "without": [{"spec": k[0], **msgspec.to_builtins(found[c])} for k, c in without.items()],
        "trouble": [{"name": k[0], **msgspec.to_builtins(found[c])} for k, c in wrong.items()],
    }


def _cell(scenario: Scenario, policy: str, quick: bool, seeds: tuple[int, ...] = (1,)) -> Cell:
    if quick:
        return Cell(scenario.brief(6.0, 8.0, 15.0), policy, grain=0.2)
    return Cell(scenario.brief(20.0, 40.0, 40.0), policy, seeds, grain=0.05)


def _capacity(row: dict[str, object]) -> Capacity:
    return msgspec.convert({k: v for k, v in row.items() if k not in ("spec", "name")}, Capacity)


def figures(data: Data) -> Data:
    whole = {c["rate"]: c["capacity"] for c in data["without"] if c["spec"] == "wisp"}
    parts = (
        (
            f"{row['rate']:g}",
            NAMES[row["spec"]],
            interval(c),
            ratio(c.capacity, whole[c.rate]),
            of_bound(c),
        )
        for row, c in ((row, _capacity(row)) for row in data["without"])
    )
    by: dict[str, dict[str, Capacity]] = {}
    for row in data["trouble"]:
        by.setdefault(row["name"], {})[row["system"]] = _capacity(row)
    troubles = []
    for name, of in by.items():
        central = of["central"].capacity if "central" in of else 0
        troubles.append(
            (
                name,
                *(f"{interval(c)} {of_bound(c)}" for c in of.values()),
                ratio(of["wisp"].capacity, central),
            )
        )
    systems = list(next(iter(by.values())))
    return {
        "parts": table(("tokens/s", "`wisp` with", "capacity", "of `wisp`", "bound: share"), parts),
        "troubles": table(("", *systems, "wisp/central"), troubles),
    }


def draw(data: Data, path: Path) -> None:
    """Capacity without each part."""
    rates = list(dict.fromkeys(c["rate"] for c in data["without"]))
    size = (2.5 + 4.5 * len(rates), 3.8)
    with picture(path, 1, len(rates), figsize=size, sharey=True, squeeze=False) as axes:
        for axis, rate in zip(axes[0], rates, strict=True):
            of = [c for c in data["without"] if c["rate"] == rate][::-1]
            axis.barh([NAMES[c["spec"]] for c in of], [c["capacity"] for c in of], color=OWN)
            axis.axvline(of[-1]["bound"], color="black", lw=0.9, ls="--")
            axis.set_title(f"devices at {rate:g} tokens/s; dashed: fluid bound", fontsize=9)
