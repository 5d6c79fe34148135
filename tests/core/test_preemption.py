"""Residents: the sessions that hold KV when it does not suffice for all. And no two take it from each other in turn."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rig import Rig
from toy import toy_text
from wisp.core.protocol.messages import Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.verify.batching import Candidate, Kind
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.preemption import ENDING, Claims, is_urgent, residents, slot_victims

COST = CostModel(Coefficients(step=40.0, token=0.3))


def going(i: int, ahead_s: float, cached: int = 100, draft: int = 0, remaining: int = 100) -> Candidate:
    """A session whose next token is due in `ahead_s`."""
    kind = Kind.VERIFY if draft else Kind.DECODE
    return Candidate(
        i, kind, 1 + draft, cached, draft, 0.0, float(i), due=ahead_s, tpot_s=0.1, remaining=remaining
    )


def prompt(i: int, new: int, due_s: float, cached: int = 0, key: str = "") -> Candidate:
    return Candidate(i, Kind.PREFILL, new, cached, 0, 0.0, float(i), key, due=due_s, tpot_s=0.1, first=True)


def chosen(*candidates: Candidate, free: int = 0, claims: Claims | None = None) -> list[int]:
    """The residents, with `free` KV tokens beyond those that the candidates have."""
    found = residents(candidates, sum(c.cached for c in candidates) + free, claims or Claims(0.0, COST))
    assert sorted(c.session for c in found.resident + found.others) == sorted(c.session for c in candidates)
    return sorted(c.session for c in found.resident)


def victims(*candidates: Candidate, free: int = 0) -> list[int]:
    """Those that are not resident although they have KV, the first victim first."""
    found = residents(candidates, sum(c.cached for c in candidates) + free, Claims(0.0, COST))
    return [c.session for c in reversed(found.others) if c.cached]


def test_sessions_with_most_slack_are_preempted_for_an_urgent_prompt() -> None:
    sessions = [going(1, 4.0), going(2, 20.0), going(3, 9.0)]
    assert victims(*sessions, prompt(9, 80, 0.2), free=10) == [2]
    assert victims(*sessions, prompt(9, 180, 0.2), free=10) == [2, 3]
    assert victims(*sessions, prompt(9, 80, 0.2), free=90) == []


def test_a_prompt_that_can_wait_preempts_nobody() -> None:
    assert chosen(going(1, 20.0), prompt(9, 80, 2.9), free=10) == [1]
    assert not is_urgent(0.0, prompt(9, 80, 2.9), COST)
    assert is_urgent(0.0, prompt(9, 8000, 2.9), COST)  # its prefill takes 2.4 s


def test_sessions_without_slo_are_preempted_first() -> None:
    calm = [going(i, math.inf) for i in (1, 2)]
    assert victims(*calm, going(3, 20.0), prompt(9, 80, 0.2)) == [2]
    assert victims(*calm, going(3, 20.0), prompt(9, 180, 0.2)) == [2, 1]
    assert not is_urgent(1e6, prompt(9, 80, math.inf), COST)


def test_a_long_context_is_preempted_only_with_much_slack() -> None:
    long_chat = going(1, 20.0, cached=2000)  # a prefill of 0.6 s
    assert victims(long_chat, going(2, 5.0), prompt(9, 80, 0.2)) == [2]
    assert victims(going(1, 70.0, cached=2000), prompt(9, 80, 0.2)) == [1]


def test_a_session_about_to_end_or_with_little_slack_is_not_preempted() -> None:
    assert victims(going(1, 20.0, remaining=ENDING), going(2, 2.0), prompt(9, 80, 0.2), free=5) == []


def test_drafts_preempt_sessions_far_ahead_and_are_cut_otherwise() -> None:
    drafts = [going(i, 0.5, draft=8) for i in range(1, 5)]
    assert victims(*drafts, going(5, 20.0), free=10) == [5]
    found = residents(drafts, 4 * 100 + 15, Claims(0.0, COST))
    assert [(c.session, c.new, c.n_draft) for c in found.resident] == [
        (1, 9, 8),
        (2, 4, 3),
        (3, 1, 0),
        (4, 1, 0),
    ]


def test_without_kv_for_one_token_each_the_largest_slack_is_preempted() -> None:
    assert victims(going(1, 0.1), going(2, 0.5), going(3, 0.3), free=1) == [2]
    assert victims(going(1, 0.1), going(2, 0.5), going(3, 0.3)) == [2]


def test_slots_are_taken_from_sessions_with_enough_slack() -> None:
    assert slot_victims(0.0, [going(1, 4.0), going(2, 9.0)], COST) == [2, 1]
    assert slot_victims(0.0, [going(1, 2.0)], COST) == []


def test_a_prompt_that_was_begun_goes_on_before_one_that_was_not() -> None:
    half_read = Candidate(1, Kind.PREFILL, 200, 100, 0, 0.0, 1.0, due=20.0, tpot_s=0.1, remaining=100)
    assert chosen(half_read, prompt(9, 80, 2.9), free=200) == [1]
    assert chosen(half_read, prompt(9, 80, 2.9), free=280) == [1, 9]


def test_a_short_prompt_without_kv_is_not_urgent() -> None:
    """Otherwise new sessions would take each other's slots before any prefill."""
    newcomer = going(9, math.inf, cached=0)
    assert not is_urgent(0.0, newcomer, COST)
    assert slot_victims(0.0, [newcomer], COST) == []


def test_what_is_taken_for_a_prompt_is_not_given_to_another() -> None:
    """An urgent prompt that does not fit yet is waited for, by those without KV."""
    long, short = prompt(8, 300, 0.1), prompt(9, 20, math.inf)
    assert chosen(going(1, 0.5), long, short, free=50) == [1]
    assert chosen(going(1, math.inf), long, short, free=210) == [8]


def test_of_prompts_that_are_equally_due_the_least_served_key_is_first() -> None:
    rich, poor = prompt(1, 50, math.inf, key="rich"), prompt(2, 50, math.inf, key="poor")
    claims = Claims(0.0, COST, shares={"rich": 9.0, "poor": 1.0})
    assert chosen(rich, poor, free=60, claims=claims) == [2]


def test_a_first_token_that_is_late_gives_way_to_one_that_can_be_in_time() -> None:
    late, early = prompt(7, 50, 9.0), prompt(8, 50, 10.5)  # due 2 and 2.5 seconds after they were opened
    now = Claims(10.0, COST)
    assert now.rank(early) < now.rank(late) < now.rank(going(6, math.inf))
    before = now._replace(now=8.9)
    assert before.rank(late) < before.rank(early)


def test_of_sessions_without_kv_those_without_a_first_token_come_first() -> None:
    again = Candidate(1, Kind.PREFILL, 50, 0, 0, 0.0, 1.0, due=0.1, tpot_s=0.1, remaining=100)
    assert chosen(again, prompt(2, 50, 0.5), free=60) == [2]


def test_kv_of_sessions_in_flight_stays_and_silent_sessions_are_last() -> None:
    flying, due = going(1, math.inf), going(2, 0.1)
    claims = Claims(0.0, COST, fixed={1}, idle=lambda session: session == 2)
    assert [c.session for c in sorted([due, flying, prompt(3, 9, 99.0)], key=claims.rank)] == [1, 3, 2]


# --- no session waits for ever

SLOS = (None, None, Slo(400.0, 60.0), Slo(500.0, 1000.0), Slo(0.0, 50.0))
SEEDED = Sampling(seed=3)


class Asked(NamedTuple):
    """A session: its tokens, the step before which it is opened, and those at which its edge is lost and back."""

    prompt: int
    answer: int
    slo: Slo | None
    key: str
    at: int
    lost: int = -1
    back: int = -1

    def opening(self, i: int, epoch: int, n_committed: int) -> Open:
        words = [(i * 7 + j) % 40 for j in range(self.prompt)]
        text = toy_text(words, SEEDED, self.answer)
        return Open(
            f"session-{i}",
            epoch,
            words,
            SEEDED,
            self.answer,
            committed=text[:n_committed],
            slo=self.slo,
            serve=True,
            ignore_eos=True,
        )


def serve(rig: Rig, asks: list[Asked]) -> None:
    """Serve them all. While nothing else happens, some session commits a token whenever all prompts could have been
    read anew, one after another."""
    bound = sum(-(-(a.prompt + a.answer) // rig.limits.step_tokens) + 1 for a in asks)
    heard = [0] * len(asks)  # tokens that the edge has when it is back
    barren = step = 0
    while step <= max(max(a.at, a.back) for a in asks) or rig.verifier.sessions:
        sessions = {s.id: s for s in rig.verifier.sessions.values()}
        for i, a in enumerate(asks):
            mine = sessions.get(f"session-{i}")
            if step == a.at:
                rig.receive(a.opening(i, 0, 0), i, a.key)
            elif step == a.lost and mine is not None:
                rig.lose(i)
            elif step == a.back and mine is not None and mine.connection < 0:
                heard[i] = mine.n_committed
                rig.receive(a.opening(i, 1, heard[i]), i, a.key)
            else:
                continue
            barren = 0
        before = {s.handle: s.n_committed for s in rig.verifier.sessions.values() if s.connection >= 0}
        if rig.dispatch():
            rig.finish()
        rig.now += 0.09  # soon all are late
        after = rig.verifier.sessions
        same = all(h in after and after[h].n_committed == n for h, n in before.items())
        barren = barren + 1 if before and same else 0
        assert barren <= bound, f"nothing was committed in {barren} steps"
        step += 1
    for i, a in enumerate(asks):
        if i in rig.sent:  # it did not end while its edge was away
            assert rig.text(i) == toy_text(a.opening(i, 0, 0).prompt, SEEDED, a.answer)[heard[i] :]


def asked(at: int = 4) -> st.SearchStrategy[Asked]:
    return st.builds(
        Asked,
        st.integers(40, 60),  # no two fit beside each other, or just two
        st.sampled_from([1, 2, 30]),
        st.sampled_from(SLOS),
        st.sampled_from("ab"),
        st.integers(0, at),
        st.integers(at + 1, 40),
        st.integers(41, 60),
    )


@pytest.mark.parametrize("batching", ["wisp", "wisp:keep", "continuous", "fcfs", "paper"])
@settings(max_examples=100)
@given(
    asks=st.lists(asked(), min_size=3, max_size=5),
    slots=st.integers(2, 4),
    kv=st.integers(96, 130),
    step_tokens=st.sampled_from([8, 12, 32]),
    depth=st.integers(1, 2),
)
def test_sessions_never_take_kv_from_each_other_in_turn(
    batching: str, asks: list[Asked], slots: int, kv: int, step_tokens: int, depth: int
) -> None:
    rig = Rig(
        slots=slots, slot_tokens=96, kv_tokens=kv, step_tokens=step_tokens, batching=batching, depth=depth
    )
    serve(rig, asks)


def test_three_prompts_of_which_no_two_fit_are_read_one_after_another() -> None:
    """One is urgent, and the others' longer answers are worth more to the batching policy."""
    rig = Rig(slots=3, slot_tokens=96, kv_tokens=96, step_tokens=12, batching="wisp")
    urgent = Asked(60, 2, Slo(400.0, 60.0), "a", 0)
    serve(rig, [urgent, Asked(58, 23, None, "a", 0), Asked(52, 24, None, "a", 0)])


@pytest.mark.parametrize("slots", [1, 2])
def test_a_session_that_waits_for_kv_past_all_hope_loses_its_slo_as_others_do(slots: int) -> None:
    """It waits for a slot, or has one and is not resident: the policy does not see it."""
    rig = Rig(slots=slots, slot_tokens=64, kv_tokens=64, step_tokens=64, batching="wisp")
    rig.receive(Open("session-going", 0, [1] * 40, Sampling(), 20, ignore_eos=True, slo=Slo(1e3, 20.0)))
    rig.steps(1)
    rig.receive(
        Open("session-waiting", 0, [2] * 40, Sampling(), 20, ignore_eos=True, slo=Slo(100.0, 500.0)), 2
    )
    rig.now += 0.03  # the one that is going is late, and keeps its KV
    rig.dispatch()
    assert lost(rig) == [False, False]
    rig.finish()
    rig.now += 0.1
    rig.dispatch()
    assert lost(rig) == [False, True]
    going, waiting = rig.verifier.sessions.values()
    assert going.cached
    assert not waiting.cached
    assert waiting.due > rig.now


def lost(rig: Rig) -> list[bool]:
    return [s.targets.slo_lost for s in rig.verifier.sessions.values()]
