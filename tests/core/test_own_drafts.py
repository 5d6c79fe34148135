"""Drafts of the verifier's own: whom they are for, what they are made of, and that no text depends on them."""

from __future__ import annotations

import random

import msgspec
import pytest

from rig import SAMPLING, Rig
from toy import EOS, N_VOCAB, toy_text
from wisp.core.protocol.constraints import Constraints
from wisp.core.protocol.messages import Cancel, Draft, Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import KeyLimits
from wisp.core.verify.cost import Coefficients
from wisp.core.verify.events import KeyLimitsChanged
from wisp.core.verify.own_drafts import MOST

PROMPT = list(range(1, 11))  # long enough to count as one
TEXT = toy_text(PROMPT, SAMPLING, 30)
TOKENS = 1 << 14


def serving(session: str, max_tokens: int = 30, **changes: object) -> Open:
    opened = Open(session, 0, PROMPT, SAMPLING, max_tokens, serve=True)
    return msgspec.structs.replace(opened, **changes)


def rig(history_tokens: int = TOKENS, **options: object) -> Rig:
    """With a text in the history of the key "" that was said a few times."""
    made = Rig(batching="wisp", step_tokens=32, history_tokens=history_tokens, **options)  # type: ignore[arg-type]
    for n in range(3):
        made.receive(serving(f"earlier-{n}"))
        made.settle()
    made.sent.clear()
    made.runs.clear()
    return made


def drafted(rig: Rig) -> int:
    return sum(s.n_draft for run in rig.runs for s in run.slices)


def test_a_text_that_was_said_before_takes_few_steps() -> None:
    made = rig()
    made.receive(serving("session-1"))
    made.settle()
    assert made.text() == TEXT
    assert len(made.runs) <= 4
    assert made.verifier.own_drafts.accepted >= 25


def test_without_a_history_each_token_takes_a_step() -> None:
    made = rig(history_tokens=0)
    made.receive(serving("session-1"))
    made.settle()
    assert made.text() == TEXT
    assert len(made.runs) == 30


def test_where_nothing_matches_nothing_happens() -> None:
    made = rig()
    other = Sampling(seed=4)
    made.receive(serving("session-1", prompt=[9, 8], sampling=other))
    made.settle()
    assert made.text() == toy_text([9, 8], other, 30)
    assert drafted(made) == 0
    assert len(made.runs) == 30


@pytest.mark.parametrize(("key", "salt"), [("b", ""), ("", "another"), ("b", "another")])
def test_no_draft_is_made_of_the_words_of_another_key_or_salt(key: str, salt: str) -> None:
    made = rig()
    made.receive(serving("session-1", salt=salt), key=key)
    made.settle()
    assert made.text() == TEXT
    assert drafted(made) == 0


def test_what_a_revoked_key_has_said_is_gone() -> None:
    made = rig(limits={"a": KeyLimits(), "b": KeyLimits()})
    for key in "ab":
        made.receive(serving(f"said-by-{key}"), key=key)
        made.settle()
    made.receive(serving("under-way-1"), 2, key="a")
    made.steps(1)
    made.feed(KeyLimitsChanged({"b": KeyLimits()}))
    made.settle()  # the session goes on, and is not remembered
    assert set(made.verifier.own_drafts.histories) == {("", ""), ("b", "")}
    made.feed(KeyLimitsChanged({"a": KeyLimits(), "b": KeyLimits()}))
    made.receive(serving("session-1"), 3, key="a")
    made.settle()
    assert made.text(3) == TEXT
    assert set(made.verifier.own_drafts.histories) == {("", ""), ("b", ""), ("a", "")}


@pytest.mark.parametrize("batching", ["continuous", "fcfs", "paper", "wisp:keep"])
def test_policies_without_preemption_get_none(batching: str) -> None:
    made = Rig(batching=batching, history_tokens=TOKENS)
    for n in range(2):
        made.receive(serving(f"session-{n}"))
        made.settle()
    assert drafted(made) == 0


def test_a_dear_row_needs_a_likelier_token() -> None:
    made = rig()
    made.verifier.policy.price = 0.99
    made.receive(serving("session-1", 8))
    assert made.verifier.own_drafts.find(next(iter(made.verifier.sessions.values()))) is None
    made.settle()
    assert made.text() == TEXT[:8]


def test_where_rows_cost_as_much_as_steps_nothing_is_proposed() -> None:
    made = rig(cost=Coefficients(step=0.1, token=10.0))
    made.receive(serving("session-1"))
    made.settle()
    assert made.text() == TEXT
    assert drafted(made) == 0


def test_a_late_edge_gets_one_and_loses_nothing() -> None:
    made = rig()
    slo = Slo(1000.0, 100.0)
    made.receive(Open("session-1", 0, PROMPT, SAMPLING, 30, slo=slo))
    made.steps(1)
    assert made.text() == TEXT[:1]
    made.now += 5.0  # its tokens are long due
    made.steps(1)
    said = made.text()
    assert said == TEXT[: len(said)]
    assert len(said) > 2
    made.receive(Draft("session-1", 1, 1, TEXT[1:4]))  # late, and told already
    verdict = made.verdicts()[-1]
    assert (verdict.base, verdict.accepted) == (1, 3)
    made.receive(Draft("session-1", 2, len(said), TEXT[len(said) : len(said) + 2]))
    made.steps(1)
    assert made.verdicts()[-1].accepted == 2


def test_an_edge_with_nothing_to_propose_gets_one() -> None:
    made = rig()
    made.receive(Open("session-1", 0, PROMPT, SAMPLING, 30))
    made.steps(1)
    made.receive(Draft("session-1", 1, 1, []))
    made.steps(1)
    verdict = made.verdicts()[-1]
    assert verdict.accepted == 0  # nothing of the edge's own
    assert len(verdict.tokens) > 1
    assert verdict.tokens == TEXT[1 : 1 + len(verdict.tokens)]


def test_an_edges_own_draft_comes_first() -> None:
    made = rig()
    made.receive(Open("session-1", 0, PROMPT, SAMPLING, 30))
    made.steps(1)
    made.receive(Draft("session-1", 1, 1, [TEXT[1], N_VOCAB - 2]))
    made.steps(1)
    assert made.runs[-1].slices[0].tokens[1:] == [TEXT[1], N_VOCAB - 2]
    assert made.verdicts()[-1].accepted == 1


def test_own_drafts_say_nothing_of_the_edges_acceptance() -> None:
    made = rig()
    made.receive(serving("session-1"))
    made.dispatch()
    session = next(iter(made.verifier.sessions.values()))
    before = session.speed.acceptance
    made.settle()
    assert made.verifier.own_drafts.accepted > 0
    assert session.speed.acceptance == before


def test_a_constrained_session_has_the_wrong_ones_rejected() -> None:
    made = rig()
    banned = Sampling(seed=3, constraints=Constraints(((TEXT[4], -100.0),)))
    made.receive(serving("session-1", sampling=banned))
    made.settle()
    assert made.text() == toy_text(PROMPT, banned, 30)
    assert drafted(made) > 0


def test_nothing_is_proposed_behind_an_end_or_beyond_the_last_token() -> None:
    made = rig()
    made.receive(serving("session-1", 4))
    made.settle()
    assert made.text() == TEXT[:4]
    for run in made.runs:
        for s in run.slices:
            assert s.position + s.n_draft < 4
            assert EOS not in s.tokens[:-1]
            assert s.n_draft <= MOST


def test_a_cancelled_session_leaves_no_draft_behind() -> None:
    made = rig()
    made.receive(serving("session-1"))
    made.steps(2)
    made.dispatch()
    made.receive(Cancel("session-1"))
    made.finish()
    assert not made.verifier.sessions
    assert not made.dispatch()


@pytest.mark.parametrize("depth", [1, 2])
def test_two_steps_in_flight_wait_for_a_draft_that_gains_more_than_a_token(depth: int) -> None:
    made = rig(depth=depth)
    made.receive(serving("session-1"))
    made.settle()
    assert made.text() == TEXT
    assert len(made.runs) <= 8
    assert made.verifier.own_drafts.accepted >= 20


def test_two_steps_in_flight_decode_ahead_where_nothing_matches() -> None:
    made = rig(depth=2)
    other = Sampling(seed=4)
    made.receive(serving("session-1", prompt=[9, 8], sampling=other))
    made.settle()
    assert made.text() == toy_text([9, 8], other, 30)
    assert sum(s.after >= 0 for run in made.runs for s in run.slices) == 29


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("history_tokens", [40, TOKENS])
def test_texts_do_not_depend_on_them(depth: int, history_tokens: int) -> None:
    rng = random.Random(depth)
    made = Rig(
        slots=3, kv_tokens=120, step_tokens=12, batching="wisp", depth=depth, history_tokens=history_tokens,
        limits={"a": KeyLimits(), "b": KeyLimits()},
    )  # fmt: skip
    expected = {}
    for n in range(60):
        sampling, length = Sampling(seed=rng.randrange(3)), rng.randint(1, 30)
        slo = rng.choice((None, Slo(3000.0, 1000.0), Slo(200.0, 20.0)))
        made.receive(serving(f"session-{n}", length, sampling=sampling, slo=slo), n, rng.choice("ab"))
        expected[n] = toy_text(PROMPT, sampling, length)
        for _ in range(rng.randint(0, 6)):
            if made.dispatch():
                made.finish()
    made.settle(2000)
    assert {n: made.text(n) for n in expected} == expected
    assert made.verifier.own_drafts.accepted > 0
    assert made.verifier.own_drafts.histories.held <= history_tokens
