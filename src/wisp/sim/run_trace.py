"""The trace of a run: for chrome://tracing, or as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wisp.core.protocol.slo import met
from wisp.sim.simulate import Simulation


def chrome_trace(simulation: Simulation) -> str:
    """A traced simulation for chrome://tracing: the verifier's steps, each device's drafts and waits."""
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
        for pid, name in ((0, "verifier"), (1, "devices drafting"), (2, "devices waiting"))
    ]
    for e in simulation.shared.trace or ():
        sessions = {"sessions": e.sessions} if e.what == "step" else {}
        events.append(
            {
                "name": e.what,
                "ph": "X",
                "ts": round(e.at * 1e6),
                "dur": round(e.ms * 1e3),
                "pid": {"step": 0, "draft": 1}.get(e.what, 2),
                "tid": e.device,
                "args": sessions | {"tokens": e.tokens},
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def draw(simulation: Simulation, path: Path) -> None:
    """Plot each request of a traced run at its arrival, and the sizes of steps over time."""
    from wisp.sim.plots import ACCEPTED, OWN, REJECTED, pyplot

    plt = pyplot()
    figure, (first, pace, steps) = plt.subplots(3, 1, figsize=(10, 7.5), sharex=True)
    now = simulation.env.now
    served = [r.served() for r in simulation.requests if r.tokens > 1]
    colours = [ACCEPTED if met(s, now) else REJECTED for s in served]
    arrived = [s.arrived for s in served]
    first.scatter(arrived, [s.ttft_ms for s in served], s=8, c=colours)
    first.set_ylabel("TTFT (ms)")
    first.set_title("requests at their arrival; green met their SLO", loc="left", fontsize=9)
    pace.scatter(arrived, [s.tpot_ms for s in served], s=8, c=colours)
    for slo in simulation.scenario.slo:
        pace.axhline(slo.slo.tpot_ms, lw=0.8, color="black")
    pace.set_ylabel("TPOT (ms)")
    runs = [e for e in simulation.shared.trace or () if e.what == "step"]
    steps.plot([e.at for e in runs], [e.tokens for e in runs], lw=0.5, color=OWN)
    steps.set_ylabel("tokens a step")
    steps.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
