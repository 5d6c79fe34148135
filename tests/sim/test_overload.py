"""Overload of sessions without drafts, on an engine whose step grows with each of them, in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.overload import hardware
from wisp.sim.report import Report, report
from wisp.sim.scenario import Kit, Scenario, SloClass
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

TOKENS, TPOT_MS = 48, 160.0
ONE_PER_S = 24 / 0.136 / TOKENS  # 24 sessions, whose steps take 136 ms


def offered(times: float, folder: Path) -> Report:
    profile = folder / "engine.toml"
    profile.write_text(hardware(40.0, 4.0, 64, 16_384))
    scenario = Scenario(
        "overload", str(profile), (SloClass(1e3 / TPOT_MS, 2.0),), (Kit("100", rtt_ms=1.0),),
        prompt_tokens=(40, 60), output_tokens=(TOKENS, TOKENS), max_output=TOKENS, arrivals_per_s=times * ONE_PER_S,
        warmup_s=20.0, window_s=60.0, drain_s=30.0,
    )  # fmt: skip
    simulation = Simulation(scenario, system("central-wisp"), 1)
    simulation.run()
    return report(simulation)


@pytest.mark.parametrize("times", [2.0, 5.0])
def test_overload_is_refused_and_the_admitted_are_in_time(times: float, tmp_path: Path) -> None:
    once, many = offered(1.0, tmp_path), offered(times, tmp_path)
    assert many.met >= 0.9 * (many.arrived - many.refused)
    assert many.goodput >= 0.9 * once.goodput
