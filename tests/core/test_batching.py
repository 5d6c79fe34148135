"""The simple batching policies, by example."""

from __future__ import annotations

import pytest

from wisp.core.errors import ConfigError
from wisp.core.verify.batching import Candidate, Grant, Kind, StepLimits, batching_policy
from wisp.core.verify.batching.simple import Continuous, Fcfs


def work(
    session: int, kind: Kind, new: int, since: float = 0.0, opened: float = 0.0, key: str = ""
) -> Candidate:
    return Candidate(session, kind, new, 0, max(new - 1, 0), since, opened, key)


def test_continuous_takes_every_generation_and_fills_up_with_prompts() -> None:
    pending = [
        work(1, Kind.PREFILL, 100, opened=2.0),
        work(2, Kind.VERIFY, 5, since=1.0),
        work(3, Kind.PREFILL, 100, opened=1.0),
        work(4, Kind.DECODE, 1, since=0.5),
    ]
    plan = Continuous().plan(3.0, pending, StepLimits(tokens=120, slices=8))
    assert plan.grants == [Grant(4, 1), Grant(2, 5), Grant(3, 100), Grant(1, 14)]


def test_continuous_reserves_a_quarter_of_the_step_for_prompts() -> None:
    pending = [work(i, Kind.DECODE, 1, since=i) for i in range(40)] + [work(99, Kind.PREFILL, 500)]
    plan = Continuous().plan(0.0, pending, StepLimits(tokens=20, slices=64))
    assert [g.session for g in plan.grants] == [*range(15), 99]
    assert plan.grants[-1].tokens == 5


def test_continuous_serves_the_least_served_key_first() -> None:
    pending = [
        work(1, Kind.PREFILL, 30, opened=0.0, key="greedy"),
        work(2, Kind.PREFILL, 30, opened=9.0, key="modest"),
    ]
    limits = StepLimits(tokens=30, slices=8, shares={"greedy": 1000.0, "modest": 10.0})
    assert Continuous().plan(9.0, pending, limits).grants == [Grant(2, 30)]


def test_fcfs_keeps_the_order_of_arrival() -> None:
    pending = [work(1, Kind.VERIFY, 5, since=2.0), work(2, Kind.PREFILL, 30, since=1.0)]
    assert Fcfs().plan(3.0, pending, StepLimits(32, 8)).grants == [Grant(2, 30)]
    assert Fcfs().plan(3.0, pending, StepLimits(35, 8)).grants == [Grant(2, 30), Grant(1, 5)]


@pytest.mark.parametrize("name", ["continuous", "fcfs"])
def test_a_candidate_larger_than_a_step_runs_alone(name: str) -> None:
    plan = batching_policy(name).plan(0.0, [work(1, Kind.VERIFY, 50)], StepLimits(16, 8))
    assert plan.grants == [Grant(1, 50)]


@pytest.mark.parametrize("name", ["continuous", "fcfs"])
def test_no_more_slices_than_the_engine_has(name: str) -> None:
    pending = [work(i, Kind.DECODE, 1) for i in range(9)]
    assert len(batching_policy(name).plan(0.0, pending, StepLimits(100, 4)).grants) == 4


def test_without_candidates_the_plan_is_empty() -> None:
    assert Continuous().plan(0.0, [], StepLimits(100, 4)).grants == []


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="continuous, fcfs"):
        batching_policy("magic")


def test_wisp_keep_is_wisp_without_preemption() -> None:
    assert batching_policy("wisp").preempts
    keeps = batching_policy("wisp:keep")
    assert (keeps.name, keeps.preempts) == ("wisp", False)
