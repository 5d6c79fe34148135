"""SLO admission: which sessions are admitted, as shares of engine and KV add up."""

from __future__ import annotations

import itertools
import random

import pytest

from wisp.core.protocol.messages import Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import Refusal
from wisp.core.verify.answers import Answers
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.events import Limits
from wisp.core.verify.session import Session
from wisp.core.verify.slo_admission import LONGEST_S, PROMISED, Demand, SloAdmission, keepable
from wisp.core.verify.states import State

COST = CostModel(Coefficients(step=40.0, token=0.3))
LATER = itertools.count(1.0)  # seconds; at each time all sessions are read again
QUICK = Slo(ttft_ms=3000.0, tpot_ms=62.5)
CALM = Slo(ttft_ms=3000.0, tpot_ms=500.0)


def session(i: int, slo: Slo | None = QUICK, prompt: int = 130, begun: bool = True) -> Session:
    open_ = Open(f"session-{i}", 0, [1] * prompt, Sampling(), 200, round=0, slo=slo)
    made = Session(i, "", 1, open_, 0.0)
    made.state = State.READY
    if begun:
        made.progress.chain.append(1)
        made.targets.first_at = 0.0
    return made


def limits(kv: int = 10**6) -> Limits:
    return Limits(1000, frozenset(), 1000, 8192, kv, 2048)


def admitted(
    sessions: list[Session],
    newcomer: Session,
    admission: SloAdmission,
    kv: int = 10**6,
    cost: CostModel = COST,
) -> bool:
    try:
        admission.check(next(LATER), sessions, newcomer, cost, limits(kv))
    except Refusal:
        return False
    return True


def n_admitted(
    admission: SloAdmission, slo: Slo | None = QUICK, kv: int = 10**6, cost: CostModel = COST
) -> int:
    """Sessions admitted, one after another."""
    inside: list[Session] = []
    while len(inside) < 500 and admitted(inside, session(1000, slo, begun=False), admission, kv, cost):
        inside.append(session(len(inside), slo))
    return len(inside)


def test_the_only_session_is_admitted_with_any_slo() -> None:
    assert admitted([], session(1, Slo(ttft_ms=1.0, tpot_ms=1.0), begun=False), SloAdmission(Answers()))


def test_a_session_with_a_lost_slo_no_longer_limits_the_step() -> None:
    """One client with an absurd SLO must not shut the others out."""
    absurd = session(1, Slo(ttft_ms=3000.0, tpot_ms=4.0))
    admission = SloAdmission(Answers())
    assert not admitted([absurd], session(2, CALM, begun=False), admission)
    absurd.relax(1.0)
    assert admitted([absurd], session(2, CALM, begun=False), admission)


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


def test_a_prompt_whose_kv_is_there_needs_no_reading() -> None:
    chat = session(1, Slo(ttft_ms=1000.0, tpot_ms=200.0), prompt=20_000, begun=False)
    assert not keepable(chat, COST)
    assert not admitted([session(2)], chat, SloAdmission(Answers()))
    chat.progress.at_hand = 19_990
    assert keepable(chat, COST)
    assert admitted([session(2)], chat, SloAdmission(Answers()))


def test_sessions_are_admitted_while_their_shares_of_the_engine_add_up_to_what_is_promised() -> None:
    """Without drafts. Each needs 130 rows for its prompt and 200 for its answer, in 200 x 62.5 ms and the time that
    others waited for their first token; all of them need a step of 40 ms every 62.5 ms."""
    answers = Answers()
    for waited_s in (0.0, 2.0):
        answers.ended(200, 12.5 + waited_s, waited_s)
        each = (130 + 200) * 0.3 / (answers.waited_s * 1e3 + 200 * 62.5)
        assert n_admitted(SloAdmission(answers)) == int((PROMISED - 40.0 / 62.5) / each + 1e-9)


def test_no_wait_counts_beyond_the_ttft_target() -> None:
    slow, target = Answers(), Answers()
    slow.ended(200, 100.0, 60.0)
    target.ended(200, 15.5, 3.0)
    assert n_admitted(SloAdmission(slow)) == n_admitted(SloAdmission(target))


def test_drafts_that_save_steps_admit_more_sessions() -> None:
    answers = Answers()
    few = n_admitted(SloAdmission(answers))
    for _ in range(1000):
        answers.verified(rows=3, committed=2)
    many = n_admitted(SloAdmission(answers))
    assert many > 1.3 * few
    for _ in range(100_000):
        answers.verified(rows=9, committed=1)  # all in vain
    assert n_admitted(SloAdmission(answers)) < few


def test_rows_beyond_the_knee_and_long_contexts_cost_more() -> None:
    plain = n_admitted(SloAdmission(Answers()))
    for costly in (
        Coefficients(step=40.0, token=0.3, beyond=0.3, knee=16),
        Coefficients(step=40.0, token=0.3, slice=0.2),
        Coefficients(step=40.0, token=0.3, cached=0.001),
        Coefficients(step=40.0, token=0.3, attention=0.001),
    ):
        assert 1 < n_admitted(SloAdmission(Answers()), cost=CostModel(costly)) < plain


def test_more_sessions_are_admitted_at_twice_the_tpot_target() -> None:
    quick = n_admitted(SloAdmission(Answers()))
    assert n_admitted(SloAdmission(Answers()), Slo(ttft_ms=3000.0, tpot_ms=125.0)) > 1.8 * quick


def test_the_fastest_user_says_how_many_steps_are_needed() -> None:
    calm = [session(i, CALM) for i in range(100)]
    assert admitted(calm, session(999, CALM, begun=False), SloAdmission(Answers()))
    assert not admitted(
        calm, session(999, Slo(ttft_ms=3000.0, tpot_ms=42.0), begun=False), SloAdmission(Answers())
    )


def test_a_refused_fast_user_keeps_no_others_out() -> None:
    """Also within the time for which the sessions' states are not read again."""
    calm, admission = [session(i, CALM) for i in range(100)], SloAdmission(Answers())
    fast = session(998, Slo(ttft_ms=3000.0, tpot_ms=42.0), begun=False)
    with pytest.raises(Refusal, match="pace"):
        admission.check(1.0, calm, fast, COST, limits())
    admission.check(1.0, calm, session(999, CALM, begun=False), COST, limits())


def test_sessions_are_admitted_while_their_contexts_fit_into_kv() -> None:
    """Each session has a context of 230 tokens on average."""
    assert n_admitted(SloAdmission(Answers()), Slo()) == 500
    assert n_admitted(SloAdmission(Answers()), Slo(), kv=2300) == 10
    assert n_admitted(SloAdmission(Answers()), kv=2300) == 10


def test_demand_follows_sessions_that_come_and_go() -> None:
    source = random.Random(5)
    admission = SloAdmission(Answers())
    inside = {
        i: session(i, source.choice((QUICK, Slo(), None)), begun=source.random() < 0.5) for i in range(40)
    }
    admission.check(1.0, inside.values(), session(99, Slo(), begun=False), COST, limits())
    for i in range(40, 120):
        if source.random() < 0.5:
            inside[i] = session(i, source.choice((QUICK, Slo(ttft_ms=900.0, tpot_ms=100.0))), begun=False)
            admission.entered(inside[i])
        else:
            admission.left(inside.pop(source.choice(list(inside))))
    found, anew = admission._demand, Demand(inside.values(), admission.answers)
    assert found is not None
    assert len(found) == len(anew)
    for name in ("kv", "unread", "prompt", "attention", "tokens", "context"):
        assert getattr(found, name) == pytest.approx(getattr(anew, name)), name


def test_states_of_sessions_are_read_again_after_a_tenth_of_a_second() -> None:
    unread = [session(i, CALM, 4000, begun=False) for i in range(4)]
    admission = SloAdmission(Answers())

    def refused(now: float) -> bool:
        try:
            admission.check(now, unread, session(99, CALM, begun=False), COST, limits())
        except Refusal:
            return True
        return False

    assert refused(1.0)
    for s in unread:
        s.progress.chain.append(1)
    assert refused(1.05)
    assert not refused(1.2)


def test_a_session_is_refused_if_waiting_prompts_make_its_first_token_late() -> None:
    unread = [session(i, CALM, 4000, begun=False) for i in range(2)]
    assert admitted(unread, session(9, CALM, begun=False), SloAdmission(Answers()))
    unread.append(session(2, CALM, 4000, begun=False))
    assert not admitted(unread, session(9, CALM, begun=False), SloAdmission(Answers()))
    patient = Slo(ttft_ms=10_000.0, tpot_ms=500.0)
    assert admitted(unread, session(9, patient, begun=False), SloAdmission(Answers()))


def test_prompts_of_sessions_that_lost_their_slos_are_in_the_way_of_no_first_token() -> None:
    unread = [session(i, CALM, 4000, begun=False) for i in range(4)]
    for s in unread:
        s.relax(1.0)
    assert admitted(unread, session(9, CALM, begun=False), SloAdmission(Answers()))


def waits(admission: SloAdmission, n: int) -> list[float]:
    """The Retry-After of so many refusals."""
    full, out = [session(i) for i in range(300)], []
    for i in range(n):
        with pytest.raises(Refusal) as refusal:
            admission.check(1.0, full, session(1000 + i, begun=False), COST, limits())
        assert refusal.value.code == "overloaded"
        out.append(refusal.value.retry_after)
    return out


def test_retry_after_grows_with_refusals_and_is_spread() -> None:
    admission = SloAdmission(Answers())
    few = waits(admission, 10)
    assert len(set(few)) == 10
    assert min(few) >= 1.0
    assert max(few) <= 1.5
    many = waits(admission, 300)
    assert 6.0 * max(few) < max(many) <= 1.5 * LONGEST_S


def test_retry_after_falls_with_sessions_that_end_and_a_crowd_is_forgotten() -> None:
    admission = SloAdmission(Answers())
    waits(admission, 10_000)
    for _ in range(1000):
        admission.left(session(999))
    assert max(waits(admission, 10)) <= 1.5
