"""Branches: what an edge drafts for other outcomes of the draft in flight, and what a verifier makes of it."""

from __future__ import annotations

import pytest

from rig import SAMPLING, Rig
from test_drafter import Bold, opened
from test_verifier import ID, PROMPT, TEXT, WRONG, opening
from toy import N_VOCAB
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead, Fixed
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action, Phase, Task
from wisp.core.protocol.messages import MAX_BRANCHES, Branch, Draft, Open, Refused, Verdict
from wisp.core.protocol.step import Committed

# --- the verifier


@pytest.fixture
def rig() -> Rig:
    """One token is committed."""
    made = Rig()
    made.receive(opening())
    made.settle()
    assert made.verdict().tokens == TEXT[:1]
    return made


def ahead(*branches: Branch, round_: int = 2) -> Draft:
    """Behind a draft whose second token is wrong: a bet on all of it."""
    return Draft(ID, round_, 1, [TEXT[1], WRONG, TEXT[3], TEXT[4]], branches=list(branches))


def test_a_draft_goes_on_along_the_branch_that_is_right(rig: Rig) -> None:
    rig.receive(Draft(ID, 1, 1, [TEXT[1], WRONG]))
    rig.receive(ahead(Branch(0, WRONG, [1]), Branch(1, TEXT[2], TEXT[3:5])))
    rig.steps(1)
    assert rig.verdict().tokens == TEXT[1:3]
    rig.steps(1)
    verdict = rig.verdict()
    assert (verdict.round, verdict.base, verdict.accepted, verdict.tokens) == (2, 1, 4, TEXT[1:6])
    assert rig.runs[-1].slices[0].n_draft == 2
    assert rig.silent


def test_a_branch_may_be_wrong_further_on(rig: Rig) -> None:
    rig.receive(Draft(ID, 1, 1, [TEXT[1], WRONG]))
    rig.receive(ahead(Branch(1, TEXT[2], [TEXT[3], WRONG, TEXT[5]])))
    rig.settle()
    assert [(v.round, v.accepted, v.tokens) for v in (rig.verdict(), rig.verdict())] == [
        (1, 1, TEXT[1:3]),
        (2, 3, TEXT[1:5]),
    ]


def test_a_branch_may_stand_for_the_end_of_the_draft(rig: Rig) -> None:
    """All of it is right, and the verdict's own token is not the one that was guessed."""
    rig.receive(Draft(ID, 1, 1, TEXT[1:3]))
    rig.receive(Draft(ID, 2, 1, [*TEXT[1:3], WRONG, WRONG], branches=[Branch(2, TEXT[3], TEXT[4:6])]))
    rig.settle()
    assert [rig.verdict().tokens, rig.verdict().tokens] == [TEXT[1:4], TEXT[1:7]]


def test_branches_alone_wait_for_the_verdict_too(rig: Rig) -> None:
    rig.receive(Draft(ID, 1, 1, [TEXT[1], WRONG]))
    rig.receive(Draft(ID, 2, 1, [TEXT[1], WRONG], branches=[Branch(1, TEXT[2], TEXT[3:5])]))
    rig.settle()
    assert [rig.verdict().tokens, rig.verdict().tokens] == [TEXT[1:3], TEXT[1:6]]


def test_without_a_right_branch_the_answer_is_stale_and_costs_no_step(rig: Rig) -> None:
    rig.receive(Draft(ID, 1, 1, [TEXT[1], WRONG]))
    rig.receive(ahead(Branch(0, WRONG, [1]), Branch(1, WRONG, TEXT[3:5]), Branch(1, TEXT[2], [])))
    rig.steps(1)
    assert [rig.verdict().tokens, rig.verdict().tokens] == [TEXT[1:3], TEXT[1:3]]
    assert not rig.dispatch()


def test_a_waiting_draft_may_be_sent_again_with_branches(rig: Rig) -> None:
    rig.receive(Draft(ID, 1, 1, [TEXT[1], WRONG]))
    rig.dispatch()
    rig.receive(ahead())
    rig.receive(ahead(Branch(1, TEXT[2], TEXT[3:5])))
    rig.finish()
    rig.settle()
    assert [rig.verdict().tokens, rig.verdict().tokens] == [TEXT[1:3], TEXT[1:6]]
    rig.receive(ahead(Branch(1, TEXT[2], TEXT[3:5])))  # and again: a duplicate
    assert rig.verdict().tokens == TEXT[1:6]
    assert rig.silent


def test_branches_that_come_too_late_are_not_looked_at(rig: Rig) -> None:
    rig.receive(Draft(ID, 1, 1, [TEXT[1], WRONG]))
    rig.receive(ahead())
    rig.settle()
    first, second = rig.verdict(), rig.verdict()
    rig.receive(ahead(Branch(1, TEXT[2], TEXT[3:5])))
    assert (first.tokens, second, rig.verdict()) == (TEXT[1:3], second, second)
    assert not rig.dispatch()


@pytest.mark.parametrize(
    ("branches", "code"),
    [
        ([Branch(0, 1, [2])] * (MAX_BRANCHES + 1), "oversized"),
        ([Branch(0, 1, [2] * 8)], "oversized"),
        ([Branch(-1, 1, [2])], "malformed"),
        ([Branch(5, 1, [2])], "malformed"),
        ([Branch(0, N_VOCAB, [2])], "out_of_vocabulary"),
        ([Branch(0, 1, [2, -1])], "out_of_vocabulary"),
    ],
)
def test_bad_branches_are_refused_and_change_nothing(rig: Rig, branches: list[Branch], code: str) -> None:
    rig.receive(ahead(*branches))
    refused = rig.sent[1].popleft()
    assert isinstance(refused, Refused)
    assert (refused.code, refused.fatal, refused.round) == (code, False, 2)
    rig.receive(Draft(ID, 2, 1, TEXT[1:3]))
    rig.settle()
    assert rig.verdict().tokens == TEXT[1:4]


# --- the edge


def draft(made: Drafter, *, confidence: float = 0.9, most: int = 20) -> list[Draft]:
    """Let it draft as long as it wants to. A token is one more than the one before it, its second choice 20 more."""
    sent: list[Action] = []
    for _ in range(most):
        if not made.wants_token(0.0):
            break
        token = made.context()[-1] + 1
        sure = 0.3 if token == 11 else confidence  # 11 is doubtful
        sent += made.proposed(110.0, token, Signal(sure), 5.0, (), token + 20)
    return [message for message in sent if isinstance(message, Draft)]


def branching(max_branches: int = 4) -> tuple[Drafter, list[Draft]]:
    """Two tokens are in flight, and branches behind them."""
    made = opened(Fixed(2), ahead=Ahead(), max_branches=max_branches)
    return made, draft(made)


def test_an_edge_drafts_for_the_likeliest_other_outcome() -> None:
    _, sent = branching()
    assert (sent[0].tokens, sent[0].branches) == ([11, 12], [])
    last = sent[-1]
    assert (last.round, last.base, last.tokens[:2]) == (2, 1, [11, 12])
    assert last.branches[0] == Branch(0, 31, [32, 33])
    assert {message.round for message in sent[1:]} == {2}


def test_an_edge_sends_no_branches_to_a_verifier_that_knows_none() -> None:
    _, sent = branching(max_branches=0)
    assert sent
    assert not any(message.branches for message in sent)


def test_at_most_as_many_branches_as_the_verifier_takes() -> None:
    made = opened(Fixed(8), ahead=Ahead(energy=0.0), max_branches=2)
    assert max(len(message.branches) for message in draft(made, confidence=0.5, most=60)) == 2


def test_the_text_goes_on_along_a_branch_without_a_round_trip() -> None:
    made, sent = branching()
    assert made.verdict(200.0, Verdict("s", 1, 1, 0, [31])) == [Committed([31], drafted=2)]
    assert (made.phase, made.chain.tokens[:2], made.chain.sent) == (Phase.IN_FLIGHT, [32, 33], 2)
    assert made.branches.taken == 1
    (told,) = made.verdict(220.0, Verdict("s", sent[-1].round, 1, 3, [31, 32, 33, 34]))
    assert told == Committed([32, 33, 34], drafted=2, accepted=2, from_draft=2)
    assert made.committed == [10, 31, 32, 33, 34]


def test_a_branch_that_came_too_late_is_sent_as_the_next_draft() -> None:
    made, sent = branching()
    made.verdict(200.0, Verdict("s", 1, 1, 0, [31]))
    (again,) = made.verdict(201.0, Verdict("s", sent[-1].round, 1, 0, [31]))  # stale
    assert isinstance(again, Draft)
    assert (again.round, again.base, again.tokens) == (3, 2, [32, 33])


def test_branches_alone_are_of_no_use_where_all_of_the_draft_is_right() -> None:
    made = opened(Fixed(1), ahead=Ahead(), max_branches=4)
    made.proposed(110.0, 11, Signal(0.1), 5.0, (), 31)
    sent: list[Action] = []
    for _ in range(9):  # along the chain there is nothing to propose
        if not made.wants_token(110.0):
            break
        token = made.context()[-1] + 1 if made.branches.growing else None
        sent += made.proposed(110.0, token, Signal(0.9), 5.0)
    (alone,) = [message for message in sent if isinstance(message, Draft)]
    assert (alone.tokens, alone.branches) == ([11], [Branch(0, 31, [32])])
    made.verdict(200.0, Verdict("s", 1, 1, 1, [11, 12]))
    assert (made.phase, made.rounds.flights, made.context()[-1]) == (Phase.DRAFTING, [], 12)


def drafted_late(tokens: int) -> tuple[Drafter, list[Draft]]:
    """The verdict is about due, so that each token of a branch leaves at once."""
    made = opened(Fixed(4), ahead=Ahead(), max_branches=1)
    sent: list[Action] = []
    for token in (11, 12, 13, 14):
        sent += made.proposed(110.0, token, Signal(0.9), 5.0)
    made.verdict(200.0, Verdict("s", 1, 1, 4, [11, 12, 13, 14, 15]))
    for token in (16, 17, 18, 19):
        made.proposed(200.0, token, Signal(0.1 if token == 16 else 0.9), 5.0, (), token + 20)
    sent = []
    for _ in range(tokens):
        assert made.wants_token(270.0)
        assert made.branches.growing is not None
        sent += made.proposed(270.0, made.context()[-1] + 1, Signal(0.9), 5.0)
    return made, [message for message in sent if isinstance(message, Draft)]


def test_a_branch_that_is_shorter_than_a_fixed_draft_is_sent_again_as_it_grows() -> None:
    made, sent = drafted_late(2)
    assert [message.branches for message in sent] == [[Branch(0, 36, [37])], [Branch(0, 36, [37, 38])]]
    made.verdict(300.0, Verdict("s", 2, 6, 0, [36]))
    assert (made.chain.tokens, made.chain.sent) == ([37, 38], 2)


def test_what_is_certain_in_a_branch_says_nothing_of_the_time_of_a_draft_step() -> None:
    made, _ = drafted_late(1)
    before = made.times.draft.value
    assert made.wants_token(270.0)
    made.proposed(270.0, 38, Signal(1.0, certain=True), 0.01)
    assert made.times.draft.value == before


def test_a_lost_bet_without_a_branch_begins_anew() -> None:
    made, _ = branching()
    made.verdict(200.0, Verdict("s", 1, 1, 0, [77]))
    assert (made.phase, made.chain.tokens, made.branches.taken) == (Phase.DRAFTING, [], 0)
    assert made.context()[-1] == 77


def test_an_edge_learns_how_often_its_second_choice_is_right() -> None:
    made, _ = branching()
    before = made.times.second.value
    made.verdict(200.0, Verdict("s", 1, 1, 0, [31]))
    assert made.times.second.value > before
    made, _ = branching()
    made.verdict(200.0, Verdict("s", 1, 1, 0, [77]))
    assert made.times.second.value < before


def test_no_branch_begins_with_an_end_of_sequence() -> None:
    made = opened(Fixed(1), ahead=Bold(), max_branches=4)
    made.proposed(110.0, 11, Signal(0.1), 5.0, (), 99)
    made.proposed(110.0, 12, Signal(0.1), 5.0, (), 99)
    assert made.branches.guesses == []
    assert made.branches.growing is None


def test_edge_and_verifier_agree_on_the_branch_that_is_taken() -> None:
    """Each third first choice is wrong, and all second ones are right."""
    rig, edge = Rig(), Drafter(ID, Task(PROMPT, SAMPLING, 20), Fixed(2), frozenset(), ahead=Ahead())
    now, out = 0.0, edge.connected(0.0, 8, "", 4)
    while edge.phase is not Phase.DONE:
        for action in out:
            if not isinstance(action, Committed):
                assert isinstance(action, Open | Draft)
                rig.receive(action)
        out = []
        if edge.wants_token(now) and len(edge.chain.tokens) < 8:
            at = edge.position
            wrong = edge.branches.growing is None and at % 3 == 1
            signal = Signal(0.3 if wrong else 0.9)
            out = edge.proposed(now, WRONG if wrong else TEXT[at], signal, 1.0, (), TEXT[at])
        else:
            rig.steps(1)
            now += 100.0
            while rig.sent.get(1):
                out += edge.verdict(now, rig.verdict())
    assert edge.committed == TEXT[:20]
    assert edge.branches.taken
