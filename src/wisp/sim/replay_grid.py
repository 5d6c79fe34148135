"""`wisp sim replay`: drafting policies over a grid of devices, links and verifiers, on traces kept out of training."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from wisp import __version__
from wisp.calibrate.traces.format import Trace, TraceSet, trace_folder
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.predictor import Predictor
from wisp.core.errors import ConfigError
from wisp.engines.build import read_predictor
from wisp.sim.devices import Device, Link, Server
from wisp.sim.replay import Bench, Tally, replay

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
        return Policies(self.spec, predictor, server_mode=self.server_mode)

    def run(self, traces: list[Trace], bench: Bench, predictor: Predictor) -> Tally:
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


@dataclass(frozen=True)
class Study:
    """What is replayed: policies on held-out traces, over the whole grid, with a predictor."""

    variants: tuple[Variant, ...]
    traces: list[Trace]
    predictor: Predictor

    @classmethod
    def load(cls, traces: Path, names: Sequence[str], predictor: Path | None, limit: int) -> Study:
        """Policies by name (none: all), and at most `limit` traces. Raises ConfigError."""
        variants, model = _chosen(names), read_predictor(predictor)
        held_out = _spread([t for t in TraceSet.load(trace_folder(traces)) if t.split != "train"], limit)
        if not held_out:
            raise ConfigError(f"{traces} has no traces that were kept apart from training")
        return cls(variants, held_out, model)

    def run(self, price: float) -> dict[str, Any]:
        """Tokens per second and wasted time of each policy in each cell, and a summary if all policies take part.

        price: what the verifier asks for a draft token, in committed tokens
        """
        console = Console(stderr=True)
        cells = [
            self._cell(Bench(Device(f"{speed:g}", speed), Link(rtt), server, price))
            for speed, rtt, server in track(
                list(itertools.product(SPEEDS, RTTS, SERVERS)), "replaying", console=console, transient=True
            )
        ]
        whole = self.variants == VARIANTS
        return {
            "wisp": __version__,
            "date": datetime.date.today().isoformat(),
            "traces": len(self.traces),
            "positions": sum(map(len, self.traces)),
            "price": price,
            "summary": summary(cells) if whole else {},
            "high_price": self._at_high_price() if whole else {},
            "cells": cells,
        }

    def _cell(self, bench: Bench) -> dict[str, Any]:
        return {
            "device_tokens_per_s": bench.device.tokens_per_s,
            "rtt_ms": bench.link.rtt_ms,
            "server": bench.server.name,
            "policies": {v.label: v.run(self.traces, bench, self.predictor).report() for v in self.variants},
        }

    def _at_high_price(self) -> dict[str, float]:
        """Draft tokens sent per committed token where the verifier asks a lot for each."""
        bench = Bench(Device("68", 68.0), Link(20.0), SERVERS[1], HIGH_PRICE)
        return {
            v.label: v.run(self.traces, bench, self.predictor).report()["verifier_tokens_per_token"]
            for v in self.variants
        }


def run_replay(
    traces: Path, names: Sequence[str], predictor: Path | None, *, price: float, limit: int, as_json: bool
) -> None:
    """Replay and report. Raises ConfigError."""
    result = Study.load(traces, names, predictor, limit).run(price)
    print(json.dumps(result)) if as_json else show(result)


def _chosen(names: Sequence[str]) -> tuple[Variant, ...]:
    if not names:
        return VARIANTS
    known = {v.label: v for v in VARIANTS}
    return tuple(known.get(name) or Variant(name, name) for name in names)


def _spread(traces: list[Trace], limit: int) -> list[Trace]:
    """So many, evenly from all domains and samplings."""
    step = max(1.0, len(traces) / limit)
    return [traces[int(i * step)] for i in range(min(limit, len(traces)))]


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


def show(result: dict[str, Any]) -> None:
    """Print a table of all cells, and the summary."""
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
    for name, value in in_words(result["summary"]):
        console.print(f"{name}: {value}")


def in_words(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each line of a summary: a name, and a value or the values by RTT."""
    for name, value in found.items():
        by_rtt = isinstance(value, dict)
        yield (
            name.replace("_", " "),
            ", ".join(f"{v} at {k} ms" for k, v in value.items()) if by_rtt else str(value),
        )
