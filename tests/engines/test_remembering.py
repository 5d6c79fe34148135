"""Earlier answers before the drafter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wisp.core.draft.signals import Signal
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import Proposal
from wisp.engines.remembering import Remembering

ANSWER = list(range(100, 140))
PROMPT = [1, 2, 3, 4]


class Fallback:
    """A drafter that always says 7, or nothing."""

    name = "seven"

    def __init__(self, token: int | None = 7) -> None:
        self.token = token
        self.asked = 0
        self.gone: list[str] = []

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        self.asked += 1
        return None if self.token is None else Proposal(self.token, Signal(confidence=0.3))

    def forget(self, session: str) -> None:
        self.gone.append(session)

    def close(self) -> None:
        self.gone.append("all")


def ask(drafter: Remembering, session: str, answer: Sequence[int], edit: Edit | None = None) -> int | None:
    proposal = drafter.propose(session, [*PROMPT, *answer], len(answer), Sampling(), edit)
    return None if proposal is None else proposal.token


def learnt(engine: Fallback, *salts: str) -> Remembering:
    """It has heard the same answer often."""
    drafter = Remembering(engine, 10_000)
    for salt in salts:
        for n in range(8):
            drafter.said(f"{salt}/{n}", PROMPT, ANSWER)
    return drafter


def test_what_was_said_before_is_proposed_without_the_drafter() -> None:
    engine = Fallback()
    drafter = learnt(engine, "")
    for n in range(12, 39):
        assert ask(drafter, "/new", ANSWER[:n]) == ANSWER[n]
    assert engine.asked == 0
    proposal = drafter.propose("/new", [*PROMPT, *ANSWER[:20]], 20, Sampling())
    assert proposal is not None
    assert proposal.signal.counted
    assert 0.8 < proposal.signal.confidence < 1.0


def test_the_drafter_reads_the_prompt_for_the_first_token() -> None:
    engine = Fallback()
    assert ask(learnt(engine, ""), "/new", []) == 7
    assert engine.asked == 1


def test_another_customers_words_are_not_used() -> None:
    drafter = learnt(Fallback(), "one")
    assert ask(drafter, "two/new", ANSWER[:20]) == 7
    assert ask(drafter, "/new", ANSWER[:20]) == 7


def test_what_a_revoked_customer_has_said_is_gone_and_stays_so() -> None:
    drafter = learnt(Fallback(), "one", "two")
    drafter.drop("one")
    drafter.said("one/last", PROMPT, ANSWER)  # was under way
    assert ask(drafter, "one/new", ANSWER[:20]) == 7
    assert ask(drafter, "two/new", ANSWER[:20]) == ANSWER[20]


def test_what_was_said_in_another_vocabulary_is_forgotten_and_what_comes_is_kept() -> None:
    drafter = learnt(Fallback(), "one")
    drafter.clear()
    assert ask(drafter, "one/new", ANSWER[:20]) == 7
    for n in range(8):
        drafter.said(f"one/{n}", PROMPT, ANSWER)
    assert ask(drafter, "one/new", ANSWER[:20]) == ANSWER[20]


def test_where_the_history_is_unsure_the_drafter_is_asked_first() -> None:
    drafter = Remembering(Fallback(), 10_000)
    for n in range(8):
        drafter.said(f"/{n}", PROMPT, [50, 51, 52, 60 + n])
    assert ask(drafter, "/new", [50, 51, 52]) == 7
    silent = Remembering(Fallback(None), 10_000)
    silent.said("/1", PROMPT, [50, 51, 52, 60])
    assert ask(silent, "/new", [50, 51, 52]) == 60  # better than nothing
    assert ask(silent, "/new", [40, 41, 42]) is None


def test_a_token_that_may_not_be_chosen_is_not_proposed() -> None:
    drafter = learnt(Fallback(), "")
    assert ask(drafter, "/new", ANSWER[:20], Edit(banned=np.array([ANSWER[20]], np.int64))) == 7


def test_memory_is_bounded() -> None:
    drafter = Remembering(Fallback(), 200)
    for n in range(50):
        drafter.said(f"/{n}", PROMPT, [1000 * n + i for i in range(40)])
    assert ask(drafter, "/new", [49_000, 49_001, 49_002]) is not None
    assert ask(drafter, "/new", [1, 1000, 1001, 1002]) == 7


def test_the_drafter_hears_of_ends() -> None:
    engine = Fallback()
    drafter = Remembering(engine, 200)
    assert drafter.name == "seven"
    drafter.forget("/1")
    drafter.close()
    assert engine.gone == ["/1", "all"]
