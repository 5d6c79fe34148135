"""What a verifier reports: times and counts in verdicts, usage, what it learns from a step, and when to wake it."""

from __future__ import annotations

import msgspec
import pytest

from rig import SAMPLING, Rig
from toy import toy_text
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import NOT_FINITE
from wisp.core.verify.cost import CostModel, Load
from wisp.core.verify.events import StepDone, Tick
from wisp.core.verify.states import State

ID = "session-1"
PROMPT = [1, 2, 3]
TEXT = toy_text(PROMPT, SAMPLING, 40)
LONG = [i % 40 for i in range(40)]


def opening(session: str = ID, epoch: int = 0, **changes: object) -> Open:
    return msgspec.structs.replace(Open(session, epoch, PROMPT, SAMPLING, 40), **changes)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_first_draft_waits_for_the_end_of_a_long_prompt(rig: Rig) -> None:
    truth = toy_text(LONG, SAMPLING, 4)
    rig.receive(opening(prompt=LONG, max_tokens=10, draft=truth[:3]))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.accepted, verdict.tokens) == (3, truth)
    assert len(rig.runs) == 3


def test_a_verdict_says_how_long_its_draft_waited_and_how_long_the_engine_took(rig: Rig) -> None:
    rig.receive(opening())
    rig.now = 0.05
    rig.settle()
    verdict = rig.verdict()
    assert verdict.queue_ms == pytest.approx(50.0)
    assert verdict.engine_ms == 10.0
    rig.now = 3.0  # while its edge drafts
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))
    rig.now = 3.02
    rig.settle()
    assert rig.verdict().queue_ms == pytest.approx(20.0)


def test_in_server_mode_a_token_waits_from_the_one_before_it_on(rig: Rig) -> None:
    rig.receive(opening(serve=True, max_tokens=2))
    rig.dispatch()
    rig.finish()
    rig.now += 0.03
    rig.settle()
    assert [v.queue_ms for v in rig.verdicts()] == [pytest.approx(0.0), pytest.approx(30.0)]


def test_a_follow_up_turn_says_how_much_of_its_prompt_was_there(rig: Rig) -> None:
    rig.receive(opening(prompt=LONG, max_tokens=1))
    rig.settle()
    assert rig.verdict().cached == 0
    rig.receive(opening("session-2", prompt=[*LONG, 1, 2], max_tokens=2))
    rig.settle()
    assert rig.verdict().cached == len(LONG)
    assert rig.verifier.admission.usage[""].prompt_tokens == len(LONG) + 2


def test_usage_counts_prompts_and_answers_once(rig: Rig) -> None:
    usage = rig.verifier.admission.usage
    rig.receive(opening(prompt=LONG, max_tokens=10), key="a")
    rig.settle()
    assert (usage["a"].prompt_tokens, usage["a"].output_tokens) == (len(LONG), 1)
    rig.receive(opening("session-2", draft=TEXT[:3]), key="b")
    rig.settle()
    assert (usage["b"].prompt_tokens, usage["b"].output_tokens) == (len(PROMPT), 4)
    rig.receive(Draft("session-2", 1, 4, [TEXT[4], 48]), key="b")
    rig.settle()
    assert (usage["b"].prompt_tokens, usage["b"].output_tokens) == (len(PROMPT), 6)
    assert (usage["b"].sessions, usage["b"].requests, usage["b"].refused) == (1, 1, 0)


class Observed(CostModel):
    """A cost model that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Load, float]] = []

    def observe(self, load: Load, ms: float) -> None:
        self.seen.append((load, ms))


def test_the_cost_of_a_step_is_that_of_engine_and_host_together(rig: Rig) -> None:
    cost = rig.verifier.cost = rig.verifier.planner.cost = Observed()
    rig.receive(opening())
    rig.settle()  # 10 ms in the engine, and no more on the clock
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))
    rig.dispatch()
    rig.now += 0.05  # the host was late
    rig.finish()
    assert [ms for _, ms in cost.seen] == [pytest.approx(10.0), pytest.approx(60.0)]
    assert [load.new for load, _ in cost.seen] == [3, 3]
    rig.receive(Draft(ID, 2, 4, TEXT[4:6]))
    rig.dispatch()
    rig.fail("out of memory")
    assert len(cost.seen) == 2  # how long a failed step took says nothing


def test_the_length_and_the_duration_of_answers_are_learnt(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:3], max_tokens=4))
    rig.now = 0.5
    rig.settle()
    assert rig.verdict().finish == "length"
    assert rig.verifier.answers.tokens == 4.0
    assert rig.verifier.answers.seconds == pytest.approx(0.51)


def test_answers_that_another_verifier_began_are_not_learnt_from(rig: Rig) -> None:
    """Neither their first token nor all of their time was here."""
    rig.receive(opening(committed=TEXT[:30], draft=TEXT[30:33], max_tokens=34))
    rig.settle()
    assert rig.verdict().finish == "length"
    rig.receive(opening("session-2", max_tokens=40), connection=2)
    rig.settle()
    rig.lose(2)
    elsewhere = opening("session-2", epoch=1, round=9, committed=TEXT[:38], draft=TEXT[38:39])
    rig.receive(elsewhere, connection=2)
    rig.settle()
    assert rig.verdict(2).finish == "length"
    answers = rig.verifier.answers
    assert (answers.tokens, answers.seconds, answers.waited_s) == (200.0, 10.0, 0.0)  # before the first


def test_an_answer_whose_edge_came_back_is_learnt_from(rig: Rig) -> None:
    rig.receive(opening(max_tokens=4))
    rig.settle()
    rig.lose()
    rig.receive(opening(epoch=1, round=9, committed=TEXT[:1], draft=TEXT[1:3], max_tokens=4))
    rig.settle()
    assert rig.verdict().finish == "length"
    assert rig.verifier.answers.tokens == 4.0


def test_kv_that_is_computed_again_does_not_count_as_rows_of_drafts(rig: Rig) -> None:
    """A session that had begun elsewhere: its 25 committed tokens are in two steps, of which one has no prompt."""
    rig.receive(opening(committed=TEXT[:25], draft=TEXT[25:28]))
    rig.settle()
    assert len(rig.runs) == 2
    assert rig.verdict().tokens == TEXT[25:29]
    answers = rig.verifier.answers
    assert (answers.rows_a_token, answers.tokens_a_slice) == (
        1.0,
        2.5,
    )  # with the row that is assumed at first


def test_an_engine_that_failed_may_be_asked_again_and_a_bad_model_may_not(rig: Rig) -> None:
    rig.receive(opening())
    rig.dispatch()
    rig.fail("out of memory")
    refused = rig.refused()
    assert (refused.code, refused.retry_after, refused.fatal, refused.round) == ("engine_error", 1.0, True, 0)
    rig.engine.poison = 2
    rig.receive(opening())
    rig.settle()
    refused = rig.refused()
    assert (refused.code, refused.retry_after, refused.fatal) == (NOT_FINITE, 0.0, True)
    assert not rig.verifier.sessions
    assert rig.verifier.kv.held == 0


def test_a_session_that_gives_way_is_told_to_come_back() -> None:
    rig = Rig(max_sessions=2)
    rig.receive(opening("session-1"), connection=1, key="a")
    rig.receive(opening("session-2"), connection=1, key="a")
    rig.settle()
    rig.now = 100.0  # both edges have said nothing for long
    rig.sent.clear()
    rig.receive(opening("session-3"), connection=2, key="b")
    refused = rig.refused(1)
    assert (refused.code, refused.fatal, refused.retry_after) == ("overloaded", True, 1.0)
    rig.settle()
    assert rig.verdict(2).tokens == TEXT[:1]
    assert len(rig.verifier.sessions) == 2


def test_it_wants_to_be_woken_when_the_first_parked_session_expires(rig: Rig) -> None:
    for i in (1, 2):
        rig.receive(opening(f"session-{i}"), connection=i)
    rig.settle()
    for i, at in ((2, 10.0), (1, 20.0)):
        rig.now = at
        rig.lose(i)
    rig.feed(Tick())
    assert rig.wake_at == 10.0 + rig.limits.park_s
    rig.now = 10.0 + rig.limits.park_s - 0.001
    rig.feed(Tick())
    assert len(rig.verifier.sessions) == 2
    rig.now = 10.0 + rig.limits.park_s
    rig.feed(Tick())
    assert [s.id for s in rig.verifier.sessions.values()] == ["session-1"]
    assert rig.wake_at == 20.0 + rig.limits.park_s


def test_while_a_step_runs_no_other_is_planned(rig: Rig) -> None:
    def running() -> bool:
        return rig.verifier.running

    rig.receive(opening())
    assert not running()
    rig.dispatch()
    assert running()
    rig.feed(Tick())
    assert len(rig.runs) == 1
    rig.finish()
    assert not running()


def test_a_step_that_is_not_in_flight_says_nothing(rig: Rig) -> None:
    rig.feed(StepDone([], 1.0))
    rig.receive(opening())
    rig.settle()
    assert rig.verdict().tokens == TEXT[:1]


def test_a_lost_session_forgets_its_draft_and_its_mode(rig: Rig) -> None:
    rig.receive(opening(serve=True))
    rig.dispatch()
    rig.receive(Draft(ID, 1, 0, TEXT[:2]))
    rig.lose()
    rig.finish()
    [session] = rig.verifier.sessions.values()
    assert session.state is State.PARKED
    assert (session.connection, session.round.pending, session.round.inbox, session.round.serve) == (
        -1,
        None,
        [],
        False,
    )
    assert not rig.dispatch()


def test_losing_one_connection_leaves_the_sessions_of_others(rig: Rig) -> None:
    for i in (1, 2):
        rig.receive(opening(f"session-{i}"), connection=i)
    rig.receive(opening("session-3"), connection=1)
    rig.settle()
    rig.lose(1)
    states = {s.id: s.state for s in rig.verifier.sessions.values()}
    assert states == {"session-1": State.PARKED, "session-2": State.WAITING, "session-3": State.PARKED}
    rig.receive(opening(epoch=1, round=1, committed=TEXT[:1]), connection=2)
    rig.lose(1)  # a connection that has no sessions any more
    rig.settle()
    assert rig.verdicts(2)[-1].tokens == TEXT[1:2]
    rig.receive(Cancel(ID), connection=1)
    assert rig.verifier.knows(ID)
    rig.receive(Cancel(ID), connection=2)
    assert not rig.verifier.knows(ID)


def test_a_drafting_edge_may_be_told_tokens_that_its_draft_has_too() -> None:
    """Where there is time, an edge that is not far ahead is decoded for: two verdicts then overlap."""
    rig = Rig(batching="wisp")
    rig.receive(opening(slo=Slo(1000.0, 30.0)), connection=1)
    rig.dispatch()
    rig.finish()
    committed = rig.verdict(1).tokens
    rig.now += 0.02
    rig.dispatch()
    assert [s.session for s in rig.flying[0].slices] == [1]
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]), connection=1)  # it crosses with that token
    rig.finish()
    rig.dispatch()
    rig.finish()
    unasked, answer = rig.sent[1]
    assert isinstance(unasked, Verdict)
    assert isinstance(answer, Verdict)
    assert (unasked.round, unasked.base, unasked.tokens) == (0, 1, TEXT[1:2])
    assert (answer.round, answer.base, answer.accepted, answer.tokens) == (1, 1, 2, TEXT[1:4])
    assert committed == TEXT[:1]


def test_no_session_hears_of_a_refused_message_of_another(rig: Rig) -> None:
    rig.receive(opening(), connection=1)
    rig.receive(Draft(ID, 1, 0, []), connection=2)
    [refused] = rig.sent[2]
    assert isinstance(refused, Refused)
    assert (refused.session, refused.round, refused.fatal) == (ID, 1, False)
    assert 1 not in rig.sent
