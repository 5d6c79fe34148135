"""What an edge tells of its rounds, and why it does not draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from test_redirects import TOKENS, TRUTH, FakeVerifier, Prophet, device
from waiting import run
from wisp.api.backend import Generation
from wisp.api.extras import Extras
from wisp.api.origins import origin
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead, Fixed
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Task
from wisp.core.protocol.messages import Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Committed, Round
from wisp.edge.backend import EdgeBackend
from wisp.edge.rounds import WHY, RoundLog
from wisp.edge.status import edge_status
from wisp.engines.base import Proposal


async def rounds(edge: EdgeBackend, **extras: bool) -> list[Committed]:
    generation = Generation([1, 2, 3], Sampling(seed=7), TOKENS, extras=Extras(**extras))
    return [item async for item in edge.generate(generation)]


def told(items: Sequence[Committed]) -> list[Round]:
    return [item.round for item in items if item.round is not None]


def test_a_drafting_edge_tells_each_round_to_those_who_ask() -> None:
    async def scenario() -> None:
        verifier = FakeVerifier()
        async with verifier.listening() as url, device(url, drafter=Prophet()) as edge:
            seen = await rounds(edge, rounds=True)
            assert [t for item in seen for t in item.tokens] == TRUTH
            found = told(seen)
            assert sum(r.drafted for r in found) == sum(item.drafted for item in seen)
            assert sum(r.accepted for r in found) == sum(item.accepted for item in seen)
            assert all(r.at_ms >= r.flight_ms >= 0.0 for r in found)
            assert sum(r.steps for r in found) > 0
            assert told(await rounds(edge)) == [], "who does not ask is told nothing"
            status = edge_status(edge, "connecting", "ws://verifier:8100/v1/sessions")
            assert status["verifier"]["address"] == "verifier:8100"
            assert status["drafting"]["drafter"] == "prophet"
            assert status["verifier"]["connected"]

    run(scenario())


@pytest.mark.parametrize("drafter", [None, Prophet()])
def test_an_edge_says_why_it_does_not_draft(drafter: Any) -> None:
    async def scenario() -> None:
        verifier = FakeVerifier()
        async with verifier.listening() as url, device(url, drafter=drafter) as edge:
            seen = told(await rounds(edge, rounds=True, draft=False))
            why = "no_drafter" if drafter is None else "switched_off"
            assert {r.why for r in seen} == {why}
            assert sum(r.drafted for r in seen) == 0
            here = edge_status(edge, "")["drafting"]["why"]
            assert here == ("no_drafter" if drafter is None else ""), (
                "one request's wish is not the edge's state"
            )

    run(scenario())


# --- reasons, by hand


def asked(price: float = 0.0, *, dry: bool = False, serve: bool = False, draft: Sequence[int] = ()) -> Round:
    """The second round of a session that sent `draft`."""
    drafter = Drafter("session1", Task([1], Sampling(), 20), Fixed(2), frozenset())
    log = RoundLog(0.0, drafter.times, off="")
    for action in drafter.connected(0.0, 8):
        log.sent(0.0, action)  # type: ignore[arg-type]
    first = Verdict("session1", 0, 0, 0, [5])
    log.verdict(10.0, first, drafter)
    drafter.verdict(10.0, first)
    for token in draft:
        log.proposed(3.0, Proposal(token, Signal()))
        actions = drafter.proposed(13.0, token, Signal(), 3.0)
    if not draft:
        log.proposed(3.0, None if dry else Proposal(5, Signal()))
        actions = drafter.proposed(13.0, None, Signal(), 3.0)
    drafter.rounds.serve = serve
    for action in actions:
        log.sent(20.0, action)  # type: ignore[arg-type]
    verdict = Verdict("session1", 1, 1, len(draft), [*draft, 9], queue_ms=2.0, engine_ms=5.0, price=price)
    log.verdict(40.0, verdict, drafter)
    (committed,) = (a for a in drafter.verdict(40.0, verdict) if isinstance(a, Committed))
    found = log.told(committed).round
    assert found is not None
    assert log.told(committed).round is None, "once"
    return found


def test_a_round_is_told_in_its_parts() -> None:
    found = asked(draft=[6, 7])
    assert (found.draft_ms, found.flight_ms, found.queue_ms, found.verify_ms) == (6.0, 13.0, 2.0, 5.0)
    assert (found.at_ms, found.drafted, found.accepted, found.steps, found.why) == (40.0, 2, 2, 2, "")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dry": True}, "nothing_to_propose"),
        ({"price": 0.5}, "price"),
        ({}, "unlikely"),
        ({"serve": True}, "slow_device"),
    ],
)
def test_a_round_without_a_draft_has_a_reason(given: dict[str, Any], why: str) -> None:
    assert asked(**given).why == why
    assert why in WHY


class Followed:
    """A drafting session whose every proposal and verdict is recorded."""

    def __init__(self, max_branches: int = 0) -> None:
        self.drafter = Drafter("session1", Task([1], Sampling(), 20), Fixed(4), frozenset(), ahead=Ahead())
        self.log = RoundLog(0.0, self.drafter.times, off="")
        self.drafter.connected(0.0, 8, "", max_branches)
        self.verdict(Verdict("session1", 0, 0, 0, [5]))

    def proposed(
        self, token: int, signal: Signal, then: tuple[int, ...] = (), other: int | None = None
    ) -> None:
        self.log.proposed(1.0, Proposal(token, signal, then, other))
        self.drafter.proposed(10.0, token, signal, 1.0, then, other)

    def verdict(self, verdict: Verdict) -> Committed:
        """What the user is told of it."""
        self.log.verdict(20.0, verdict, self.drafter)
        (committed,) = (a for a in self.drafter.verdict(20.0, verdict) if isinstance(a, Committed))
        return self.log.told(committed)


def test_draft_tokens_that_a_grammar_left_no_choice_for_are_told_and_cost_no_step() -> None:
    made = Followed()
    made.proposed(6, Signal(0.9), (7, 8))  # one guess, and two that follow for certain
    made.proposed(9, Signal(1.0, certain=True))  # none but this
    item = made.verdict(Verdict("session1", 1, 1, 4, [6, 7, 8, 9, 3]))
    assert item.round is not None
    assert (item.round.forced, item.round.steps) == ([1, 2, 3], 1)
    assert [origin(item, i) for i in range(5)] == ["draft", "forced", "forced", "forced", "bonus"]
    for token in (8, 7, 6, 5):  # the next ones are guesses again
        made.proposed(token, Signal(0.9))
    item = made.verdict(Verdict("session1", 2, 6, 1, [8, 2]))
    assert item.round is not None
    assert item.round.forced == []


def branching() -> Followed:
    """The third token of the chain was forced, and the second of the branch."""
    made = Followed(max_branches=1)
    made.proposed(6, Signal(0.5), other=26)
    made.proposed(7, Signal(0.9))
    made.proposed(8, Signal(1.0, certain=True))
    made.proposed(9, Signal(0.9))
    drafter = made.drafter
    while drafter.wants_token(10.0):
        at = drafter.branches.growing
        if at is None or len(at.tokens) > 2:  # there is nothing to propose
            drafter.proposed(10.0, None, Signal(), 1.0)
        else:
            made.proposed(26 + len(at.tokens), Signal(1.0, certain=len(at.tokens) == 1))
    return made


def test_what_was_forced_in_a_branch_is_not_told_of_the_chain() -> None:
    item = branching().verdict(Verdict("session1", 1, 1, 4, [6, 7, 8, 9, 3]))
    assert item.round is not None
    assert item.round.forced == [2]


def test_what_was_forced_in_a_branch_is_told_where_the_text_goes_along_it() -> None:
    made = branching()
    made.verdict(Verdict("session1", 1, 1, 0, [26]))
    item = made.verdict(Verdict("session1", 2, 1, 3, [26, 27, 28, 3]))
    assert item.round is not None
    assert (item.from_draft, item.round.forced) == (2, [0])
