"""Gaps, stalls and late tokens, from token times made by hand; and what a run's report says of them."""

from __future__ import annotations

import msgspec
import pytest

from wisp.sim.report import report
from wisp.sim.scenario import load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.smooth import pace
from wisp.sim.systems import system

SMALL = load_scenario("a100-qwen3-32b").at_rate(12.0).with_devices(4).brief(3.0, 8.0, 30.0)
HEARD = [(10.0, 1), (10.1, 2), (10.5, 5), (10.6, 6)]  # tokens 0; 1; 2 to 4; 5, counted from 0


def test_tokens_on_time_are_neither_late_nor_a_stall() -> None:
    on_time = pace([(1.0 + 0.1 * i, i + 1) for i in range(20)], 100.0)
    assert (on_time.late, on_time.tokens) == (0, 19)
    assert on_time.longest_stall_ms == pytest.approx(0.0, abs=1e-3)
    assert on_time.longest_gap_ms == pytest.approx(100.0)


def test_a_stall_is_the_lateness_of_the_first_token_that_was_waited_for() -> None:
    found = pace(HEARD, 100.0)  # token 2 was due at 10.2, 3 at 10.3, 4 at 10.4, 5 at 10.5
    assert found.longest_stall_ms == pytest.approx(300.0, abs=1e-3)
    assert found.longest_gap_ms == pytest.approx(400.0)
    assert (found.late, found.tokens) == (4, 5)


def test_one_late_message_may_bring_tokens_that_are_not_late() -> None:
    assert pace([(0.0, 1), (0.25, 5)], 100.0).late == 2  # tokens 1 and 2; 3 and 4 were due at 0.3 and 0.4


def test_being_ahead_is_no_stall_however_long_the_gap() -> None:
    found = pace([(0.0, 1), (0.1, 31), (2.9, 32)], 100.0)
    assert (found.longest_stall_ms, found.late) == (0.0, 0)
    assert found.longest_gap_ms == pytest.approx(2800.0)


def test_without_a_target_nothing_is_late() -> None:
    assert pace(HEARD, 0.0)[1:3] == (0.0, 0)


def test_an_answer_that_goes_on_counts_what_is_missing_by_now() -> None:
    found = pace(HEARD, 100.0, waiting_until=12.0)
    assert found.longest_gap_ms == pytest.approx(1400.0)
    assert found.longest_stall_ms == pytest.approx(1400.0)  # token 6 was due at 10.6
    assert found.late == 4  # it is not there, so it is not counted


def test_one_token_alone_has_no_pace() -> None:
    assert pace([(5.0, 1)], 100.0) == (0.0, 0.0, 0, 0)


@pytest.mark.parametrize(("spec", "drafts"), [("central", False), ("wisp", True)])
def test_a_report_says_how_smoothly_answers_came(spec: str, drafts: bool) -> None:
    simulation = Simulation(SMALL, system(spec), 1)
    simulation.run()
    found = report(simulation)
    requests = [r for r in simulation.window() if r.tokens]
    assert found.longest_gap_ms.median in [round(max(r.gaps_ms), 3) for r in requests]
    assert found.draft_steps_per_token is not None
    assert (found.draft_steps_per_token > 0.5) == drafts
    assert found.late_tokens is not None
    assert 0.0 <= found.late_tokens < 0.2
    flat = found.benchmark()
    assert flat["median_longest_stall_ms"] <= flat["p99_longest_stall_ms"]
    assert {"median_longest_gap_ms", "late_tokens", "draft_steps_per_token"} <= flat.keys()


def test_users_that_expect_more_than_there_is_see_late_tokens() -> None:
    hurried = Simulation(SMALL.at_rate(100.0), system("central"), 1)
    hurried.run()
    found = report(hurried)
    assert found.late_tokens == 1.0
    assert (found.longest_stall_ms.median or 0.0) > 1000.0
    assert msgspec.json.decode(msgspec.json.encode(found.benchmark()))["late_tokens"] == 1.0
