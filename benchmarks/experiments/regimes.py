"""Where drafting on devices pays: WISP and the paper's over strong centralised serving, over 60 combinations."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec

from benchmarks.experiments.page import Cell, of_bound, ratio, scenario_of, search_all
from benchmarks.pages import Data, table
from wisp.sim.capacity import Capacity
from wisp.sim.plots import picture
from wisp.sim.runs import Runs
from wisp.sim.scenario import Kit

RATES = (4.0, 8.0, 12.0, 18.0, 25.0)
SPEEDS = ("20", "60", "130")
RTTS = (20.0, 100.0)
CONTEXTS = {"short": (60, 200), "long": (500, 1100)}
SYSTEMS = ("wisp", "paper", "central")


def run(quick: bool, runs: Runs) -> Data:
    """All cells; the centralised server does not care about devices."""
    grid = list(itertools.product(RATES, SPEEDS, RTTS, CONTEXTS))
    if quick:
        grid = [(20.0, "60", 20.0, "short")]
    cells = {(at, s): _cell(s, *at, quick) for at in grid for s in SYSTEMS}
    found = search_all(list(cells.values()), runs)
    by = dict(zip(cells, found, strict=True))
    return {
        "cells": [
            {
                "rate": at[0],
                "device_tokens_per_s": float(at[1]),
                "rtt_ms": at[2],
                "context": at[3],
                "systems": {s: msgspec.to_builtins(by[at, s]) for s in SYSTEMS},
            }
            for at in grid
        ]
    }


def _cell(policy: str, rate: float, speed: str, rtt_ms: float, context: str, quick: bool) -> Cell:
    scenario = scenario_of("a100-qwen3-32b", rate)
    kit = Kit(speed, rtt_ms) if policy != "central" else Kit("100", 20.0)
    scenario = msgspec.structs.replace(scenario, devices=(kit,), prompt_tokens=CONTEXTS[context])
    answer_s = 200.0 / rate
    brief = (6.0, 8.0, 15.0) if quick else (1.25 * answer_s, 25.0, min(45.0, 1.5 * answer_s))
    return Cell(scenario.brief(*brief), policy, grain=0.2 if quick else 0.08)


def figures(data: Data) -> Data:
    """The table of the page, and how many of its cells are won and lost."""
    body = []
    more = fewer = 0
    for cell in data["cells"]:
        of = {s: msgspec.convert(c, Capacity) for s, c in cell["systems"].items()}
        central = of["central"].capacity
        more += of["wisp"].capacity > central
        fewer += of["wisp"].capacity < central
        body.append(
            (
                f"{cell['rate']:g}",
                f"{cell['device_tokens_per_s']:g}",
                f"{cell['rtt_ms']:g}",
                cell["context"],
                *(str(of[s].capacity) for s in SYSTEMS),
                ratio(of["wisp"].capacity, central),
                ratio(of["paper"].capacity, central),
                of_bound(of["wisp"]),
                of_bound(of["central"]),
            )
        )
    head = ("tokens/s", "drafts/s", "RTT", "context", *SYSTEMS, "wisp/central", "paper/central")
    columns = (*head, "wisp: bound", "central: bound")
    return {"more": more, "fewer": fewer, "map": table(columns, body)}


def draw(data: Data, path: Path) -> None:
    """A map for each context: rate against device and round trip."""
    contexts = list(dict.fromkeys(c["context"] for c in data["cells"]))
    size = (1.5 + 4.5 * len(contexts), 4.5)
    with picture(path, 1, len(contexts), figsize=size, squeeze=False) as axes:
        for axis, context in zip(axes[0], contexts, strict=True):
            cells = [c for c in data["cells"] if c["context"] == context]
            rows = list(dict.fromkeys((c["device_tokens_per_s"], c["rtt_ms"]) for c in cells))
            columns = list(dict.fromkeys(c["rate"] for c in cells))
            values = [[0.0] * len(columns) for _ in rows]
            for c in cells:
                of = c["systems"]
                value = of["wisp"]["capacity"] / max(of["central"]["capacity"], 1)
                y, x = rows.index((c["device_tokens_per_s"], c["rtt_ms"])), columns.index(c["rate"])
                values[y][x] = min(value, 3.0)
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
            axis.imshow(values, cmap="RdYlGn", vmin=0.5, vmax=2.0, aspect="auto")
            axis.set_xticks(range(len(columns)), [f"{r:g}" for r in columns])
            axis.set_yticks(range(len(rows)), [f"{s:g}/s, {r:g} ms" for s, r in rows])
            axis.set_title(f"{context} context: wisp over central", fontsize=9)
            axis.set_xlabel("tokens/s expected")
