"""The verifier in scenarios: messages from edges, and its answers."""

from __future__ import annotations

import math
import tracemalloc

import msgspec
import pytest

from rig import SAMPLING, Rig
from toy import EOS, N_VOCAB, toy_text
from wisp.core.protocol.messages import Cancel, Draft, Open, decode_edge_message, encode
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import NO_TOKEN, Copy
from wisp.core.verify.admission import Admission, KeyLimits
from wisp.core.verify.batching import Kind, batching_policy
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.events import Ended, InEvent, Limits, Received, Run, Send, Tick
from wisp.core.verify.planner import candidate_of
from wisp.core.verify.states import TRANSITIONS, Event, State
from wisp.core.verify.verifier import Verifier

ID = "session-1"
PROMPT = [1, 2, 3]
TEXT = toy_text(PROMPT, SAMPLING, 40)
WRONG = next(t for t in range(90) if t not in TEXT)


def opening(session: str = ID, epoch: int = 0, **changes: object) -> Open:
    return msgspec.structs.replace(Open(session, epoch, PROMPT, SAMPLING, 40), **changes)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_opening_without_a_draft_gives_one_token(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.round, verdict.base, verdict.accepted, verdict.tokens) == (0, 0, 0, TEXT[:1])
    assert rig.silent


def test_a_first_draft_is_verified_in_the_step_of_the_prompt(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:3]))
    rig.settle()
    assert rig.verdict().tokens == TEXT[:4]
    assert len(rig.runs) == 1


def test_a_long_prompt_is_prefilled_in_chunks(rig: Rig) -> None:
    prompt = [i % 40 for i in range(40)]
    rig.receive(opening(prompt=prompt, max_tokens=10))
    rig.settle()
    assert [len(r.slices[0].tokens) for r in rig.runs] == [16, 16, 8]
    assert [r.slices[0].sample for r in rig.runs] == [False, False, True]
    assert rig.verdict().tokens == toy_text(prompt, SAMPLING, 1)


def test_right_drafts_are_accepted_and_wrong_ones_corrected(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:4]))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.accepted, verdict.base, verdict.tokens) == (3, 1, TEXT[1:5])
    wrong = (TEXT[6] + 1) % N_VOCAB
    rig.receive(Draft(ID, 2, 5, [TEXT[5], wrong, TEXT[7]]))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.accepted, verdict.tokens) == (1, TEXT[5:7])
    rig.receive(Draft(ID, 3, 7, []))
    rig.settle()
    assert rig.verdict().tokens == TEXT[7:8]


def test_rejected_tokens_leave_no_trace_in_the_kv(rig: Rig) -> None:
    rig.receive(opening(draft=[(TEXT[0] + 1) % N_VOCAB] * 5))
    rig.settle()
    assert rig.verifier.kv.held == len(PROMPT)
    assert rig.engine.held[0] == PROMPT


def test_server_mode_decodes_by_itself_until_the_end(rig: Rig) -> None:
    rig.receive(opening(serve=True, max_tokens=7))
    rig.settle()
    verdicts = [rig.verdict() for _ in range(7)]
    assert [v.base for v in verdicts] == list(range(7))
    assert [v.tokens[0] for v in verdicts] == TEXT[:7]
    assert [v.finish for v in verdicts] == [""] * 6 + ["length"]
    assert not rig.verifier.sessions


def test_a_draft_in_server_mode_is_verified_and_ends_it(rig: Rig) -> None:
    rig.receive(opening(serve=True))
    for _ in range(3):
        rig.dispatch()
        rig.finish()
    rig.dispatch()  # decoding token 3 while the draft, made from base 1, comes in
    rig.receive(Draft(ID, 1, 1, TEXT[1:6]))
    rig.finish()
    rig.settle()
    last = rig.verdicts()[-1]
    assert (last.round, last.base, last.accepted, last.tokens) == (1, 1, 5, TEXT[1:7])
    assert rig.verifier.sessions[1].state is State.WAITING


def test_a_draft_that_disagrees_with_committed_tokens_is_answered_without_the_engine(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:4]))
    rig.settle()
    rig.verdict()
    steps = len(rig.runs)
    rig.receive(Draft(ID, 1, 1, [TEXT[1], (TEXT[2] + 1) % N_VOCAB, 0]))
    verdict = rig.verdict()
    assert (verdict.round, verdict.base, verdict.accepted, verdict.tokens) == (1, 1, 1, TEXT[1:5])
    rig.receive(Draft(ID, 2, 1, TEXT[1:4]))  # agrees, but says nothing new
    assert rig.verdict().tokens == TEXT[1:5]
    assert len(rig.runs) == steps


def test_an_overlapping_draft_is_verified_only_where_it_is_new(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:4]))
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 2, TEXT[2:8]))
    rig.settle()
    assert rig.runs[-1].slices[0].n_draft == 3  # tokens 5, 6, 7
    verdict = rig.verdict()
    assert (verdict.base, verdict.accepted, verdict.tokens) == (2, 6, TEXT[2:9])


def test_a_later_draft_replaces_one_that_waits(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, [WRONG]))
    rig.receive(Draft(ID, 2, 1, TEXT[1:4]))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.round, verdict.tokens) == (2, TEXT[1:5])
    assert rig.silent


def test_a_draft_sent_ahead_waits_for_the_verdict_on_the_one_before(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:2]))
    rig.receive(Draft(ID, 2, 1, TEXT[1:4]))  # restates the one that waits, guesses its bonus, and goes on
    rig.settle()
    first, second = rig.verdict(), rig.verdict()
    assert (first.round, first.tokens) == (1, TEXT[1:3])
    assert (second.round, second.tokens, second.accepted) == (2, TEXT[1:5], 3)
    assert rig.silent


def test_two_drafts_that_arrive_during_a_step_are_verified_one_after_the_other(rig: Rig) -> None:
    rig.receive(opening())
    assert rig.dispatch()
    rig.receive(Draft(ID, 1, 0, TEXT[:3]))
    rig.receive(Draft(ID, 2, 0, TEXT[:6]))
    rig.finish()
    assert rig.verdict().tokens == TEXT[:1]
    rig.steps(1)
    verdict = rig.verdict()
    assert (verdict.round, verdict.tokens, rig.runs[-1].slices[0].n_draft) == (1, TEXT[:4], 2)
    rig.steps(1)
    verdict = rig.verdict()
    assert (verdict.round, verdict.tokens, rig.runs[-1].slices[0].n_draft) == (2, TEXT[:7], 2)


def test_of_drafts_that_arrive_during_a_step_another_guess_replaces_all(rig: Rig) -> None:
    rig.receive(opening())
    assert rig.dispatch()
    for round_, tokens in enumerate((TEXT[:2], TEXT[:4], [TEXT[0], TEXT[1] + 1]), 1):
        rig.receive(Draft(ID, round_, 0, tokens))
    rig.finish()
    assert rig.verdict().tokens == TEXT[:1]
    rig.steps(1)
    assert (rig.verdict().round, rig.runs[-1].slices[0].n_draft) == (3, 1)
    assert not rig.dispatch()


def test_a_duplicate_of_a_draft_that_waits_does_not_replace_the_one_behind_it(rig: Rig) -> None:
    rig.receive(opening())
    assert rig.dispatch()
    for round_ in (1, 2, 1):
        rig.receive(Draft(ID, round_, 0, TEXT[: 3 * round_]))
    rig.finish()
    rig.settle()
    assert [rig.verdict().round for _ in range(3)] == [0, 1, 2]
    assert rig.silent


def test_another_guess_replaces_the_draft_that_waits_for_a_step_and_the_one_behind_it(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    assert rig.verdict().round == 0
    for round_, tokens in enumerate((TEXT[1:3], TEXT[1:6], [TEXT[1], TEXT[2] + 1]), 1):
        rig.receive(Draft(ID, round_, 1, tokens))
    rig.settle()
    assert (rig.verdict().round, rig.silent) == (3, True)
    rig.receive(Draft(ID, 3, 1, TEXT[1:3]))
    assert rig.verdict().round == 3  # a duplicate


def test_both_drafts_that_arrive_during_a_step_may_be_wrong(rig: Rig) -> None:
    rig.receive(opening())
    assert rig.dispatch()
    wrong = [TEXT[0] + 1, TEXT[1]]
    rig.receive(Draft(ID, 1, 0, wrong))
    rig.receive(Draft(ID, 2, 0, wrong + TEXT[2:4]))
    rig.finish()
    assert [rig.verdict().round for _ in range(3)] == [0, 1, 2]
    assert not rig.dispatch()


def test_a_draft_sent_ahead_behind_a_wrong_one_costs_no_step(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:2]))
    rig.receive(Draft(ID, 2, 1, [TEXT[1], WRONG, TEXT[3]]))
    rig.dispatch()
    rig.finish()
    assert rig.verdict().tokens == TEXT[1:3]
    stale = rig.verdict()
    assert (stale.round, stale.accepted, stale.tokens) == (2, 1, TEXT[1:3])
    assert rig.silent


def test_duplicates_are_answered_from_the_last_verdict(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))
    rig.dispatch()
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))  # while it is being verified
    rig.finish()
    first = rig.verdict()
    assert rig.silent
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))  # and afterwards
    assert rig.verdict() == first
    assert not rig.dispatch()


def test_end_of_sequence_inside_an_accepted_draft_ends_the_text_there() -> None:
    prompt = [7, 7, 7]  # the toy ends after three sevens
    rig = Rig()
    rig.receive(opening(prompt=prompt, draft=[EOS, 1, 2]))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.tokens, verdict.finish) == ([EOS], "stop")
    rig.receive(opening("session-2", prompt=prompt, draft=[EOS], ignore_eos=True))
    rig.settle()
    verdict = rig.verdict()
    assert verdict.finish == ""
    assert verdict.tokens[0] == EOS
    assert len(verdict.tokens) == 2


def test_no_end_of_sequence_before_the_least_number_of_tokens(rig: Rig) -> None:
    """Whatever end ids the edge has sent; a draft with an early end is corrected."""
    prompt = [7, 7, 7]
    sampling = msgspec.structs.replace(SAMPLING, min_tokens=2)
    text = toy_text(prompt, sampling.ending([EOS]), 10)
    assert EOS not in text[:2]
    rig.receive(opening(prompt=prompt, sampling=sampling, draft=[EOS], max_tokens=10))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.tokens, verdict.accepted, verdict.finish) == (text[:1], 0, "")
    rig.lose()
    rig.receive(
        opening(epoch=1, prompt=prompt, sampling=sampling.ending([3]), committed=text[:1], max_tokens=10), 2
    )
    rig.settle()
    assert rig.verdict(2).tokens == text[1:2]


def test_max_tokens_inside_a_draft() -> None:
    rig = Rig()
    rig.receive(opening(draft=TEXT[:8], max_tokens=3))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.tokens, verdict.finish) == (TEXT[:3], "length")
    assert len(rig.runs[0].slices[0].tokens) == len(PROMPT) + 2  # what could not be used was not computed


def test_log_probabilities_cover_exactly_the_tokens_of_the_verdict(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:2], logprobs=0))
    rig.settle()
    verdict = rig.verdict()
    assert [e.token for e in verdict.logprobs] == verdict.tokens
    rig.receive(Draft(ID, 1, 1, TEXT[1:5]))
    rig.settle()
    verdict = rig.verdict()
    assert [e.token for e in verdict.logprobs] == verdict.tokens == TEXT[1:6]


# --- refusals leave everything as it was

BAD = {
    "a draft for nobody": (Draft("nobody-here", 1, 0, [1]), "unknown_session"),
    "a token outside the vocabulary": (Draft(ID, 1, 1, [N_VOCAB]), "out_of_vocabulary"),
    "a negative token": (Draft(ID, 1, 1, [-1]), "out_of_vocabulary"),
    "a draft that is too long": (Draft(ID, 1, 1, [1] * 9), "oversized"),
    "a base that is not committed": (Draft(ID, 1, 2, [1]), "unknown_base"),
    "a negative base": (Draft(ID, 1, -1, [1]), "unknown_base"),
    "a round of the past": (Draft(ID, -1, 1, [1]), "out_of_turn"),
    "the same epoch again": (opening(), "stale_epoch"),
    "another prompt": (opening(epoch=1, prompt=[1, 2, 4]), "conflict"),
    "other sampling": (opening(epoch=1, sampling=msgspec.structs.replace(SAMPLING, seed=4)), "conflict"),
    "another salt": (opening(epoch=1, salt="of-another"), "conflict"),
    "another history": (opening(epoch=1, committed=[(TEXT[0] + 1) % 49]), "conflict"),
    "an empty prompt": (opening("session-2", prompt=[]), "malformed"),
    "a pace that is no number": (opening("session-2", slo=Slo(math.nan, math.nan)), "malformed"),
    "a negative pace": (opening("session-2", slo=Slo(-5.0, -5.0)), "malformed"),
    "a prompt beyond the context": (opening("session-2", prompt=[1] * 64), "context_length_exceeded"),
    "an output beyond the context": (opening("session-2", max_tokens=62), "context_length_exceeded"),
    "a prompt outside the vocabulary": (opening("session-2", prompt=[1, N_VOCAB]), "out_of_vocabulary"),
    "committed beyond max_tokens": (opening("session-2", committed=[1] * 40), "malformed"),
    "committed past the end": (opening("session-2", committed=[EOS]), "malformed"),
    "bad sampling": (
        opening("session-2", sampling=msgspec.structs.replace(SAMPLING, top_p=0.0)),
        "malformed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str, rig: Rig) -> None:
    message, code = BAD[case]
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(message)
    assert rig.refused().code == code
    assert len(rig.verifier.sessions) == 1
    assert rig.verifier.admission.usage[""].sessions == 1
    rig.receive(Draft(ID, 1, 1, TEXT[1:4]))
    rig.settle()
    assert rig.verdict().tokens == TEXT[1:5]


def test_a_session_belongs_to_its_key(rig: Rig) -> None:
    rig.receive(opening(), connection=1, key="alice")
    rig.settle()
    rig.receive(opening(epoch=5), connection=2, key="mallory")
    assert rig.refused(2).code == "forbidden"
    rig.receive(Draft(ID, 1, 1, []), connection=2, key="mallory")
    assert rig.refused(2).code == "unknown_session"
    rig.receive(Cancel(ID), connection=2, key="mallory")
    assert len(rig.verifier.sessions) == 1


def test_a_session_over_the_limit_is_refused_fatally(rig: Rig) -> None:
    rig = Rig(limits={"a": KeyLimits(sessions=1)})
    rig.receive(opening(), key="a")
    rig.receive(opening("session-2"), key="a")
    refused = rig.refused()
    assert (refused.session, refused.code, refused.fatal) == ("session-2", "rate_limit_exceeded", True)


# --- faults


def test_cancel_frees_the_session_even_in_mid_step(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:4]))
    rig.dispatch()
    rig.receive(Cancel(ID))
    assert rig.verifier.sessions  # its step is still running
    rig.finish()
    assert not rig.verifier.sessions
    assert rig.silent
    assert rig.verifier.kv.owned_slots == 0
    assert rig.verifier.admission.usage[""].sessions == 0


def test_an_edge_resumes_and_gets_the_tokens_it_missed(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:4]))
    rig.dispatch()
    rig.lose(1)
    rig.finish()  # tokens 1 to 4 are committed, and nobody has been told
    assert rig.verifier.sessions[1].state is State.PARKED
    rig.receive(opening(epoch=1, round=2, committed=TEXT[:1], draft=TEXT[1:4]), connection=2)
    verdict = rig.verdict(2)
    assert (verdict.round, verdict.base, verdict.tokens) == (2, 1, TEXT[1:5])


def test_resuming_while_the_step_still_runs(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:2]))
    rig.dispatch()
    rig.lose(1)
    rig.receive(opening(epoch=1, round=1, draft=TEXT[:6]), connection=2)
    rig.finish()
    rig.settle()
    last = rig.verdicts(2)[-1]
    assert (last.round, last.base, last.tokens) == (1, 0, TEXT[:7])


def test_reconnecting_before_the_loss_was_noticed(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(opening(epoch=1, round=1, committed=TEXT[:1]), connection=2)
    rig.lose(1)
    assert rig.verifier.sessions[1].state is not State.PARKED
    rig.settle()
    assert rig.verdict(2).tokens == TEXT[1:2]


def test_any_verifier_picks_up_any_session_from_what_the_edge_has() -> None:
    rig = Rig()
    rig.receive(opening(epoch=3, round=9, committed=TEXT[:10], draft=TEXT[10:13]))
    rig.settle()
    verdict = rig.verdict()
    assert (verdict.round, verdict.base, verdict.tokens) == (9, 10, TEXT[10:14])


def test_the_longer_history_wins_even_if_it_is_the_edges(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.lose(1)
    rig.receive(opening(epoch=1, round=4, committed=TEXT[:9]), connection=2)
    rig.settle()
    assert rig.verdict(2).tokens == TEXT[9:10]


def test_parked_sessions_expire(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.lose(1)
    rig.dispatch()
    assert rig.wake_at == pytest.approx(rig.now + rig.limits.park_s)
    rig.now += 59.0
    rig.settle()
    assert rig.verifier.sessions
    rig.now += 1.1
    rig.settle()
    assert not rig.verifier.sessions
    assert rig.verifier.kv.owned_slots == 0


def test_more_sessions_than_slots_queue_and_all_are_served() -> None:
    rig = Rig(slots=2)
    for i in range(6):
        rig.receive(opening(f"session-{i}", serve=True, max_tokens=5), connection=i)
    rig.settle()
    for i in range(6):
        assert rig.text(i) == TEXT[:5]
    assert not rig.verifier.sessions


def test_an_idle_session_loses_its_kv_and_computes_it_again_on_return() -> None:
    rig = Rig(slots=1)
    rig.receive(opening("session-a"), connection=1)
    rig.settle()
    rig.verdict(1)
    rig.receive(opening("session-b", serve=True, max_tokens=3), connection=2)
    assert not rig.dispatch()  # a is waiting for its edge, and has been for no time at all
    assert rig.wake_at is not None
    rig.now += 1.5
    rig.settle()
    assert rig.text(2) == TEXT[:3]
    rig.receive(Draft("session-a", 1, 1, TEXT[1:3]), connection=1)
    rig.settle()
    assert rig.verdict(1).tokens == TEXT[1:4]


def test_a_shared_prefix_is_copied_and_a_follow_up_turn_reuses_its_slot() -> None:
    rig = Rig(slots=3)
    system = [i % 40 for i in range(20)]
    for i, tail in enumerate(([41], [42])):
        rig.receive(opening(f"session-{i}", prompt=system + tail, max_tokens=2), connection=i)
        rig.settle()
    assert rig.runs[-1].copies == [Copy(0, 1, 20)]
    assert rig.verdicts(1)[0].tokens == toy_text([*system, 42], SAMPLING, 1)
    rows = rig.engine.rows
    rig.receive(Draft("session-0", 1, 1, []), connection=0)
    rig.settle()
    answer = rig.text(0)
    rig.receive(opening("session-2", prompt=[*system, 41, *answer, 43], max_tokens=1), connection=2)
    rig.settle()
    assert rig.engine.rows - rows <= 4  # one decode, and the two tokens that are new
    assert rig.verdicts(2)[0].tokens == toy_text([*system, 41, *answer, 43], SAMPLING, 1)


def test_no_prefix_is_copied_for_a_session_that_waits_for_kv_after_all() -> None:
    rig = Rig(slots=3, slot_tokens=64, kv_tokens=64, step_tokens=64, batching="wisp")
    prompts = [5] * 40, [5] * 30 + [8] * 4
    rig.receive(opening(prompt=prompts[0], serve=True, max_tokens=9), connection=0)
    rig.steps(2)
    rig.receive(opening("session-2", prompt=prompts[1], serve=True, max_tokens=9), connection=1)
    rig.settle()
    for run in rig.runs:
        assert {copy.target for copy in run.copies} <= {s.slot for s in run.slices}
    for connection, prompt in enumerate(prompts):
        assert rig.text(connection) == toy_text(prompt, SAMPLING, 9)


def test_a_copy_stays_that_another_one_reads() -> None:
    """Its own session loses its KV to the one that has its prefix from there."""
    rig = Rig(slots=3, slot_tokens=64, kv_tokens=64, step_tokens=64, batching="wisp")
    shared = [5] * 20
    prompts = [[1], [*shared, 6], [2], [*shared, *range(30)], [*shared, 7, 8]]
    rig.receive(opening("session-0", prompt=prompts[0], max_tokens=1), connection=0)
    rig.steps(1)
    going = opening("session-1", prompt=prompts[1], serve=True, max_tokens=30, slo=Slo(300.0, 20.0))
    rig.receive(going, connection=1)
    rig.receive(opening("session-2", prompt=prompts[2], max_tokens=1), connection=2)
    rig.steps(2)  # the first and the third slot have leftovers now
    for i, ttft_ms in ((3, 200.0), (4, 300.0)):  # the first one to get a slot, and one that fits
        slo = Slo(ttft_ms, 20.0)
        rig.receive(opening(f"session-{i}", prompt=prompts[i], serve=True, max_tokens=5, slo=slo), i)
    rig.steps(1)
    run = rig.runs[-1]
    assert run.copies == [Copy(1, 0, 20), Copy(0, 2, 20)]
    assert sorted(s.slot for s in run.slices) == [1, 2]
    rig.settle()
    for connection, most in ((1, 30), (3, 5), (4, 5)):
        assert rig.text(connection) == toy_text(prompts[connection], SAMPLING, most)


def test_prefixes_are_shared_within_one_salt_only() -> None:
    """The API key may belong to an edge that serves several customers."""
    rig = Rig(slots=3)
    prompt = [i % 40 for i in range(20)]
    rows = []
    for n, (key, salt) in enumerate([("e", "a"), ("e", "b"), ("e", "a"), ("f", "a"), ("e", "b")]):
        before = rig.engine.rows
        rig.receive(opening(f"session-{n}", prompt=prompt, max_tokens=1, salt=salt), key=key)
        rig.settle()
        rows.append(rig.engine.rows - before)
    assert rows == [20, 20, 1, 20, 1]


def test_when_kv_runs_out_the_youngest_session_is_preempted() -> None:
    rig = Rig(slots=3, slot_tokens=40, kv_tokens=50)
    for i in range(3):
        rig.receive(opening(f"session-{i}", serve=True, max_tokens=30), connection=i)
    rig.settle(1000)
    for i in range(3):
        assert rig.text(i) == TEXT[:30]


CALM = Slo(ttft_ms=500.0, tpot_ms=1000.0)  # steps take 10 ms here: whoever is under way is soon far ahead


def test_a_preempted_session_writes_the_same_text() -> None:
    rig = Rig(slots=3, slot_tokens=300, kv_tokens=300, step_tokens=200, batching="wisp")
    for i in range(2):
        rig.receive(opening(f"session-{i}", serve=True, max_tokens=250, slo=CALM), connection=i)
    rig.steps(100)
    late, began = [i % 40 for i in range(150)], rig.now
    rig.receive(opening("session-2", prompt=late, serve=True, max_tokens=10, slo=CALM), connection=2)
    while not rig.sent.get(2):
        assert rig.dispatch()
        rig.finish()
    assert rig.now - began < CALM.ttft_ms / 1e3  # without the loan it waits until another has ended
    rig.settle(2000)
    for i in range(2):
        assert rig.text(i) == toy_text(PROMPT, SAMPLING, 250)
    assert rig.text(2) == toy_text(late, SAMPLING, 10)


def test_a_slot_is_preempted_too() -> None:
    rig = Rig(slots=1, step_tokens=40, batching="wisp")
    rig.receive(opening("session-0", serve=True, max_tokens=50, slo=CALM), connection=0)
    rig.steps(20)
    rig.receive(opening("session-1", serve=True, max_tokens=5, slo=CALM), connection=1)
    rig.settle(2000)
    firsts = [s.session for r in rig.runs for s in r.slices if s.position == 0 and s.sample]
    lasts = [s.session for r in rig.runs for s in r.slices if s.position in (4, 49)]
    assert firsts == [1, 2]
    assert lasts.index(2) < len(lasts) - 1  # the newcomer did not wait for the other's end
    assert rig.text(0) == toy_text(PROMPT, SAMPLING, 50)


def test_a_failed_step_ends_its_sessions_only_and_loses_all_kv(rig: Rig) -> None:
    rig.receive(opening("session-a"), connection=1)
    rig.settle()
    rig.verdict(1)
    rig.receive(opening("session-b"), connection=2)
    rig.dispatch()
    rig.fail("out of memory")
    refused = rig.refused(2)
    assert (refused.code, refused.fatal) == ("engine_error", True)
    rig.receive(Draft("session-a", 1, 1, TEXT[1:3]), connection=1)
    rig.settle()
    assert rig.verdict(1).tokens == TEXT[1:4]


def test_a_refusal_names_the_refused_round(rig: Rig) -> None:
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))
    rig.dispatch()
    rig.receive(opening(epoch=1, round=2, committed=TEXT[:1]), connection=2)  # while its step runs
    rig.fail("out of memory")
    assert (rig.refused(2).round, rig.silent) == (2, True)
    rig.receive(Draft(ID, 3, 1, []), connection=2)
    assert rig.refused(2).round == 3
    rig.receive(opening(epoch=2, round=4, prompt=[]), connection=2)
    assert rig.refused(2).round == 4


def test_log_probabilities_match_their_tokens_after_being_switched_off_and_on(rig: Rig) -> None:
    said: list[int] = []
    for epoch, logprobs in enumerate((0, None, 0, 2)):
        again = opening(epoch=epoch, round=epoch, committed=said, serve=True, logprobs=logprobs)
        rig.receive(again, connection=epoch)
        rig.steps(2)
        for verdict in rig.verdicts(epoch):
            assert [e.token for e in verdict.logprobs] in ([], verdict.tokens)
        if logprobs == 0:
            last = rig.verdicts(epoch)[-1]
            assert last.logprobs
            said = TEXT[: last.base + len(last.tokens)]
        rig.lose(epoch)  # of the others nothing was heard


def test_a_session_without_slo_is_served_among_sessions_with_one() -> None:
    rig = Rig(slots=2, slot_tokens=200, step_tokens=100, batching="wisp")
    rig.receive(opening("calm-session", serve=True, max_tokens=60), connection=0)
    for i in range(1, 60):
        rig.receive(opening(f"session-{i}", serve=True, max_tokens=20, slo=Slo(800.0, 60.0)), connection=i)
        rig.steps(10)
        if rig.sent.get(0) and rig.verdicts(0)[-1].finish:
            break
    assert rig.text(0) == toy_text(PROMPT, SAMPLING, 60)


def test_a_prompt_without_kv_is_not_prefilled_over_and_over() -> None:
    rig = Rig(slots=4, slot_tokens=300, kv_tokens=300, step_tokens=100, batching="wisp")
    for i in range(2):
        rig.receive(opening(f"session-{i}", serve=True, max_tokens=120, slo=CALM), connection=i)
    rig.steps(50)
    late = [i % 40 for i in range(250)]  # does not fit beside the others, and nothing is promised to it
    rig.receive(opening("calm-session", prompt=late, serve=True, max_tokens=5), connection=9)
    rig.settle(2000)
    assert rig.text(9) == toy_text(late, SAMPLING, 5)
    assert rig.engine.rows < 2 * (2 * 125 + 255)


def test_an_absurd_slo_is_refused_by_name(rig: Rig) -> None:
    rig.receive(opening(slo=Slo(500.0, 1e308)))
    refused = rig.refused()
    assert (refused.code, "1e+09 milliseconds" in refused.message) == ("malformed", True)


def test_parked_sessions_keep_their_order_after_a_failed_step() -> None:
    rig = Rig()
    for i in (1, 2):
        rig.receive(opening(f"session-{i}"), connection=i)
    rig.settle()
    for i, at in ((2, 10.0), (1, 50.0)):
        rig.now = at
        rig.lose(i)
    rig.receive(opening("session-3"), connection=3)
    rig.dispatch()
    rig.fail("out of memory")
    rig.now = 10.0 + rig.limits.park_s + 1.0
    rig.feed(Tick())
    assert [s.id for s in rig.verifier.sessions.values()] == ["session-1"]


def test_after_a_failed_step_a_session_whose_edge_drafts_goes_on() -> None:
    rig = Rig(batching="wisp")
    rig.receive(opening("session-a", slo=CALM), connection=1)
    rig.dispatch()
    rig.finish()
    rig.verdict(1)  # and now its edge drafts
    # A prompt that fills the step: a decode of session-a has no room in it.
    rig.receive(opening("session-b", prompt=[*range(30)], max_tokens=30, slo=Slo(10.0, 1e3)), connection=2)
    rig.dispatch()
    rig.fail("out of memory")
    rig.refused(2)
    rig.now += 2.0  # its next token is overdue
    assert not rig.dispatch()  # but there is nothing in the cache to decode from
    rig.receive(Draft("session-a", 1, 1, TEXT[1:3]), connection=1)
    rig.settle()
    assert rig.verdict(1).tokens == TEXT[1:4]


def test_fair_shares_between_keys_when_slots_are_short() -> None:
    rig = Rig(slots=1)
    for i in range(4):
        rig.receive(opening(f"greedy-{i}", serve=True, max_tokens=8), connection=i, key="greedy")
    rig.dispatch()
    rig.receive(opening("modest-0", serve=True, max_tokens=8), connection=9, key="modest")
    rig.settle()
    finished = [s.session for r in rig.runs for s in r.slices if s.position == 7]
    assert finished.index(5) == 1  # second of five, though it came last


# --- replay


def test_an_event_log_replays_to_identical_actions(rig: Rig) -> None:
    for i in range(5):
        rig.receive(opening(f"session-{i}", serve=i % 2 == 0, max_tokens=9), connection=i)
        rig.dispatch()
        rig.finish()
    rig.lose(3)
    rig.settle()
    packed = msgspec.msgpack.encode(rig.log)
    again = Verifier(rig.limits, batching_policy("continuous"), Admission(100))
    events = msgspec.msgpack.decode(packed, type=list[tuple[float, InEvent]])
    actions = [action for now, event in events for action in again.handle(now, event)]
    assert [a for a in actions if isinstance(a, Run)] == rig.runs
    assert sum(isinstance(a, Send) for a in actions) == sum(map(len, rig.sent.values())) + rig.lost


def test_a_verdict_has_the_price_of_its_own_session() -> None:
    rig = Rig(batching="wisp")
    for connection, tpot_ms in ((1, 1.0), (2, 1000.0)):  # steps take 10 ms: 1 is late, 2 ahead
        slo = Slo(ttft_ms=5000.0, tpot_ms=tpot_ms)
        rig.receive(opening(f"session-{connection}", serve=True, max_tokens=10, slo=slo), connection)
    rig.settle()
    late, ahead = (rig.verdicts(connection)[-2].price for connection in (1, 2))
    assert 0.0 < late < ahead


# --- the table


def test_every_state_can_end_and_the_end_is_final() -> None:
    assert TRANSITIONS[State.ENDED] == {}
    for state in State:
        reached = {state}
        while True:
            more = {to for s in reached for to in TRANSITIONS[s].values()} | reached
            if more == reached:
                break
            reached = more
        assert State.ENDED in reached


def test_an_illegal_event_leaves_the_state_untouched(rig: Rig) -> None:
    rig.receive(opening())
    session = rig.verifier.sessions[1]
    before = session.state
    with pytest.raises(Exception, match="makes no sense"):
        session.go(Event.MORE)
    assert session.state is before


def test_candidates_have_the_right_kind() -> None:
    rig = Rig(step_tokens=4)
    rig.receive(opening(prompt=[1] * 12, draft=[1, 2]))
    session = rig.verifier.sessions[1]
    assert candidate_of(session).kind is Kind.PREFILL


def test_an_edge_that_resumes_during_the_last_step_gets_all_tokens(rig: Rig) -> None:
    rig.receive(opening(serve=True, max_tokens=2))
    rig.dispatch()
    rig.finish()
    rig.dispatch()  # the last token is being decoded; the edge has heard nothing of the first
    rig.receive(opening(epoch=1, round=1, serve=True, max_tokens=2), connection=2)
    rig.finish()
    verdict = rig.verdict(2)
    assert (verdict.base, verdict.tokens, verdict.finish) == (0, TEXT[:2], "length")


def test_a_draft_answered_at_once_leaves_nothing_to_run(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:4]))
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 5, TEXT[5:7]))  # waits for the engine
    rig.receive(Draft(ID, 2, 1, TEXT[1:3]))  # replaces it, and says nothing new
    assert rig.verdict().tokens == TEXT[1:5]
    assert not rig.dispatch()


def test_an_infeasible_slo_is_served_best_effort() -> None:
    rig = Rig(batching="wisp")
    rig.verifier.cost = rig.verifier.planner.cost = CostModel(Coefficients(step=40.0, token=0.3))
    rig.receive(opening(slo=Slo(ttft_ms=1.0, tpot_ms=0.001)))
    [session] = rig.verifier.sessions.values()
    assert session.targets.slo is None
    assert session.due == math.inf
    assert not session.targets.tpot_s
    rig.settle()
    assert session.n_committed > 0


def test_a_long_prompt_takes_few_bytes_per_token() -> None:
    """A session's copy of the prompt, besides the message. As a list it would take 36 bytes per token."""
    n = 20_000
    rig = Rig(slot_tokens=2 * n, step_tokens=2 * n)
    frames = [
        encode(opening(f"session-{i}", prompt=[j % N_VOCAB for j in range(n)], max_tokens=5))
        for i in range(4)
    ]
    tracemalloc.start()
    try:
        for number, frame in enumerate(frames):
            opened = decode_edge_message(frame)
            assert isinstance(opened, Open)
            rig.verifier.handle(0.0, Received(number, "", opened))
        del opened
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < len(frames) * n * 6


def test_sessions_that_end_without_an_edge_are_reported() -> None:
    rig = Rig()
    rig.receive(opening("session-1"))
    rig.receive(opening("session-2"))
    rig.receive(opening("session-3", max_tokens=1), connection=2)
    assert rig.dispatch()
    rig.lose(2)  # while its last token is being decoded
    rig.finish()
    rig.settle()
    assert rig.ended == [Ended("session-3", "expired")]
    rig.receive(Cancel("session-2"), connection=7)
    rig.receive(Cancel("session-2"))
    rig.lose()
    rig.now += rig.limits.park_s
    rig.feed(Tick())
    assert rig.ended[1:] == [Ended("session-2", "abort"), Ended("session-1", "expired")]
    assert not rig.verifier.sessions


# --- whose text it is, and what cannot be computed


@pytest.mark.parametrize("committed", [[], TEXT[:3]])
def test_a_verifier_continues_the_text_of_its_own_model(committed: list[int]) -> None:
    rig = Rig(digest="wisp")
    rig.receive(opening(committed=committed, digest="wisp"))
    rig.settle()
    assert rig.verdict().tokens == TEXT[len(committed) :][:1]


@pytest.mark.parametrize("committed", [[], TEXT[:3]])
def test_a_verifier_refuses_the_text_of_another_model(committed: list[int]) -> None:
    rig = Rig(digest="wisp")
    rig.receive(opening(committed=committed, digest="theirs"))
    refused = rig.refused()
    assert (refused.code, refused.fatal, refused.retry_after) == ("model_changed", True, 0.0)
    assert not rig.verifier.sessions


def test_committed_text_without_a_digest_is_refused() -> None:
    """An edge of a release without digests may begin answers but not resume them."""
    rig = Rig(digest="wisp")
    rig.receive(opening(committed=TEXT[:3]))
    refused = rig.refused()
    assert (refused.code, refused.fatal) == ("model_changed", True)
    assert "WISP 0.2.0 or later" in refused.message
    rig.receive(opening())
    rig.settle()
    assert rig.verdict().tokens == TEXT[:1]


def test_a_parked_session_is_resumed_by_the_model_that_began_it() -> None:
    rig = Rig(digest="wisp")
    rig.receive(opening(digest="wisp"))
    rig.settle()
    rig.verdict()
    rig.lose()
    rig.receive(opening(epoch=1, committed=TEXT[:1], digest="theirs"), connection=2)
    assert rig.refused(2).code == "model_changed"
    rig.receive(opening(epoch=1, committed=TEXT[:1], digest="wisp"), connection=2)
    rig.settle()
    assert rig.verdict(2).tokens == TEXT[1:2]


@pytest.mark.parametrize("its_edge", ["waits", "is lost", "has cancelled"])
def test_logits_that_are_not_finite_end_only_their_own_session(rig: Rig, its_edge: str) -> None:
    rig.engine.poison = 33
    rig.receive(opening("poisoned-1", prompt=[1, 2, 33]))
    rig.receive(opening("bystander", prompt=[4, 5, 6]), connection=2)
    rig.dispatch()
    assert rig.run is not None
    assert len(rig.run.slices) == 2
    if its_edge == "is lost":
        rig.lose()
    elif its_edge == "has cancelled":
        rig.receive(Cancel("poisoned-1"))
    rig.finish()
    if its_edge == "waits":
        refused = rig.refused()
        assert (refused.session, refused.code, refused.fatal) == ("poisoned-1", "logits_not_finite", True)
        assert (refused.message, refused.retry_after) == (NO_TOKEN, 0.0)
    rig.settle()
    assert rig.verdict(2).tokens == toy_text([4, 5, 6], SAMPLING, 1)
    assert [s.id for s in rig.verifier.sessions.values()] == ["bystander"]
    rig.engine.poison = -1
    rig.receive(opening("follow-up", prompt=[1, 2, 33, 4]))
    rig.settle()
    assert rig.verdict().tokens == toy_text([1, 2, 33, 4], SAMPLING, 1)
    assert rig.runs[-1].slices[0].start == 0  # none of the first one's KV is believed in


def test_event_logs_of_earlier_releases_can_be_read() -> None:
    """They have `forecast` for `slo_admission`, and `from_edge` for a message received."""
    old = {
        "n_vocab": 9,
        "eos": [],
        "slots": 1,
        "slot_tokens": 9,
        "kv_tokens": 9,
        "step_tokens": 9,
        "forecast": True,
    }
    assert msgspec.convert(old, Limits).slo_admission
    assert msgspec.to_builtins(Received(1, "key", Cancel("session-1")))[0] == "from_edge"
