"""Preemption of KV: victims, and urgent candidates."""

from __future__ import annotations

from wisp.core.verify.batching import Candidate, Kind
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.preemption import ENDING, is_urgent, slot_victims, victims

COST = CostModel(Coefficients(step=40.0, token=0.3))


def going(i: int, ahead_s: float, cached: int = 100, draft: int = 0, remaining: int = 100) -> Candidate:
    """A session whose next token is due in `ahead_s`."""
    kind = Kind.VERIFY if draft else Kind.DECODE
    return Candidate(
        i, kind, 1 + draft, cached, draft, 0.0, float(i), due=ahead_s, tpot_s=0.1, remaining=remaining
    )


def prompt(i: int, new: int, due_s: float, cached: int = 0) -> Candidate:
    return Candidate(i, Kind.PREFILL, new, cached, 0, 0.0, float(i), due=due_s, tpot_s=0.1, first=True)


def chosen(*candidates: Candidate, free_kv: float) -> list[int]:
    return victims(0.0, candidates, free_kv, COST)


def test_sessions_with_most_slack_are_preempted_for_an_urgent_prompt() -> None:
    sessions = [going(1, 4.0), going(2, 20.0), going(3, 9.0)]
    assert chosen(*sessions, prompt(9, 80, 0.2), free_kv=10) == [2]
    assert chosen(*sessions, prompt(9, 180, 0.2), free_kv=10) == [2, 3]
    assert chosen(*sessions, prompt(9, 80, 0.2), free_kv=90) == []


def test_a_prompt_that_can_wait_preempts_nobody() -> None:
    assert chosen(going(1, 20.0), prompt(9, 80, 2.9), free_kv=10) == []
    assert not is_urgent(0.0, prompt(9, 80, 2.9), COST)
    assert is_urgent(0.0, prompt(9, 8000, 2.9), COST)  # its prefill takes 2.4 s


def test_sessions_without_slo_are_preempted_first() -> None:
    calm = [going(i, float("inf")) for i in (1, 2)]
    assert chosen(*calm, going(3, 20.0), prompt(9, 80, 0.2), free_kv=0) == [2]
    assert chosen(*calm, going(3, 20.0), prompt(9, 180, 0.2), free_kv=0) == [2, 1]
    assert not is_urgent(1e6, prompt(9, 80, float("inf")), COST)


def test_a_long_context_is_preempted_only_with_much_slack() -> None:
    long_chat = going(1, 20.0, cached=2000)  # a prefill of 0.6 s
    assert chosen(long_chat, going(2, 5.0), prompt(9, 80, 0.2), free_kv=0) == [2]
    assert chosen(going(1, 70.0, cached=2000), prompt(9, 80, 0.2), free_kv=0) == [1]


def test_a_session_about_to_end_or_with_little_slack_is_not_preempted() -> None:
    assert chosen(going(1, 20.0, remaining=ENDING), going(2, 2.0), prompt(9, 80, 0.2), free_kv=5) == []


def test_drafts_preempt_sessions_far_ahead_only() -> None:
    drafts = [going(i, 0.5, draft=8) for i in range(1, 5)]
    assert chosen(*drafts, going(5, 20.0), free_kv=10) == [5]
    assert chosen(*drafts, free_kv=10) == []


def test_without_kv_for_one_token_each_the_largest_slack_is_preempted() -> None:
    assert chosen(going(1, 0.1), going(2, 0.5), going(3, 0.3), free_kv=1) == [2]
    assert chosen(going(1, 0.1), going(2, 0.5), going(3, 0.3), free_kv=0) == [2]


def test_no_session_is_preempted_for_its_own_need() -> None:
    assert chosen(going(1, 20.0, draft=8), free_kv=0) == []
    assert chosen(prompt(1, 500, 0.1, cached=100), free_kv=0) == []
    assert chosen(going(1, 0.1), going(2, 20.0, draft=8), free_kv=1) == []


def test_slots_are_taken_from_sessions_with_enough_slack() -> None:
    assert slot_victims(0.0, [going(1, 4.0), going(2, 9.0)], COST) == [2, 1]
    assert slot_victims(0.0, [going(1, 2.0)], COST) == []


def test_if_nothing_runs_the_first_prompt_preempts_although_it_could_wait() -> None:
    half_read = Candidate(1, Kind.PREFILL, 200, 100, 0, 0.0, 1.0, due=20.0, tpot_s=0.1, remaining=100)
    assert chosen(half_read, prompt(9, 80, 2.9), free_kv=10) == [1]
    assert chosen(half_read, prompt(9, 80, 2.9), free_kv=90) == []


def test_a_short_prompt_without_kv_is_not_urgent() -> None:
    """Otherwise new sessions would take each other's slots before any prefill."""
    newcomer = going(9, float("inf"), cached=0)
    assert not is_urgent(0.0, newcomer, COST)
    assert slot_victims(0.0, [newcomer], COST) == []


def test_a_session_whose_own_need_exceeds_its_kv_is_no_victim() -> None:
    greedy, modest = going(1, 20.0, draft=60), going(2, 10.0)
    assert chosen(greedy, modest, free_kv=30) == [2]
