"""The drafter keeps its KV in step with any context it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import Proposal
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.llama.reference import reference_tokens

GREEDY = Sampling()
PROMPT = list(range(20, 60))


@pytest.fixture
def drafter(tiny_draft: Path) -> Iterator[LlamaDraft]:
    engine = LlamaDraft(tiny_draft, slots=2, slot_tokens=256, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def fresh(tiny_draft: Path) -> Iterator[LlamaDraft]:
    engine = LlamaDraft(tiny_draft, slots=1, slot_tokens=256, threads=1)
    yield engine
    engine.close()


def said(engine: LlamaDraft, session: str, context: list[int], sampling: Sampling = GREEDY) -> Proposal:
    proposal = engine.propose(session, context, 0, sampling)
    assert proposal is not None
    return proposal


def cost(engine: LlamaDraft, session: str, context: list[int]) -> int:
    before = engine.rows_evaluated
    said(engine, session, context)
    return engine.rows_evaluated - before


def test_proposals_chain_at_one_row_each(drafter: LlamaDraft) -> None:
    context = list(PROMPT)
    assert cost(drafter, "a", context) == 40
    for _ in range(5):
        context.append(said(drafter, "a", context).token)
        assert cost(drafter, "a", context) == 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.3, seed=12)])
def test_the_second_choice_is_what_is_said_without_the_first(drafter: LlamaDraft, sampling: Sampling) -> None:
    first = said(drafter, "a", PROMPT, sampling)
    barred = msgspec.structs.replace(sampling, min_tokens=1, ends=(first.token,))
    without = said(drafter, "a", PROMPT, barred)
    assert first.other == without.token != first.token


def test_the_same_noise_is_used_as_the_target_uses(drafter: LlamaDraft, tiny_draft: Path) -> None:
    sampling = Sampling(temperature=1.0, seed=12)
    expected = reference_tokens(tiny_draft, PROMPT, sampling, 12, exact=False)
    context = list(PROMPT)
    for position in range(12):
        proposal = drafter.propose("a", context, position, sampling)
        assert proposal is not None
        context.append(proposal.token)
    assert context[40:] == expected


def test_a_diverging_context_is_rolled_back_to_and_caught_up_with(
    drafter: LlamaDraft, fresh: LlamaDraft
) -> None:
    said(drafter, "a", [*PROMPT, 1, 2, 3, 4])
    after = [*PROMPT, 1, 9, 8]  # the target rejected 2, and decoded two tokens itself
    assert cost(drafter, "a", after) == 2
    mine, theirs = said(drafter, "a", after), said(fresh, "b", after)
    assert mine.token == theirs.token
    assert mine.signal.confidence == pytest.approx(theirs.signal.confidence, rel=1e-3)


def test_a_shorter_context_is_rolled_back_to(drafter: LlamaDraft, fresh: LlamaDraft) -> None:
    said(drafter, "a", PROMPT)
    assert cost(drafter, "a", PROMPT[:30]) == 1
    assert said(drafter, "a", PROMPT[:30]).token == said(fresh, "b", PROMPT[:30]).token


def test_sessions_do_not_disturb_each_other(drafter: LlamaDraft) -> None:
    said(drafter, "a", PROMPT)
    said(drafter, "b", PROMPT[::-1])
    assert cost(drafter, "a", [*PROMPT, 1]) == 1
    assert cost(drafter, "b", [*PROMPT[::-1], 1]) == 1


def test_the_least_recently_used_session_makes_room(drafter: LlamaDraft) -> None:
    said(drafter, "a", PROMPT)
    said(drafter, "b", PROMPT[::-1])
    said(drafter, "a", [*PROMPT, 1])
    said(drafter, "c", [5, 6, 7])
    assert cost(drafter, "a", [*PROMPT, 1, 2]) == 1
    assert cost(drafter, "b", [*PROMPT[::-1], 1]) == 41


def test_a_session_that_begins_like_another_copies_its_prefix(drafter: LlamaDraft, fresh: LlamaDraft) -> None:
    said(drafter, "a", [*PROMPT, 1, 2, 3])
    assert cost(drafter, "b", [*PROMPT, 7, 8]) == 2
    assert cost(drafter, "a", [*PROMPT, 1, 2, 3, 4]) == 1
    assert said(drafter, "b", [*PROMPT, 7, 8]).token == said(fresh, "x", [*PROMPT, 7, 8]).token


def test_a_follow_up_of_a_forgotten_session_reuses_what_it_left(drafter: LlamaDraft) -> None:
    said(drafter, "a", PROMPT)
    drafter.forget("a")
    drafter.forget("a")
    assert cost(drafter, "b", [*PROMPT, 1]) == 1


def test_cached_prefixes_serve_only_their_customer(drafter: LlamaDraft, fresh: LlamaDraft) -> None:
    said(drafter, "alice/a", PROMPT)
    assert cost(drafter, "bob/b", [*PROMPT, 1]) == len(PROMPT) + 1
    assert cost(drafter, "alice/c", [*PROMPT, 2]) == 1  # takes a's place, and begins as a did
    drafter.forget("alice/c")
    assert cost(drafter, "bob/d", [*PROMPT, 3]) == 1
    assert said(drafter, "bob/d", [*PROMPT, 3]).token == said(fresh, "x", [*PROMPT, 3]).token


def test_nothing_is_proposed_where_the_context_cannot_be_evaluated(drafter: LlamaDraft) -> None:
    assert drafter.propose("a", [], 0, GREEDY) is None
    assert drafter.propose("a", [1] * 257, 0, GREEDY) is None
    assert drafter.propose("a", [1, 1 << 30], 0, GREEDY) is None
    assert drafter.propose("a", [1, -1], 0, GREEDY) is None
    assert said(drafter, "a", [1] * 256)


def test_ids_beyond_the_targets_vocabulary_are_never_proposed(tiny_draft: Path) -> None:
    narrow = LlamaDraft(tiny_draft, n_vocab=10, slots=1, slot_tokens=128, threads=1)
    for position in range(20):
        proposal = narrow.propose("a", [11, 12, 13 + position], position, Sampling(temperature=2.0, seed=1))
        assert proposal is not None
        assert proposal.token < 10
    narrow.close()
