"""Two steps in flight in the simulator: the host's time is hidden, and every text is its script's."""

from __future__ import annotations

import pytest

from wisp.core.errors import ConfigError
from wisp.sim.report import Report, report
from wisp.sim.scenario import load_scenario
from wisp.sim.sim_verifier import HOST_S, host_s_of
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

SCENARIO = load_scenario("h200-qwen3-8b").with_devices(8).brief(0.5, 1.5, 20.0)


def run(of: str) -> Report:
    simulation = Simulation(SCENARIO, system(of), 1)
    simulation.run()  # raises if a token is not its script's
    return report(simulation)


def tpot_ms(of: str) -> float:
    ms: float = run(of).benchmark()["median_tpot_ms"]
    return ms


def test_served_sessions_gain_the_hosts_time() -> None:
    one, two = tpot_ms("central,depth=1"), tpot_ms("central,depth=2")
    host_ms = host_s_of(SCENARIO.profile, 8) * 1e3
    assert one - two == pytest.approx(host_ms, rel=0.2)


def test_drafting_sessions_lose_nothing() -> None:
    assert tpot_ms("wisp,depth=2") < 1.03 * tpot_ms("wisp,depth=1")


def test_the_host_takes_what_it_always_took_where_a_profile_does_not_say() -> None:
    assert host_s_of(load_scenario("a100-qwen3-32b").profile, 500) == HOST_S
    assert host_s_of(SCENARIO.profile, 64) > 2e-3


@pytest.mark.parametrize("wrong", ["wisp,depth=3", "wisp,depth=0", "wisp,depth=two"])
def test_a_verifier_has_one_or_two_steps_in_flight(wrong: str) -> None:
    with pytest.raises(ConfigError, match="steps"):
        system(wrong)
