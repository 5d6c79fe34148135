"""SLO admission: admitted and refused sessions, and what is learned from answers."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from wisp.core.protocol.messages import Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import Refusal
from wisp.core.verify.answers import Answers
from wisp.core.verify.cost import Coefficients, CostModel, Load
from wisp.core.verify.events import Limits
from wisp.core.verify.session import Session
from wisp.core.verify.slo_admission import (
    FILLED,
    LEAST_FILLED,
    MOST_FILLED,
    ROWS_A_SLICE,
    Demand,
    SloAdmission,
    keepable,
    rows_in,
)
from wisp.core.verify.states import State

COST = CostModel(Coefficients(step=40.0, token=0.3))
LATER = itertools.count(1.0)  # seconds; at each time all sessions are read again
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
    admission: SloAdmission,
    kv: int = 10**6,
    preempts: bool = False,
) -> bool:
    try:
        admission.check(next(LATER), sessions, newcomer, COST, limits(kv), preempts=preempts)
    except Refusal:
        return False
    return True


def n_admitted(admission: SloAdmission, slo: Slo | None = QUICK) -> int:
    """Sessions admitted, one after another."""
    inside: list[Session] = []
    while len(inside) < 500 and admitted(inside, session(1000, slo, begun=False), admission):
        inside.append(session(len(inside), slo))
    return len(inside)


def test_the_only_session_is_admitted_with_any_slo() -> None:
    assert admitted([], session(1, Slo(ttft_ms=1.0, tpot_ms=1.0), begun=False), SloAdmission(Answers()))


def test_a_session_with_a_lost_slo_no_longer_limits_the_step() -> None:
    """One client with an absurd SLO must not shut the others out."""
    absurd = session(1, Slo(ttft_ms=3000.0, tpot_ms=4.0))
    calm = Slo(ttft_ms=3000.0, tpot_ms=500.0)
    admission = SloAdmission(Answers())
    assert not admitted([absurd], session(2, calm, begun=False), admission)
    absurd.relax(1.0)
    assert admitted([absurd], session(2, calm, begun=False), admission)


def test_infeasible_slos_are_told_from_hard_ones() -> None:
    for slo, possible in (
        (Slo(ttft_ms=1.0), False),
        (Slo(tpot_ms=0.001), False),
        (Slo(ttft_ms=200.0, tpot_ms=10.0), True),
        (Slo(), True),
        (None, True),
    ):
        assert keepable(session(1, slo), COST) is possible
    assert keepable(session(1, Slo(ttft_ms=1.0)), CostModel())  # nothing is known yet


def test_a_refusal_has_a_retry_after() -> None:
    with pytest.raises(Refusal) as refusal:
        SloAdmission(Answers()).check(
            0.0, [session(i) for i in range(300)], session(999), COST, limits(), preempts=False
        )
    assert refusal.value.code == "overloaded"
    assert 1.0 <= refusal.value.retry_after <= 30.0


def test_more_sessions_are_admitted_at_twice_the_tpot_target() -> None:
    admission = SloAdmission(Answers())
    quick, slow = n_admitted(admission), n_admitted(admission, Slo(ttft_ms=3000.0, tpot_ms=125.0))
    assert 20 < quick < 200
    assert slow > 1.8 * quick


def test_sessions_without_targets_are_limited_by_kv_alone() -> None:
    admission = SloAdmission(Answers())
    assert n_admitted(admission, Slo()) == 500
    inside = [session(i) for i in range(5)]
    assert not admitted(inside, session(9, begun=False), admission, kv=1000)


def test_preemption_admits_more_sessions_than_kv_or_slots() -> None:
    """Each session has a context of 230 tokens on average."""

    def fit(preempts: bool, **of: int) -> int:
        inside: list[Session] = []
        admission = SloAdmission(Answers())
        calm = Slo(ttft_ms=3000.0, tpot_ms=250.0)
        while len(inside) < 500:
            try:
                admission.check(
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
    assert fit(False, slots=100) == plenty  # sessions wait for a slot
    assert fit(True, kv=2_300) <= 21  # half of them at most


def test_demand_follows_sessions_that_come_and_go() -> None:
    source = random.Random(5)
    admission = SloAdmission(Answers())
    inside = {
        i: session(i, source.choice((QUICK, Slo(), None)), begun=source.random() < 0.5) for i in range(40)
    }
    admission.check(1.0, inside.values(), session(99, begun=False), COST, limits(), preempts=True)
    for i in range(40, 120):
        if source.random() < 0.5:
            inside[i] = session(i, source.choice((QUICK, Slo(ttft_ms=900.0, tpot_ms=100.0))), begun=False)
            admission.entered(inside[i])
        else:
            admission.left(inside.pop(source.choice(list(inside))))
    found, anew = admission._demand, Demand(inside.values(), admission.answers.tokens)
    assert found is not None
    assert found.bearable_s == anew.bearable_s
    for name in ("sessions", "begun", "running", "behind", "unread", "kv", "rows", "decoding"):
        assert getattr(found, name) == pytest.approx(getattr(anew, name)), name


def test_states_of_sessions_are_read_again_after_a_tenth_of_a_second() -> None:
    admission, inside = SloAdmission(Answers()), [session(i) for i in range(10)]

    def behind(now: float) -> bool:
        try:
            admission.check(now, inside, session(99, begun=False), COST, limits(), preempts=True)
        except Refusal as refusal:
            return "behind" in str(refusal)
        return False

    assert not behind(1.0)
    for s in inside:
        s.speed.answered_at = 10.0
    assert not behind(1.05)
    assert behind(1.2)


def test_waiting_prompts_keep_new_sessions_out() -> None:
    unread = [session(i, prompt=4000, begun=False) for i in range(4)]
    assert not admitted([session(8), *unread], session(9, begun=False), SloAdmission(Answers()))


def test_missed_slos_lower_the_promised_capacity_and_met_ones_raise_it_within_bounds() -> None:
    admission = SloAdmission(Answers())
    before = n_admitted(admission)
    for _ in range(20):
        admission.ended(in_time=False)
    assert n_admitted(admission) < before
    for _ in range(1000):
        admission.ended(in_time=False)
    assert admission.filled == LEAST_FILLED
    assert n_admitted(admission) > 0.5 * before
    for _ in range(10_000):
        admission.ended(in_time=True)
    assert admission.filled == MOST_FILLED


def test_promised_capacity_is_stable_at_six_missed_slos_in_a_hundred() -> None:
    admission = SloAdmission(Answers())
    for i in range(10_000):
        admission.ended(in_time=i % 50 >= 3)
    assert admission.filled == pytest.approx(FILLED, abs=0.05)


def test_an_slo_that_was_given_up_too_soon_is_no_missed_one() -> None:
    made = session(1)  # its first token left at 0; the target is 16 tokens a second
    made.relax(5.0)
    assert made.targets.in_time(12.4, 200)
    assert not made.targets.in_time(12.5, 200)


def test_no_session_is_admitted_while_most_lag() -> None:
    behind = [session(i) for i in range(6)]
    for s in behind:
        s.speed.answered_at = 10.0
    assert all(s.lag_s > 0.0 for s in behind)
    assert not admitted(behind, session(9, begun=False), SloAdmission(Answers()))


@pytest.mark.parametrize("knee", [0, 60])
@pytest.mark.parametrize("each", [0.0, 5.0])
def test_the_rows_of_a_step_take_exactly_its_time(knee: int, each: float) -> None:
    cost = CostModel(Coefficients(step=40.0, token=0.3, beyond=0.5, knee=knee, slice=each))
    rows = rows_in(cost, 150.0)
    slices = rows / ROWS_A_SLICE
    took = cost.ms(Load()) + 0.3 * rows + each * slices + (0.5 * max(0.0, rows - knee) if knee else 0.0)
    assert took == pytest.approx(150.0)
    assert rows_in(cost, 39.0) == 0.0
    assert math.isfinite(rows)


def test_retry_after_grows_with_refusals_and_is_spread() -> None:
    full = [session(i) for i in range(300)]
    admission = SloAdmission(Answers())

    def waits(n: int) -> list[float]:
        out = []
        for i in range(n):
            with pytest.raises(Refusal) as refusal:
                admission.check(1.0, full, session(1000 + i, begun=False), COST, limits(), preempts=False)
            out.append(refusal.value.retry_after)
        return out

    few = waits(10)
    assert len(set(few)) == 10
    assert max(few) <= 1.5 * min(few) + 1e-9
    for _ in range(60):
        waits(4)
        admission.left(session(999))
    many = waits(10)
    assert len(set(many)) == 10
    assert 2.0 * max(few) < max(many) <= 30.0
    waits(2000)  # a crowd, however large, is forgotten
    for _ in range(100):
        admission.left(session(999))
    assert max(waits(10)) <= 1.5 * 10.0 / 2.0 + 1e-9
