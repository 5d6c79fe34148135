"""The values that hold a session's state, by example."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import cast

import pytest

from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Draft, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import Slice, TokenLogprob
from wisp.core.verify.index import SessionIndex
from wisp.core.verify.planner import Planner, candidate_of
from wisp.core.verify.progress import Progress
from wisp.core.verify.rounds import Pending
from wisp.core.verify.session import Flight, Session, Speed, expected
from wisp.core.verify.states import State
from wisp.core.verify.targets import RELAXED, TPOT_SHARE, TTFT_SHARE, Targets


def targets(ttft_ms: float = 1000.0, tpot_ms: float = 100.0) -> Targets:
    """Of a session that was opened at 10 s."""
    return Targets(Slo(ttft_ms, tpot_ms), 10.0, begun=False)


def test_due_times_follow_from_the_opening_and_then_from_the_first_token() -> None:
    made = targets()
    assert made.due(0) == pytest.approx(10.0 + TTFT_SHARE)
    made.first_at = 11.0
    assert made.due(5) == pytest.approx(11.0 + 5 * 0.1 * TPOT_SHARE)
    assert targets(ttft_ms=0.0).due(0) == math.inf
    only_first = targets(tpot_ms=0.0)
    only_first.first_at = 11.0
    assert only_first.due(5) == math.inf


def test_a_lost_slo_leaves_twice_the_time_from_then_on() -> None:
    made = targets()
    made.first_at = 11.0
    made.relax(20.0, 5)
    assert made.due(5) == pytest.approx(20.0)
    assert made.due(7) == pytest.approx(20.0 + 2 * RELAXED * 0.1 * TPOT_SHARE)
    waiting = targets()
    waiting.relax(20.0, 0)
    assert waiting.due(0) == pytest.approx(21.0)  # the first token has its whole target again


def test_an_slo_is_hopeless_once_its_own_times_are_over_and_not_before() -> None:
    """Due times are earlier: they have a reserve."""
    made = targets()
    assert not made.hopeless(10.99, 0, 50)
    assert made.hopeless(11.01, 0, 50)
    made.first_at = 11.0
    assert made.due(5) < 14.0
    assert not made.hopeless(15.79, 5, 44)  # all 49 tokens, were they here now, would have taken 4.8 s
    assert made.hopeless(15.81, 5, 44)
    made.relax(15.81, 5)
    assert not made.hopeless(99.0, 5, 44)  # it is lost once


def test_a_lost_first_token_hurries_no_answer_that_has_no_pace() -> None:
    only_first = targets(tpot_ms=0.0)
    only_first.relax(11.5, 0)
    assert 11.5 < only_first.due(0) < math.inf
    only_first.first_at = 12.0
    assert only_first.due(1) == math.inf


def test_all_that_are_hopeless_are_given_up_and_no_others() -> None:
    """The planner looks closer at some of those that are late only."""
    source, given_up = random.Random(1), 0
    for handle in range(2000):
        slo = Slo(source.choice([0.0, 500.0]), source.choice([0.0, 100.0]))
        open_ = Open("s", 0, [1] * 3, Sampling(), source.choice([5, 100]), round=0, slo=slo)
        session, index = Session(handle, "", 1, open_, 10.0), SessionIndex()
        session.state = State.READY
        session.slot = source.choice([None, 0])
        if source.random() < 0.7:
            session.targets.first_at = 10.0 + source.uniform(0.0, 0.5)
            session.progress.append([7] * source.randint(1, session.params.max_tokens - 1), [])
        index.sessions[handle] = session
        index.put(session)
        now = 10.0 + source.uniform(0.0, 1.3 * max(1.0, 0.1 * session.params.max_tokens))
        hopeless = session.targets.hopeless(now, session.progress.committed, session.remaining)
        planner = cast(Planner, SimpleNamespace(index=index))
        candidates = [candidate_of(session)] if session.slot is not None else []
        Planner._give_up(planner, now, candidates)
        assert session.targets.slo_lost == hopeless
        given_up += hopeless
    assert 100 < given_up < 1900


def test_without_a_target_nothing_is_hopeless() -> None:
    assert not Targets(None, 10.0, begun=False).hopeless(99.0, 0, 50)
    assert not targets(ttft_ms=0.0).hopeless(99.0, 0, 50)
    only_first = targets(tpot_ms=0.0)
    only_first.first_at = 11.0
    assert not only_first.hopeless(99.0, 5, 1)


@pytest.mark.parametrize(("n_draft", "tokens"), [(0, 1.0), (1, 1.5), (2, 1.75), (3, 1.875)])
def test_a_draft_is_expected_to_be_right_up_to_some_token(n_draft: int, tokens: float) -> None:
    assert expected(0.5, n_draft) == pytest.approx(tokens)


def test_acceptance_is_learnt_from_what_was_seen_and_no_further() -> None:
    speed = Speed(0.0)
    start = speed.acceptance
    speed.verified(3.0, 4, 0)
    assert speed.answered_at == 3.0
    assert speed.acceptance == pytest.approx(start * 0.96)  # one failure, whatever was drafted behind it
    speed.acceptance = 0.5
    speed.verified(4.0, 2, 2)
    assert speed.acceptance == pytest.approx(0.98 - (0.98 - 0.5) * 0.96**2)


def test_a_new_session_expects_a_little_of_its_drafts() -> None:
    speed = Speed(7.0)
    assert speed.answered_at == 7.0
    assert 1.0 < expected(speed.acceptance, 1) < 2.0
    assert expected(speed.acceptance, 1) < expected(speed.acceptance, 4) < 5.0


def test_acceptance_stays_below_one_however_often_all_is_accepted() -> None:
    speed = Speed(0.0)
    for _ in range(1000):
        speed.verified(1.0, 8, 8)
    assert 0.97 < speed.acceptance < 1.0
    assert 8.0 < expected(speed.acceptance, 8) < 9.0


def test_each_token_of_a_draft_teaches_up_to_the_first_that_is_rejected() -> None:
    speed = Speed(0.0)
    speed.acceptance = 0.5
    speed.verified(1.0, 3, 1)
    assert speed.acceptance == pytest.approx((0.98 - (0.98 - 0.5) * 0.96) * 0.96)


def test_shares_of_a_target_leave_something_for_the_way() -> None:
    made = targets(ttft_ms=1000.0, tpot_ms=100.0)
    assert 10.8 < made.due(0) < 11.0
    made.first_at = 11.0
    assert 11.8 < made.due(10) < 12.0


def test_a_session_that_has_begun_elsewhere_is_due_from_its_resumption_on() -> None:
    begun = Targets(Slo(1000.0, 100.0), 10.0, begun=True)
    assert begun.first_at == 10.0
    assert begun.due(3) == pytest.approx(10.0 + 3 * 0.1 * TPOT_SHARE)


def test_a_dropped_slo_has_no_due_time() -> None:
    made = targets()
    made.drop()
    assert (made.due(0), made.due(9), made.tpot_s, made.slo_lost) == (math.inf, math.inf, 0.0, True)


# --- prompt and committed tokens

PROMPT = [1, 2, 3]


def opening(**changes: object) -> Open:
    made: dict[str, object] = {"session": "session-1", "epoch": 0, "prompt": PROMPT, "sampling": Sampling()}
    return Open(**{**made, "max_tokens": 10, **changes})  # type: ignore[arg-type]


def entries(*tokens: int) -> list[TokenLogprob]:
    return [TokenLogprob(token, -1.0) for token in tokens]


def test_log_probabilities_are_told_only_where_all_are_known() -> None:
    progress = Progress(opening(logprobs=0, committed=[10, 11]))
    assert progress.entries_from(1) == []  # of tokens from elsewhere
    progress.append([12, 13], entries(12, 13, 14))  # the last one was cut off
    assert progress.tokens_from(2) == [12, 13]
    assert progress.entries_from(2) == entries(12, 13)
    assert progress.entries_from(3) == entries(13)
    assert progress.entries_from(1) == []
    assert progress.entries_from(4) == []
    progress.append([14], [])
    assert progress.entries_from(4) == []
    progress.append([15], entries(15))
    assert progress.entries_from(5) == entries(15)
    assert progress.entries_from(4) == []  # those before it are gone


@pytest.mark.parametrize(
    ("theirs", "tokens", "changed"),
    [
        ([], [10, 11], False),
        ([10], [10, 11], False),
        ([10, 11], [10, 11], False),
        ([10, 11, 12], [10, 11, 12], True),
    ],
)
def test_the_longer_history_is_kept(theirs: list[int], tokens: list[int], *, changed: bool) -> None:
    progress = Progress(opening(logprobs=0))
    progress.append([10, 11], entries(10, 11))
    assert progress.adopt(opening(logprobs=0, committed=theirs)) is changed
    assert progress.tokens_from(0) == tokens
    assert progress.committed == len(tokens)
    assert progress.entries_from(0) == ([] if changed else entries(10, 11))


@pytest.mark.parametrize("theirs", [[9], [10, 9], [9, 11], [10, 9, 12]])
def test_histories_that_differ_are_a_conflict(theirs: list[int]) -> None:
    progress = Progress(opening())
    progress.append([10, 11], [])
    with pytest.raises(ProtocolError, match="differ at token") as refused:
        progress.adopt(opening(committed=theirs))
    assert refused.value.code == "conflict"
    assert progress.tokens_from(0) == [10, 11]


@pytest.mark.parametrize("prompt", [[1, 2], [1, 2, 4], [1, 2, 3, 10]])
def test_another_prompt_is_a_conflict(prompt: list[int]) -> None:
    progress = Progress(opening())
    progress.append([10, 11], [])
    with pytest.raises(ProtocolError) as refused:
        progress.adopt(opening(prompt=prompt))
    assert refused.value.code == "conflict"


def test_other_alternatives_than_before_begin_anew() -> None:
    progress = Progress(opening(logprobs=0))
    progress.append([10], entries(10))
    progress.adopt(opening(logprobs=2))
    assert (progress.logprobs, progress.entries_from(0)) == (2, [])


# --- rounds


def session(committed: int = 0, **changes: object) -> Session:
    made = Session(1, "key", 5, opening(**changes), 2.0)
    made.progress.append([10 + i for i in range(committed)], [])
    return made


def test_a_new_session_waits_for_its_edge_and_holds_nothing() -> None:
    made = session()
    assert (made.state, made.slot, made.cached, made.n_committed, made.remaining) == (
        State.WAITING,
        None,
        0,
        0,
        10,
    )
    assert (made.since, made.due, made.has_place) == (2.0, math.inf, False)
    assert (made.round.number, made.round.heard, made.round.price) == (-1, 0, 0.0)
    assert made.flight.slices == made.flight.void == made.flight.kv == made.flight.tokens == 0
    assert (made.flight.last, made.flight.step) == (None, -1)


def test_a_draft_is_never_longer_than_what_may_still_be_accepted() -> None:
    made = session(7)
    taken = made.intake(Draft("session-1", 1, 7, [1, 2, 3, 4]), 3.0)
    assert taken == Pending(1, 7, 0, [1, 2], 3.0)  # and the third is the target's own
    assert session(9).intake(Draft("session-1", 1, 9, [1, 2]), 3.0) == Pending(1, 9, 0, [], 3.0)


def test_what_is_committed_of_a_draft_is_not_verified_again() -> None:
    assert session(2).intake(Draft("session-1", 1, 0, [10, 11, 12]), 3.0) == Pending(1, 0, 2, [12], 3.0)
    assert session(2).intake(Draft("session-1", 1, 1, [11, 12]), 3.0) == Pending(1, 1, 1, [12], 3.0)
    for draft, head in (([10, 11], 2), ([10], 1), ([10, 9, 12], 1), ([], 0)):
        answer = session(2).intake(Draft("session-1", 3, 0, draft), 3.0)
        assert isinstance(answer, Verdict)
        assert (answer.round, answer.base, answer.accepted, answer.tokens) == (3, 0, head, [10, 11])


def test_a_draft_waits_only_for_one_that_it_continues() -> None:
    made = session(2)
    longer = Draft("session-1", 2, 2, [20, 21, 22])
    assert not made.extends(longer)  # nothing waits for a step
    made.round.pending = Pending(1, 2, 0, [20, 21], 3.0)
    assert made.extends(longer)
    assert made.extends(Draft("session-1", 2, 1, [11, 20, 21, 22]))
    assert not made.extends(Draft("session-1", 2, 2, [20, 21]))  # nothing more
    assert not made.extends(Draft("session-1", 2, 2, [20, 9, 22]))
    made.round.pending = Pending(1, 2, 0, [], 3.0)
    assert not made.extends(longer)  # rows cost nothing: it takes the place of the empty one
    made.round.price = 0.5
    assert made.extends(longer)


def test_the_lag_is_behind_the_next_due_time() -> None:
    made = session(4, slo=Slo(1000.0, 100.0))
    made.verified(3.0, 0, 0)
    assert made.targets.first_at == 3.0
    assert candidate_of(made).lag_s == pytest.approx(-3 * 0.1 * TPOT_SHARE)  # four tokens where one was due
    made.verified(4.0, 0, 0)
    assert made.targets.first_at == 3.0
    assert candidate_of(made).lag_s == pytest.approx(1.0 - 3 * 0.1 * TPOT_SHARE)


def test_the_last_round_received_may_still_wait() -> None:
    made = session()
    made.round.number = 3
    assert made.round.last_received == 3
    made.round.wait(Draft("session-1", 4, 0, []))
    assert made.round.last_received == 4
    made.round.clear()
    assert made.round.last_received == 3


def test_what_is_in_flight_comes_back_oldest_first() -> None:
    flight, chunk, token = Flight(), Slice(1, 0, 0, [1, 2, 3], 0, False), Slice(1, 0, 3, [4], 0, True)
    flight.add(7, chunk)
    flight.add(8, token)
    assert (flight.slices, flight.kv, flight.tokens, flight.last, flight.step) == (2, 4, 1, token, 8)
    assert not flight.back(chunk)
    assert (flight.slices, flight.kv, flight.tokens) == (1, 1, 1)
    flight.drop()
    flight.add(9, token)  # after what is to be dropped
    assert flight.back(token)
    assert not flight.back(token)
    assert (flight.slices, flight.kv, flight.tokens, flight.void) == (0, 0, 0, 0)
