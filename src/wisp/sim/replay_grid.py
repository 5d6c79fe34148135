"""`wisp replay`: drafting policies over a grid of devices, links and verifiers, on traces kept apart from training."""

from __future__ import annotations

import datetime
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from wisp import __version__
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.errors import ConfigError
from wisp.core.draft.predictor import Predictor
from wisp.engines.build import read_predictor
from wisp.sim.devices import Device, Link, Server
from wisp.sim.replay import Bench, Tally, replay
from wisp.calibrate.traces.format import Trace, TraceSet, trace_folder

SPEEDS = (8.0, 20.0, 40.0, 68.0, 130.0)  # drafted tokens per second
RTTS = (5.0, 20.0, 60.0, 150.0)  # milliseconds
SERVERS = (
    Server("fast", 15.0, 0.10),  # a 14 B model on an H200, idle: an assumption
    Server("a100-32b", 38.0, 0.42),  # Qwen3-32B on one A100, idle
    Server("busy", 90.0, 0.60, queue_ms=20.0),  # the same in large batches
)
FIXED = tuple(f"fixed:{k}" for k in (1, 2, 3, 4, 5, 6, 8, 10, 12))
HIGH_PRICE = 0.5  # committed tokens for one draft token


@dataclass(frozen=True)
class Variant:
    """A policy with or without drafting ahead and server mode."""

    label: str
    spec: str
    ahead: bool = False
    server_mode: bool = False

    def policies(self, predictor: Predictor) -> Policies:
        """Fresh, nothing learned yet."""
        return Policies(self.spec, predictor, server_mode=self.server_mode)

    def run(self, traces: list[Trace], bench: Bench, predictor: Predictor) -> Tally:
        """Replay the traces."""
        return replay(traces, bench, self.policies(predictor), Ahead() if self.ahead else None)


VARIANTS = (
    *(Variant(spec, spec) for spec in FIXED),
    Variant("confidence:0.4", "confidence:0.4"),
    Variant("predictor", "predictor"),
    Variant("gain", "gain"),
    Variant("fixed:4+ahead", "fixed:4", ahead=True),
    Variant("gain+ahead", "gain", ahead=True),
    Variant("gain+ahead+server", "gain", ahead=True, server_mode=True),
)


def run_grid(
    traces: Path,
    names: list[str],
    predictor: Path | None,
    *,
    price: float,
    limit: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Replay and report; with `out`, write a page with its data and a plot there. Raises ConfigError."""
    variants = _chosen(names)
    model = read_predictor(predictor)
    everything = TraceSet.load(trace_folder(traces))
    held_out = _spread([t for t in everything if t.split != "train"], limit)
    if not held_out:
        raise ConfigError(f"{traces} has no traces that were kept apart from training")
    console = Console(stderr=True)
    cells = [
        _cell(variants, held_out, Bench(Device(f"{speed:g}", speed), Link(rtt), server, price), model)
        for speed, rtt, server in track(
            list(itertools.product(SPEEDS, RTTS, SERVERS)), "replaying", console=console, transient=True
        )
    ]
    result: dict[str, Any] = {
        "wisp": __version__,
        "date": datetime.date.today().isoformat(),
        "traces": len(held_out),
        "positions": sum(map(len, held_out)),
        "price": price,
        "summary": summary(cells) if not names else {},
        "high_price": _at_high_price(variants, held_out, model) if not names else {},
        "cells": cells,
    }
    if out is not None:
        from wisp.sim.plots import write_page

        write_page(result, variants, held_out, model, out)
    print(json.dumps(result)) if as_json else _show(result)


def _chosen(names: list[str]) -> tuple[Variant, ...]:
    if not names:
        return VARIANTS
    known = {v.label: v for v in VARIANTS}
    return tuple(known.get(name) or Variant(name, name) for name in names)


def _spread(traces: list[Trace], limit: int) -> list[Trace]:
    """So many, evenly from all domains and samplings."""
    step = max(1.0, len(traces) / limit)
    return [traces[int(i * step)] for i in range(min(limit, len(traces)))]


def _cell(
    variants: tuple[Variant, ...], traces: list[Trace], bench: Bench, predictor: Predictor
) -> dict[str, Any]:
    return {
        "device_tokens_per_s": bench.device.tokens_per_s,
        "rtt_ms": bench.link.rtt_ms,
        "server": bench.server.name,
        "policies": {v.label: v.run(traces, bench, predictor).report() for v in variants},
    }


def _at_high_price(
    variants: tuple[Variant, ...], traces: list[Trace], predictor: Predictor
) -> dict[str, float]:
    """Draft tokens sent per committed token where the verifier asks a lot for each."""
    bench = Bench(Device("68", 68.0), Link(20.0), SERVERS[1], HIGH_PRICE)
    return {v.label: v.run(traces, bench, predictor).report()["verifier_tokens_per_token"] for v in variants}


# --- what it amounts to


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The claims, as figures: `gain` against the best fixed length of each cell in hindsight, and the rest."""
    gain_over_best, gain_over_predictor, ahead = [], [], []
    by_rtt: dict[float, list[float]] = {}
    wasted = {"gain": 0.0, "fixed:5": 0.0, "predictor": 0.0}
    served = []
    for cell in cells:
        of = cell["policies"]
        best = max(of[name]["tokens_per_s"] for name in FIXED)
        gain = of["gain"]["tokens_per_s"]
        gain_over_best.append(gain / best)
        gain_over_predictor.append(gain / of["predictor"]["tokens_per_s"])
        ahead.append(of["gain+ahead"]["tokens_per_s"] / gain)
        by_rtt.setdefault(cell["rtt_ms"], []).append(ahead[-1])
        served.append(of["gain+ahead+server"]["tokens_per_s"] / of["gain+ahead"]["tokens_per_s"])
        for name in wasted:
            wasted[name] += of[name]["wasted_ms_per_token"]
    return {
        "cells": len(cells),
        "gain_at_least_best_fixed": round(fmean(r >= 1.0 for r in gain_over_best), 4),
        "gain_over_best_fixed_min": round(min(gain_over_best), 4),
        "gain_over_best_fixed_mean": round(fmean(gain_over_best), 4),
        "gain_over_predictor_mean": round(fmean(gain_over_predictor), 4),
        "gain_over_predictor_min": round(min(gain_over_predictor), 4),
        "wasted_gain_over_fixed5": round(wasted["gain"] / wasted["fixed:5"], 4),
        "wasted_predictor_over_fixed5": round(wasted["predictor"] / wasted["fixed:5"], 4),
        "ahead_min": round(min(ahead), 4),
        "ahead_mean_by_rtt": {f"{rtt:g}": round(fmean(r), 4) for rtt, r in by_rtt.items()},
        "server_mode_min": round(min(served), 4),
        "server_mode_mean": round(fmean(served), 4),
    }


def _show(result: dict[str, Any]) -> None:
    console = Console()
    labels = [name for name in result["cells"][0]["policies"] if name not in FIXED]
    table = Table(title="tokens per second; in brackets drafting time wasted, ms per token")
    for name in ("device", "RTT", "server", "best fixed", *labels):
        table.add_column(name, justify="right")
    for cell in result["cells"]:
        of = cell["policies"]
        fixed = [name for name in FIXED if name in of]
        best = max(fixed, key=lambda name: of[name]["tokens_per_s"]) if fixed else ""
        row = [f"{cell['device_tokens_per_s']:g}", f"{cell['rtt_ms']:g}", cell["server"]]
        row.append(f"{of[best]['tokens_per_s']:.1f} ({best})" if best else "")
        row += [f"{of[n]['tokens_per_s']:.1f} [{of[n]['wasted_ms_per_token']:.1f}]" for n in labels]
        table.add_row(*(cell_text.replace("[", r"\[") for cell_text in row))
    console.print(table)
    for name, value in result["summary"].items():
        console.print(f"{name.replace('_', ' ')}: {value}")
