"""`wisp sim run --html`: a simulated run in the page that shows live fleets, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wisp import __version__
from wisp.api.pages.site import self_contained
from wisp.sim.report import Report
from wisp.sim.scenario import Scenario
from wisp.sim.simulate import JUST_BEFORE_S, Simulation

ROWS = 600  # of a run's series, at most: more than a screen has points for


def row_s(scenario: Scenario) -> float:
    """Seconds of a row, so that ROWS are enough for warm-up, window and drain."""
    whole = scenario.warmup_s + scenario.window_s + scenario.drain_s
    return max(1.0, whole / ROWS)


class RunPage:
    """Looks on while a simulation runs. Make it before `run`, of a simulation that records rows."""

    def __init__(self, simulation: Simulation) -> None:
        recorder, env, s = simulation.verifier.recorder, simulation.env, simulation.scenario
        assert recorder is not None, "a simulation with row_s"
        self._simulation, self._recorder = simulation, recorder
        self._at_end: dict[str, Any] = {}  # of the window, where sessions are still at work
        end = s.warmup_s + s.window_s - JUST_BEFORE_S
        env.after(end, lambda: self._at_end.update(recorder.snapshot(env.now)))

    def write(self, path: Path, found: Report) -> None:
        """Write the page of a run that is over."""
        path.write_text(self_contained(self._data(found)), encoding="utf-8")

    def _data(self, found: Report) -> dict[str, Any]:
        simulation, s = self._simulation, self._simulation.scenario
        shot = self._recorder.snapshot(simulation.env.now)
        for row in shot["devices"]:
            device = simulation.devices[row["id"]]
            row["name"] = device.profile.name
            row["draft_per_s"] = row["draft_per_s"] or round(device.profile.tokens_per_s, 1)
        sessions = {name: self._at_end.get(name, shot[name]) for name in ("sessions", "n_sessions")}
        return {
            "kind": "run",
            "version": __version__,
            "state": "over",
            "title": s.title,
            "model": s.hardware,
            "batching": found.batching,
            "system": found.system,
            "seed": found.seed,
            "window": [s.warmup_s, s.warmup_s + s.window_s],
            "attainment": found.attainment,
            "goodput": found.goodput,
            **shot,
            **sessions,
        }
