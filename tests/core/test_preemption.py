"""Lending KV: who preempts, to whom, and that nobody is harmed by it."""

from __future__ import annotations

from wisp.core.verify.batching import Candidate, Kind
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.preemption import ENDING, is_urgent, slot_victims, victims

COST = CostModel(Coefficients(step=40.0, token=0.3))


def going(i: int, ahead_s: float, cached: int = 100, draft: int = 0, remaining: int = 100) -> Candidate:
    """A session that is so far ahead of its pace."""
    kind = Kind.VERIFY if draft else Kind.DECODE
    return Candidate(
        i, kind, 1 + draft, cached, draft, 0.0, float(i), due=ahead_s, tpot_s=0.1, remaining=remaining
    )


def prompt(i: int, new: int, due_s: float, cached: int = 0) -> Candidate:
    return Candidate(i, Kind.PREFILL, new, cached, 0, 0.0, float(i), due=due_s, tpot_s=0.1, first=True)


def chosen(*candidates: Candidate, free_kv: float) -> list[int]:
    return victims(0.0, candidates, free_kv, COST)


def test_who_is_furthest_ahead_lends_to_a_newcomer_who_cannot_wait() -> None:
    sessions = [going(1, 4.0), going(2, 20.0), going(3, 9.0)]
    assert chosen(*sessions, prompt(9, 80, 0.2), free_kv=10) == [2]
    assert chosen(*sessions, prompt(9, 180, 0.2), free_kv=10) == [2, 3]
    assert chosen(*sessions, prompt(9, 80, 0.2), free_kv=90) == []


def test_a_newcomer_who_can_wait_borrows_nothing() -> None:
    assert chosen(going(1, 20.0), prompt(9, 80, 2.9), free_kv=10) == []
    assert not is_urgent(0.0, prompt(9, 80, 2.9), COST)
    assert is_urgent(0.0, prompt(9, 8000, 2.9), COST)  # reading it takes 2.4 s


def test_who_has_no_due_time_lends_first_the_youngest_first_and_never_borrows() -> None:
    calm = [going(i, float("inf")) for i in (1, 2)]
    assert chosen(*calm, going(3, 20.0), prompt(9, 80, 0.2), free_kv=0) == [2]
    assert chosen(*calm, going(3, 20.0), prompt(9, 180, 0.2), free_kv=0) == [2, 1]
    assert not is_urgent(1e6, prompt(9, 80, float("inf")), COST)


def test_what_is_dear_to_read_again_is_lent_only_for_long() -> None:
    long_chat = going(1, 20.0, cached=2000)  # 0.6 s to read
    assert chosen(long_chat, going(2, 5.0), prompt(9, 80, 0.2), free_kv=0) == [2]
    assert chosen(going(1, 70.0, cached=2000), prompt(9, 80, 0.2), free_kv=0) == [1]


def test_who_is_about_to_end_or_only_just_ahead_keeps_its_own() -> None:
    assert chosen(going(1, 20.0, remaining=ENDING), going(2, 2.0), prompt(9, 80, 0.2), free_kv=5) == []


def test_drafts_borrow_from_those_far_ahead_but_not_from_those_who_need_theirs() -> None:
    drafts = [going(i, 0.5, draft=8) for i in range(1, 5)]
    assert chosen(*drafts, going(5, 20.0), free_kv=10) == [5]
    assert chosen(*drafts, free_kv=10) == []


def test_where_not_even_a_token_each_would_fit_those_least_behind_lend() -> None:
    assert chosen(going(1, 0.1), going(2, 0.5), going(3, 0.3), free_kv=1) == [2]
    assert chosen(going(1, 0.1), going(2, 0.5), going(3, 0.3), free_kv=0) == [2]


def test_nobody_lends_for_their_own_sake() -> None:
    assert chosen(going(1, 20.0, draft=8), free_kv=0) == []
    assert chosen(prompt(1, 500, 0.1, cached=100), free_kv=0) == []
    assert chosen(going(1, 0.1), going(2, 20.0, draft=8), free_kv=1) == []


def test_a_slot_is_lent_by_who_can_spare_it() -> None:
    assert slot_victims(0.0, [going(1, 4.0), going(2, 9.0)], COST) == [2, 1]
    assert slot_victims(0.0, [going(1, 2.0)], COST) == []


def test_rather_than_stand_still_somebody_lends_to_who_could_wait() -> None:
    half_read = Candidate(1, Kind.PREFILL, 200, 100, 0, 0.0, 1.0, due=20.0, tpot_s=0.1, remaining=100)
    assert chosen(half_read, prompt(9, 80, 2.9), free_kv=10) == [1]
    assert chosen(half_read, prompt(9, 80, 2.9), free_kv=90) == []


def test_a_short_prompt_that_has_no_kv_yet_is_not_under_way() -> None:
    """Else newcomers would take each other's slots before anything is read."""
    newcomer = going(9, float("inf"), cached=0)
    assert not is_urgent(0.0, newcomer, COST)
    assert slot_victims(0.0, [newcomer], COST) == []


def test_whose_own_need_is_large_is_passed_over() -> None:
    greedy, modest = going(1, 20.0, draft=60), going(2, 10.0)
    assert chosen(greedy, modest, free_kv=30) == [2]
