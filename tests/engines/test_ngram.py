"""Drafting by looking back."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from wisp.core.draft.signals import Signal
from wisp.core.errors import ConfigError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import Proposal
from wisp.engines.both import NgramThenModel
from wisp.engines.ngram import NgramDraft


def token(drafter: NgramDraft, context: list[int], session: str = "s") -> int | None:
    proposal = drafter.propose(session, context, 0, Sampling())
    return None if proposal is None else proposal.token


def confidence(context: list[int]) -> float:
    proposal = NgramDraft().propose("s", context, 0, Sampling())
    assert proposal is not None
    return proposal.signal.confidence


def test_the_last_continuation_is_proposed() -> None:
    assert token(NgramDraft(), [1, 2, 3, 4, 9, 1, 2, 3]) == 4


def test_the_longest_match_wins_over_a_more_recent_short_one() -> None:
    assert token(NgramDraft(), [1, 2, 3, 4, 50, 2, 3, 4, 60, 1, 2, 3, 4]) == 50
    assert token(NgramDraft(longest=3), [1, 2, 3, 4, 50, 2, 3, 4, 60, 1, 2, 3, 4]) == 60


def test_without_a_match_nothing_is_proposed() -> None:
    assert token(NgramDraft(), [1, 2, 3, 4, 5]) is None
    assert token(NgramDraft(), [5, 6, 7, 5]) is None  # one token in common is no match
    assert token(NgramDraft(shortest=1), [5, 6, 7, 5]) == 6
    assert token(NgramDraft(), []) is None


def test_a_repetition_is_followed_to_its_own_end() -> None:
    drafter, context = NgramDraft(), [7, 8, 7, 8, 7, 8]
    for expected in (7, 8, 7, 8):
        assert token(drafter, context) == expected
        context.append(expected)


def test_longer_and_more_consistent_matches_are_more_confident() -> None:
    phrase = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    short = confidence([*phrase, 30, 31, 8, 9])
    long = confidence([*phrase, 30, 31, *phrase])
    mixed = confidence([1, 2, 40, 1, 2, 41, 1, 2, 42, 1, 2])
    steady = confidence([1, 2, 40, 1, 2, 40, 1, 2, 40, 1, 2])
    assert 0 < mixed < short < long < 1
    assert mixed < steady < 1


def test_sessions_are_apart_and_can_be_forgotten() -> None:
    drafter = NgramDraft()
    assert token(drafter, [1, 2, 3, 1, 2], "a") == 3
    assert token(drafter, [1, 2], "b") is None
    drafter.forget("a")
    drafter.forget("a")
    assert token(drafter, [1, 2], "a") is None


def test_an_incremental_history_equals_one_built_afresh() -> None:
    rng = random.Random(3)
    drafter = NgramDraft()
    context: list[int] = []
    for _ in range(600):
        if rng.random() < 0.3:  # a rejected draft: some of the end was never said
            del context[max(0, len(context) - rng.randint(1, 12)) :]
        context += [rng.randrange(4) for _ in range(rng.randint(0, 8))]
        mine = drafter.propose("s", context, 0, Sampling())
        assert mine == NgramDraft().propose("s", context, 0, Sampling())


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError):
        NgramDraft(longest=1, shortest=2)


def test_before_a_model_it_is_believed_where_it_is_sure() -> None:
    class Model:
        name = "model"
        asked = 0

        def propose(
            self,
            session: str,
            context: Sequence[int],
            position: int,
            sampling: Sampling,
            edit: Edit | None = None,
        ) -> Proposal:
            self.asked += 1
            return Proposal(99, Signal(confidence=0.5))

        def forget(self, session: str) -> None: ...

        def close(self) -> None: ...

    model = Model()
    both = NgramThenModel(NgramDraft(), model)
    repeated = [1, 2, 3, 4, 5, 6] * 4
    sure = both.propose("s", repeated, 0, Sampling())
    assert sure is not None
    assert (sure.token, sure.signal.counted, model.asked) == (1, True, 0)
    unsure = both.propose("t", [1, 2, 3, 4], 0, Sampling())
    assert unsure is not None
    assert (unsure.token, model.asked) == (99, 1)
