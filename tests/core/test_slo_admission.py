"""Admission by forecast: who is let in, who is not, and how it learns from answers that were late."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from wisp.core.protocol.messages import Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.verify import slo_admission as forecast
from wisp.core.verify.admission import Refusal
from wisp.core.verify.cost import Coefficients, CostModel, Load
from wisp.core.verify.events import Limits
from wisp.core.verify.session import Session, State

COST = CostModel(Coefficients(step=40.0, token=0.3))
LATER = itertools.count(1.0)  # seconds: each time everybody is looked at anew
QUICK = Slo(ttft_ms=3000.0, tpot_ms=62.5)


def session(i: int, slo: Slo | None = QUICK, prompt: int = 130, begun: bool = True) -> Session:
    open_ = Open(f"session-{i}", 0, [1] * prompt, Sampling(), 200, round=0, slo=slo)
    made = Session(i, "", 1, open_, 0.0)
    made.state = State.READY
    if begun:
        made.progress.chain.append(1)
        made.targets.first_at = 0.0
    return made


def limits(kv: int = 10**6, slots: int = 1000) -> Limits:
    return Limits(1000, frozenset(), slots, 8192, kv, 2048)


def admitted(
    sessions: list[Session],
    newcomer: Session,
    told: forecast.SloAdmission,
    kv: int = 10**6,
    preempts: bool = False,
) -> bool:
    try:
        told.check(next(LATER), sessions, newcomer, COST, limits(kv), preempts=preempts)
    except Refusal:
        return False
    return True


def room(told: forecast.SloAdmission, slo: Slo | None = QUICK) -> int:
    """How many are let in, one after another."""
    inside: list[Session] = []
    while len(inside) < 500 and admitted(inside, session(1000, slo, begun=False), told):
        inside.append(session(len(inside), slo))
    return len(inside)


def test_who_is_alone_is_let_in_however_much_they_ask() -> None:
    assert admitted([], session(1, Slo(ttft_ms=1.0, tpot_ms=1.0), begun=False), forecast.SloAdmission())


def test_who_was_given_up_asks_for_half_and_sets_nobodys_pace() -> None:
    """One client with an absurd pace must not shut the others out."""
    absurd = session(1, Slo(ttft_ms=3000.0, tpot_ms=4.0))
    calm = Slo(ttft_ms=3000.0, tpot_ms=500.0)
    told = forecast.SloAdmission()
    assert not admitted([absurd], session(2, calm, begun=False), told)
    absurd.relax(1.0)
    assert admitted([absurd], session(2, calm, begun=False), told)


def test_what_nobody_could_keep_is_told_from_what_is_hard() -> None:
    for slo, possible in (
        (Slo(ttft_ms=1.0), False),
        (Slo(tpot_ms=0.001), False),
        (Slo(ttft_ms=200.0, tpot_ms=10.0), True),
        (Slo(), True),
        (None, True),
    ):
        assert forecast.keepable(session(1, slo), COST) is possible
    assert forecast.keepable(session(1, Slo(ttft_ms=1.0)), CostModel())  # nothing is known yet


def test_who_is_refused_is_told_when_to_come_back() -> None:
    with pytest.raises(Refusal) as refusal:
        forecast.SloAdmission().check(
            0.0, [session(i) for i in range(300)], session(999), COST, limits(), preempts=False
        )
    assert refusal.value.code == "overloaded"
    assert 1.0 <= refusal.value.retry_after <= 30.0


def test_there_is_more_room_at_half_the_pace() -> None:
    told = forecast.SloAdmission()
    quick, slow = room(told), room(told, Slo(ttft_ms=3000.0, tpot_ms=125.0))
    assert 20 < quick < 200
    assert slow > 1.8 * quick


def test_who_asks_for_no_pace_is_bounded_by_the_cache_alone() -> None:
    told = forecast.SloAdmission()
    assert room(told, Slo()) == 500
    inside = [session(i) for i in range(5)]
    assert not admitted(inside, session(9, begun=False), told, kv=1000)


def test_what_there_is_no_kv_for_may_be_lent_while_there_is_time_to_read_it_again() -> None:
    """Each of these has a context of 230 tokens, on average."""

    def fit(preempts: bool, **of: int) -> int:
        inside: list[Session] = []
        told = forecast.SloAdmission()
        calm = Slo(ttft_ms=3000.0, tpot_ms=250.0)
        while len(inside) < 500:
            try:
                told.check(
                    next(LATER),
                    inside,
                    session(999, calm, begun=False),
                    COST,
                    limits(**of),
                    preempts=preempts,
                )
            except Refusal:
                break
            inside.append(session(len(inside), calm))
        return len(inside)

    plenty = fit(True)
    assert fit(False) == plenty
    for scarce in ({"kv": 23_000}, {"slots": 100}):
        assert 112 < fit(True, **scarce) < plenty
    assert 100 <= fit(False, kv=23_000) <= 112
    assert fit(False, slots=100) == plenty  # they wait for a slot
    assert fit(True, kv=2_300) <= 21  # half of them at most


def test_between_two_looks_it_is_known_who_came_and_who_went() -> None:
    source = random.Random(5)
    told = forecast.SloAdmission()
    inside = {
        i: session(i, source.choice((QUICK, Slo(), None)), begun=source.random() < 0.5) for i in range(40)
    }
    told.check(1.0, inside.values(), session(99, begun=False), COST, limits(), preempts=True)
    for i in range(40, 120):
        if source.random() < 0.5:
            inside[i] = session(i, source.choice((QUICK, Slo(ttft_ms=900.0, tpot_ms=100.0))), begun=False)
            told.entered(inside[i])
        else:
            told.left(inside.pop(source.choice(list(inside))))
    found, anew = told._demand, forecast.Demand(inside.values(), told.answer_tokens)
    assert found is not None
    assert found.bearable_s == anew.bearable_s
    for name in ("sessions", "begun", "running", "behind", "unread", "kv", "rows", "decoding"):
        assert getattr(found, name) == pytest.approx(getattr(anew, name)), name


def test_those_let_in_count_at_once_and_how_they_fare_soon() -> None:
    told, inside = forecast.SloAdmission(), [session(i) for i in range(10)]

    def behind(now: float) -> bool:
        try:
            told.check(now, inside, session(99, begun=False), COST, limits(), preempts=True)
        except Refusal as refusal:
            return "behind" in str(refusal)
        return False

    assert not behind(1.0)
    for s in inside:
        s.speed.answered_at = 10.0
    assert not behind(1.05)
    assert behind(1.2)


def test_prompts_that_wait_to_be_read_keep_others_out() -> None:
    unread = [session(i, prompt=4000, begun=False) for i in range(4)]
    assert not admitted([session(8), *unread], session(9, begun=False), forecast.SloAdmission())


def test_late_answers_make_room_smaller_and_answers_in_time_larger_within_bounds() -> None:
    told = forecast.SloAdmission()
    before = room(told)
    for _ in range(20):
        told.ended(200, 12.0, in_time=False)
    assert room(told) < before
    for _ in range(1000):
        told.ended(200, 12.0, in_time=False)
    assert told.filled == forecast.LEAST_FILLED
    assert room(told) > 0.5 * before
    for _ in range(10_000):
        told.ended(200, 12.0, in_time=True)
    assert told.filled == forecast.MOST_FILLED


def test_it_rests_where_six_in_a_hundred_are_late() -> None:
    told = forecast.SloAdmission()
    for i in range(10_000):
        told.ended(200, 12.0, in_time=i % 50 >= 3)
    assert told.filled == pytest.approx(forecast.FILLED, abs=0.05)


def test_while_most_are_behind_nobody_else_is_let_in() -> None:
    behind = [session(i) for i in range(6)]
    for s in behind:
        s.speed.answered_at = 10.0
    assert all(s.lag_s > 0.0 for s in behind)
    assert not admitted(behind, session(9, begun=False), forecast.SloAdmission())


@pytest.mark.parametrize("knee", [0, 60])
@pytest.mark.parametrize("each", [0.0, 5.0])
def test_as_many_rows_as_are_said_to_fit_do_fit(knee: int, each: float) -> None:
    cost = CostModel(Coefficients(step=40.0, token=0.3, beyond=0.5, knee=knee, slice=each))
    rows = forecast.rows_in(cost, 150.0)
    slices = rows / forecast.ROWS_A_SLICE
    took = cost.ms(Load()) + 0.3 * rows + each * slices + (0.5 * max(0.0, rows - knee) if knee else 0.0)
    assert took == pytest.approx(150.0)
    assert forecast.rows_in(cost, 39.0) == 0.0
    assert math.isfinite(rows)


def test_the_more_are_turned_away_the_later_they_are_told_to_come_and_not_all_at_once() -> None:
    full = [session(i) for i in range(300)]
    told = forecast.SloAdmission()

    def waits(n: int) -> list[float]:
        out = []
        for i in range(n):
            with pytest.raises(Refusal) as refusal:
                told.check(1.0, full, session(1000 + i, begun=False), COST, limits(), preempts=False)
            out.append(refusal.value.retry_after)
        return out

    few = waits(10)
    assert len(set(few)) == 10
    assert max(few) <= 1.5 * min(few) + 1e-9
    for _ in range(60):
        waits(4)
        told.left(session(999))
    many = waits(10)
    assert len(set(many)) == 10
    assert 2.0 * max(few) < max(many) <= 30.0
    waits(2000)  # a crowd, however large, is forgotten
    for _ in range(100):
        told.left(session(999))
    assert max(waits(10)) <= 1.5 * 10.0 / 2.0 + 1e-9
