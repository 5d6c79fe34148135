"""`make bench-ahead`: drafting ahead, measured, beside what a replay predicts of it."""

from __future__ import annotations

import asyncio
import datetime
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.pages import Data, render, table, write_data
from benchmarks.reality.distance import DelayedLine, PacedDraft
from benchmarks.reality.edge import Edge, Heard, Proposed, Story, verifier
from wisp import __version__
from wisp.calibrate.traces.format import Trace
from wisp.children import Child
from wisp.core.draft.policies import Ahead, Policies
from wisp.engines.base import DraftEngine
from wisp.engines.build import read_predictor
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.models import resolve
from wisp.sim.devices import Device, Link, Server
from wisp.sim.replay import Bench, replay

RTTS_MS = (5.0, 20.0, 60.0, 150.0)
DRAFT_MS = 15.0  # 67 tokens per second: a small accelerator
SPECS = ("fixed:4", "gain")
PAIR = ("tiny-target", "tiny-draft")
TEXTS = ("Tell me a story about Belomi.", "Where is the lamp?")


@dataclass(frozen=True)
class Figures:
    """Of device, loopback line and verifier, measured with no delay added: medians in milliseconds."""

    draft_ms: float
    line_ms: float  # there and back, with everything that is neither queue nor engine
    server_ms: float  # queue and engine

    @classmethod
    def of(cls, stories: Sequence[Story]) -> Figures:
        """From generations without drafting ahead, in which a draft goes out with its last token."""
        took, line, server = [], [], []
        for story in stories:
            sent = 0.0
            for event in story.events:
                if isinstance(event, Proposed):
                    took.append(event.took_ms)
                    sent = event.now_ms
                elif isinstance(event, Heard) and sent:
                    there = event.verdict.queue_ms + event.verdict.engine_ms
                    server.append(there)
                    line.append(event.arrived_ms - sent - there)
                    sent = 0.0
        return cls(median(took), median(line), median(server))

    def bench(self, rtt_ms: float) -> Bench:
        """The same for a replay, with `rtt_ms` between edge and verifier."""
        return Bench(
            Device("paced", 1e3 / self.draft_ms),
            Link(rtt_ms + self.line_ms),
            Server("tiny", self.server_ms, 0.0, prefill_ms=self.server_ms),
        )


def measure_ahead(
    rtts_ms: Sequence[float] = RTTS_MS,
    *,
    draft_ms: float = DRAFT_MS,
    repeats: int = 3,
    max_tokens: int = 40,
    progress: Console | None = None,
) -> dict[str, Any]:
    """Time per token with and without drafting ahead over lines of these round trips, and what a replay predicts.

    Off and on take turns, `repeats` times; medians are reported. Server mode is off.
    """
    traces = _recorded(max_tokens)
    engine = LlamaDraft(resolve(PAIR[1]), threads=1)
    paced = PacedDraft(engine, draft_ms)
    cells: list[dict[str, Any]] = []
    with verifier(PAIR[0]) as child:
        figures = Figures.of(_timed(child, paced, traces, "fixed:4", None, 0.0))
        for rtt in rtts_ms:
            for spec in SPECS:
                runs: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(repeats):
                    for on in (False, True):
                        stories = _timed(child, paced, traces, spec, Ahead() if on else None, rtt)
                        runs[on].append(_ms_per_token(stories))
                cells.append(_cell(spec, rtt, runs, figures.bench(rtt), traces))
                if progress is not None:
                    progress.print(json.dumps(cells[-1]))
    engine.close()
    return {
        "wisp": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m benchmarks ahead",
        "pair": PAIR,
        "draft_ms": draft_ms,
        "generations": len(traces),
        "max_tokens": max_tokens,
        "repeats": repeats,
        "figures": {k: round(v, 3) for k, v in asdict(figures).items()},
        "cells": cells,
    }


def _recorded(max_tokens: int) -> list[Trace]:
    from wisp.calibrate.traces.prompts import Prompt
    from wisp.calibrate.traces.record import Recording, Settings

    prompts = [Prompt(f"p{i}", "story", "train", text) for i, text in enumerate(TEXTS)]
    settings = Settings(max_tokens=max_tokens, mode="exact", group=len(prompts))
    target, draft = ((name, resolve(name)) for name in PAIR)
    with tempfile.TemporaryDirectory() as folder:
        return list(Recording(target, draft, prompts, settings, Path(folder) / "traces").run())


def _timed(
    child: Child, draft: DraftEngine, traces: Sequence[Trace], spec: str, ahead: Ahead | None, rtt_ms: float
) -> list[Story]:
    """A fresh edge generates what the traces have, over a line. Raises ValueError where the text is another."""
    policies = Policies(spec, read_predictor(), server_mode=False)

    async def generate() -> list[Story]:
        port = int(child.url.rsplit(":", 1)[1])
        async with DelayedLine(port, rtt_ms) as line, Edge(line.url, draft, policies, ahead) as edge:
            return [await edge.generate(t.prompt.tolist(), t.sampling, len(t)) for t in traces]

    stories = asyncio.run(generate())
    if any(s.tokens != t.target.tolist() for s, t in zip(stories, traces, strict=True)):
        raise ValueError(f"{spec}: the text is not the one that was recorded")
    return stories


def _ms_per_token(stories: Sequence[Story]) -> float:
    return sum(s.time_ms for s in stories) / sum(s.timed_tokens for s in stories)


def _cell(
    spec: str, rtt_ms: float, runs: dict[bool, list[float]], bench: Bench, traces: list[Trace]
) -> dict[str, Any]:
    measured = {on: median(some) for on, some in runs.items()}
    predicted = {}
    for on in (False, True):
        policies = Policies(spec, read_predictor(), server_mode=False)
        predicted[on] = 1e3 / replay(traces, bench, policies, Ahead() if on else None).tokens_per_s
    row: dict[str, Any] = {"policy": spec, "rtt_ms": rtt_ms}
    for on, name in ((False, "off"), (True, "ahead")):
        row[name] = {
            "measured_ms_per_token": round(measured[on], 2),
            "all_ms_per_token": [round(x, 2) for x in runs[on]],
            "tokens_per_s": round(1e3 / measured[on], 2),
            "predicted_ms_per_token": round(predicted[on], 2),
            "measured_over_predicted": round(measured[on] / predicted[on], 3),
        }
    row["speedup"] = round(measured[False] / measured[True], 3)
    row["predicted_speedup"] = round(predicted[False] / predicted[True], 3)
    return row


def run_ahead(out: Path | None, *, repeats: int, as_json: bool) -> None:
    """Measure and report; with `out`, write a page and its data into that folder."""
    result = measure_ahead(repeats=repeats, progress=Console(stderr=True))
    page = render("ahead", result, figures(result))
    if out is not None:
        write_data(out / "ahead.json", result)
        (out / "ahead.md").write_text(page)
    print(json.dumps(result) if as_json else page)


def figures(result: Data) -> Data:
    """The table of the page, and the largest error of a prediction."""
    errors = [abs(c[n]["measured_over_predicted"] - 1) for c in result["cells"] for n in ("off", "ahead")]
    head = ("policy", "RTT ms", "tokens/s", "with ahead", "speed-up", "predicted speed-up")
    per_token = ("ms/token measured (predicted)", "with ahead")
    return {"worst": max(errors), "speedups": table((*head, *per_token), map(_row, result["cells"]))}


def _row(c: Data) -> tuple[str, ...]:
    off, on = c["off"], c["ahead"]
    return (
        c["policy"],
        f"{c['rtt_ms']:g}",
        f"{off['tokens_per_s']:.1f}",
        f"{on['tokens_per_s']:.1f}",
        f"{c['speedup']:.2f}",
        f"{c['predicted_speedup']:.2f}",
        f"{off['measured_ms_per_token']:.1f} ({off['predicted_ms_per_token']:.1f})",
        f"{on['measured_ms_per_token']:.1f} ({on['predicted_ms_per_token']:.1f})",
    )
