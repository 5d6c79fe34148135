"""The fluid bound: what it must do when something gets better, and that no simulation gets past it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from wisp.calibrate.traces.scripts import library
from wisp.sim.fluid import Demand, bound, fluid_bound, operating_points
from wisp.sim.report import report
from wisp.sim.runs import clearly_missed
from wisp.sim.scenario import Kit, Scenario, SloClass, load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

LIBRARY = library(Path("data/traces"))
SCENARIO = load_scenario("a100-qwen3-32b").at_rate(16.0)
DEMAND = Demand(rate=16.0, prompt=130.0, output=200.0, draft_ms=10.0, rtt_ms=20.0, ttft_s=3.0)


def devices(demand: Demand = DEMAND, **profile: float) -> float:
    hardware = msgspec.structs.replace(SCENARIO.profile, **profile)
    return fluid_bound(hardware, operating_points(LIBRARY), demand).devices


def test_better_circumstances_never_carry_fewer() -> None:
    from dataclasses import replace

    usual = devices()
    assert devices(replace(DEMAND, draft_ms=2.0)) >= usual > devices(replace(DEMAND, draft_ms=60.0))
    assert devices(replace(DEMAND, rtt_ms=0.0)) > usual > devices(replace(DEMAND, rtt_ms=150.0))
    assert devices(replace(DEMAND, rate=8.0)) > usual > devices(replace(DEMAND, rate=25.0))
    assert devices(replace(DEMAND, prompt=20.0)) > usual > devices(replace(DEMAND, prompt=400.0))
    assert devices(tflops=600.0) > usual > devices(tflops=150.0)
    assert devices(bandwidth=4000.0) > usual > devices(bandwidth=1000.0)


def test_drafting_is_never_worse_than_serving_centrally() -> None:
    for rate in (2.0, 8.0, 16.0, 25.0):
        for speed in ("5", "20", "100"):
            scenario = msgspec.structs.replace(SCENARIO.at_rate(rate), devices=(Kit(speed, 60.0),))
            assert bound(scenario).devices >= bound(scenario, central=True).devices


def test_devices_that_draft_slower_than_their_users_read_are_served_centrally() -> None:
    slow = msgspec.structs.replace(SCENARIO, devices=(Kit("8", 60.0),))
    assert bound(slow).point.sent == 0.0
    assert bound(slow).devices == bound(slow, central=True).devices


def test_where_kv_is_scarce_the_bound_is_what_fits() -> None:
    scarce = msgspec.structs.replace(SCENARIO.at_rate(4.0), kv_tokens=2300)
    fit = bound(scarce, preempts=False)
    assert fit.limit == "kv"
    assert fit.devices == pytest.approx(
        10.0, abs=0.1
    )  # of 130 tokens of prompt and, on average, 100 of answer
    assert bound(scarce, central=True).devices == fit.devices


def test_lending_kv_stretches_it_and_no_further_than_time_allows() -> None:
    for kv in (2_300, 20_000, 37_000):
        scarce = msgspec.structs.replace(SCENARIO.at_rate(4.0), kv_tokens=kv)
        lent, fit, plenty = (
            bound(scarce).devices,
            bound(scarce, preempts=False).devices,
            bound(msgspec.structs.replace(scarce, kv_tokens=10**7)).devices,
        )
        assert fit < lent < plenty
    ample = msgspec.structs.replace(SCENARIO, kv_tokens=10**7)
    assert bound(ample).devices == bound(ample, preempts=False).devices


def test_an_answer_that_may_wait_as_long_as_it_takes_makes_room_for_another() -> None:
    # 200 tokens at 16 a second take 12.5 s.
    patient = msgspec.structs.replace(SCENARIO, slo=(SloClass(16.0, ttft_s=12.5),))
    assert bound(patient).waiting == pytest.approx(2 * bound(patient).devices)
    assert bound(patient).devices == bound(SCENARIO).devices


def test_a_mixed_fleet_lies_between_its_kinds() -> None:
    def of(*kits: Kit) -> float:
        return bound(msgspec.structs.replace(SCENARIO, devices=kits)).devices

    fast, slow = Kit("130", 10.0), Kit("30", 80.0)
    assert of(slow) < of(fast, slow) < of(fast)
    assert of(fast, fast) == pytest.approx(of(fast))
    mostly_fast = of(Kit("130", 10.0, share=9.0), slow)
    assert of(fast, slow) < mostly_fast < of(fast)


def test_careless_drafts_are_longer_and_commit_more() -> None:
    points = operating_points(LIBRARY)
    assert (points[0].sent, points[0].committed) == (0.0, 1.0)
    careful, careless = points[1], points[-1]
    assert careful.sent < careless.sent
    assert careful.committed < careless.committed
    assert all(p.sent <= p.drafted and p.committed <= p.sent + 1 for p in points)


def _misses(scenario: Scenario, spec: str) -> bool:
    simulation = Simulation(scenario, system(spec), 1)
    simulation.run(lambda running: clearly_missed(running, 0.1) is not None)
    return clearly_missed(simulation, 0.1) is not None or report(simulation).missed > 0.1


@pytest.mark.parametrize("spec", ["wisp", "paper", "central", "sled"])
def test_no_system_gets_past_the_bound_with_waiting(spec: str) -> None:
    brief = load_scenario("a100-qwen3-32b@1.3").at_rate(20.0).brief(15.0, 30.0, 30.0)
    most = bound(brief, central=spec == "central").waiting / 0.9  # a tenth might be served not at all
    assert _misses(brief.with_devices(round(1.1 * most)), spec)


def test_the_central_bound_can_nearly_be_reached() -> None:
    brief = load_scenario("a100-qwen3-32b@1.3").at_rate(20.0).brief(15.0, 30.0, 30.0)
    assert not _misses(brief.with_devices(round(0.7 * bound(brief, central=True).devices)), "central")
