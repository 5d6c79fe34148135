"""What a verifier takes up to the bound, and refuses behind it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rig import SAMPLING, Rig
from toy import EOS, N_VOCAB, toy_text
from wisp.core.protocol.constraints import Constraints
from wisp.core.protocol.messages import Cancel, Draft, Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import LONGEST_MS, Slo
from wisp.core.verify.admission import KeyLimits

ID = "session-1"
PROMPT = [1, 2, 3]
TEXT = toy_text(PROMPT, SAMPLING, 40)
CONTEXT = 64  # tokens of a slot
MOST_DRAFT = 8


def opening(session: str = ID, epoch: int = 0, **changes: Any) -> Open:
    return msgspec.structs.replace(Open(session, epoch, PROMPT, SAMPLING, 40), **changes)


def constrained(constraints: Constraints) -> Sampling:
    return msgspec.structs.replace(SAMPLING, constraints=constraints)


TAKEN: dict[str, dict[str, Any]] = {
    "the longest prompt": {"prompt": [1] * (CONTEXT - 1), "max_tokens": 1},
    "the longest answer": {"max_tokens": CONTEXT - len(PROMPT)},
    "an answer of one token": {"max_tokens": 1},
    "all but the last token": {"committed": TEXT[:4], "max_tokens": 5},
    "no alternatives": {"logprobs": 0},
    "most alternatives": {"logprobs": 20},
    "no first target": {"slo": Slo(0.0, 50.0)},
    "no second target": {"slo": Slo(50.0, 0.0)},
    "the longest targets": {"slo": Slo(LONGEST_MS, LONGEST_MS)},
    "the first and the last id": {"prompt": [0, N_VOCAB - 1], "draft": [0, N_VOCAB - 1]},
    "the longest draft": {"draft": [1] * MOST_DRAFT},
    "an end that is ignored": {"committed": [EOS], "ignore_eos": True},
    "a constraint on the last id": {"sampling": constrained(Constraints(allowed=(0, N_VOCAB - 1)))},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt that fills the context": (
        {"prompt": [1] * CONTEXT, "max_tokens": 1},
        "context_length_exceeded",
    ),
    "an answer beyond the context": ({"max_tokens": CONTEXT - len(PROMPT) + 1}, "context_length_exceeded"),
    "an answer of nothing": ({"max_tokens": 0}, "context_length_exceeded"),
    "what is committed past its stop": (
        {"committed": TEXT[:2], "sampling": constrained(Constraints(stop_token_ids=(TEXT[1],)))},
        "malformed",
    ),
    "a whole answer": ({"committed": TEXT[:5], "max_tokens": 5}, "malformed"),
    "negative alternatives": ({"logprobs": -1}, "malformed"),
    "too many alternatives": ({"logprobs": 21}, "malformed"),
    "a negative first target": ({"slo": Slo(-0.5, 50.0)}, "malformed"),
    "a negative second target": ({"slo": Slo(50.0, -0.5)}, "malformed"),
    "too long a first target": ({"slo": Slo(2 * LONGEST_MS, 50.0)}, "malformed"),
    "too long a second target": ({"slo": Slo(50.0, 2 * LONGEST_MS)}, "malformed"),
    "a negative id in a prompt": ({"prompt": [1, -1]}, "out_of_vocabulary"),
    "a negative id in a draft": ({"draft": [-1]}, "out_of_vocabulary"),
    "an id too high in a draft": ({"draft": [N_VOCAB]}, "out_of_vocabulary"),
    "an id too high in what is committed": ({"committed": [N_VOCAB]}, "out_of_vocabulary"),
    "too long a draft": ({"draft": [1] * (MOST_DRAFT + 1)}, "oversized"),
    "a constraint on an id far too high": (
        {"sampling": constrained(Constraints(allowed=(0, 3 * N_VOCAB)))},
        "out_of_vocabulary",
    ),
    "a constraint on an id too high": (
        {"sampling": constrained(Constraints(allowed=(0, N_VOCAB)))},
        "out_of_vocabulary",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_an_open_at_the_bound_is_taken(case: str) -> None:
    rig = Rig(slot_tokens=CONTEXT)
    rig.receive(opening(**TAKEN[case]))
    rig.settle()
    assert len(rig.verdict().tokens) >= 1


@pytest.mark.parametrize("case", REFUSED)
def test_an_open_behind_the_bound_is_refused_and_leaves_nothing(case: str) -> None:
    changes, code = REFUSED[case]
    rig = Rig(slot_tokens=CONTEXT)
    rig.receive(opening(**changes))
    refused = rig.refused()
    assert (refused.code, refused.fatal, refused.retry_after) == (code, True, 0.0)
    assert not rig.verifier.sessions
    assert not rig.dispatch()


@pytest.mark.parametrize("size", [CONTEXT, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT])
def test_a_prompt_beyond_the_context_is_named_with_its_length(size: int) -> None:
    rig = Rig(slot_tokens=CONTEXT)
    rig.receive(opening(prompt=[1] * size, max_tokens=1))
    assert rig.refused().message == f"the prompt has {size} tokens; the context is {CONTEXT}"


def test_a_draft_may_be_as_long_as_the_limit_says() -> None:
    rig = Rig()
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1 : 1 + MOST_DRAFT]))
    rig.settle()
    assert rig.verdict().tokens == TEXT[1 : 2 + MOST_DRAFT]


@pytest.mark.parametrize("epoch", [3, 2, 0])
def test_an_epoch_must_be_newer_than_all_before(epoch: int) -> None:
    rig = Rig()
    rig.receive(opening(epoch=3))
    rig.settle()
    rig.verdict()
    rig.receive(opening(epoch=epoch, round=1), connection=2)
    refused = rig.refused(2)
    assert (refused.code, refused.fatal) == ("stale_epoch", False)
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))  # and the session stays with its edge
    rig.settle()
    assert rig.verdict().tokens == TEXT[1:4]


def test_a_duplicate_of_a_draft_under_verification_is_not_answered_twice() -> None:
    rig = Rig()
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))
    assert rig.silent
    rig.settle()
    assert rig.verdict().tokens == TEXT[1:4]
    assert rig.silent
    rig.receive(Draft(ID, 0, 0, []))  # the round before the last
    refused = rig.refused()
    assert (refused.code, refused.round, refused.fatal) == ("out_of_turn", 0, False)


def test_a_refusal_says_what_would_be_taken() -> None:
    rig = Rig(slot_tokens=CONTEXT)
    rig.receive(opening(max_tokens=CONTEXT))
    assert rig.refused().message == f"max_tokens must be between 1 and {CONTEXT - len(PROMPT)} here"
    rig.receive(opening(sampling=msgspec.structs.replace(SAMPLING, top_p=0.0)))
    assert rig.refused().message == "top_p must be above 0 and at most 1"


@pytest.mark.parametrize("round_", [1, 1000, 1 << 40])
def test_a_duplicate_is_answered_from_the_last_verdict_in_any_round(round_: int) -> None:
    rig = Rig()
    rig.receive(opening())
    rig.settle()
    rig.verdict()
    rig.receive(Draft(ID, round_, 1, TEXT[1:3]))
    rig.receive(Draft(ID, round_, 1, TEXT[1:3]))  # while it is under verification
    rig.settle()
    first = rig.verdict()
    assert rig.silent
    rig.receive(Draft(ID, round_, 1, TEXT[1:3]))
    assert rig.verdict() == first
    assert not rig.dispatch()


def test_a_draft_may_build_on_any_committed_token() -> None:
    rig = Rig()
    rig.receive(opening(draft=TEXT[:3]))
    rig.settle()
    rig.verdict()
    for round_, base in enumerate(range(5), 1):
        rig.receive(Draft(ID, round_, base, []))
        rig.settle()
        verdict = rig.verdict()
        assert (verdict.base, verdict.tokens[: 4 - base]) == (base, TEXT[base:4])
    assert verdict.tokens == TEXT[4:5]  # only the last had nothing new to be told


def test_the_limit_of_a_key_counts_open_sessions_alone() -> None:
    rig = Rig(limits={"a": KeyLimits(sessions=1)})
    rig.receive(opening("session-1", max_tokens=1), key="a")
    rig.settle()
    assert rig.verdict().finish == "length"
    rig.receive(opening("session-2"), key="a")
    rig.receive(opening("session-3"), key="a")
    assert rig.refused().session == "session-3"
    rig.receive(Cancel("session-2"), key="a")
    rig.receive(opening("session-4"), key="a")
    assert rig.silent


def test_a_text_ends_at_its_stop_token_and_at_no_other() -> None:
    stop = TEXT[2]
    rig = Rig()
    rig.receive(opening(serve=True, sampling=constrained(Constraints(stop_token_ids=(stop,)))))
    rig.settle()
    found = rig.verdicts()
    end = TEXT.index(stop) + 1
    assert [t for v in found for t in v.tokens] == TEXT[:end]
    assert [v.finish for v in found] == [*[""] * (end - 1), "stop"]
