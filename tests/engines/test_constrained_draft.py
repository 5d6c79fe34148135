"""Drafts within constraints: what is certain costs no model, what cannot be said is not proposed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from wisp.core.draft.signals import Signal
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import Proposal
from wisp.engines.constrained_draft import MOST_CERTAIN, ConstrainedDraft
from wisp.engines.grammars import Grammars
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.ngram import NgramDraft
from wisp.engines.plain import PlainTokenizer

YES = Sampling(constraints=Constraints(grammar=Grammar("regex", "(yes|nothing), sir")))


class Says:
    """A model that proposes what it is told, and counts how often it is asked."""

    name = "says"

    def __init__(self, tokens: bytes) -> None:
        self.tokens, self.asked = tokens, 0
        self.edit: Edit | None = None

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        self.asked += 1
        self.edit = edit
        return Proposal(self.tokens[position], Signal(0.5))

    def forget(self, session: str) -> None: ...

    def close(self) -> None: ...


def over_bytes(engine: Says | NgramDraft) -> ConstrainedDraft:
    made = ConstrainedDraft(engine)
    made.matchers = Grammars(PlainTokenizer())
    return made


def test_certain_tokens_need_no_model() -> None:
    model = Says(b"yes, sir")
    draft = over_bytes(model)
    first = draft.propose("s", [1, 2], 0, YES)
    assert first is not None
    assert (first.token, first.then[:8]) == (ord("y"), (*b"es, sir", 256))
    assert model.asked == 1
    then = draft.propose("s", [1, 2, *b"no"], 2, YES)
    assert then is not None
    assert (then.token, then.then[:10], then.signal.certain) == (ord("t"), (*b"hing, sir", 256), True)
    assert model.asked == 1


def test_ends_are_proposed_once_or_twice_not_for_ever() -> None:
    draft = over_bytes(Says(b""))
    end = draft.propose("s", list(b"yes, sir"), 8, YES)
    assert end is not None
    assert end.token == 256
    assert len(end.then) < MOST_CERTAIN


def test_the_model_is_told_what_it_may_say() -> None:
    model = Says(b"x")
    over_bytes(model).propose("s", [1, 2], 0, YES)
    assert model.edit is not None
    assert [i for i in range(257) if model.edit.allows(i)] == [ord("n"), ord("y")]


def test_n_grams_end_at_the_first_token_that_cannot_be_said() -> None:
    history = list(b"abcabcab")
    allowed = Sampling(constraints=Constraints(banned=((ord("a"),),)))
    draft = over_bytes(NgramDraft())
    proposal = draft.propose("s", history, 0, allowed)
    assert proposal is not None
    assert proposal.token == ord("c")
    assert draft.propose("s", [*history, ord("c")], 1, allowed) is None


@pytest.mark.parametrize("wrong", [None, Grammar("regex", "(a")])
def test_without_the_grammar_it_drafts_all_the_same(wrong: Grammar | None) -> None:
    draft = ConstrainedDraft(Says(b"zz"))
    sampling = YES
    if wrong is not None:
        draft.matchers = Grammars(PlainTokenizer())
        sampling = Sampling(constraints=Constraints(grammar=wrong))
    proposal = draft.propose("s", [1, 2], 0, sampling)
    assert proposal is not None
    assert (proposal.token, proposal.then) == (ord("z"), ())


def test_without_constraints_the_engine_is_asked_directly() -> None:
    model = Says(b"zz")
    draft = ConstrainedDraft(model)
    assert draft.propose("s", [1], 0, Sampling()) == Proposal(ord("z"), Signal(0.5))
    assert draft.propose("s", [1], 0, Sampling(constraints=Constraints(stop_token_ids=(1,)))) is not None
    assert model.edit is None


def test_a_model_proposes_within_the_grammar_with_usable_statistics(
    tiny_draft: Path, tokenizer: LlamaTokenizer
) -> None:
    engine = LlamaDraft(tiny_draft, slots=1, slot_tokens=256, threads=1)
    draft = ConstrainedDraft(engine)
    draft.matchers = Grammars(tokenizer)
    sampling = Sampling(1.0, seed=1, constraints=Constraints(grammar=Grammar("regex", "[a-c]{4} [0-9]{4}")))
    try:
        text: list[int] = []
        while True:
            proposal = draft.propose("s", [11, 12, 13, *text], len(text), sampling)
            assert proposal is not None
            assert 0.0 <= proposal.signal.confidence <= 1.0
            assert all(abs(value) < 1e4 for value in (proposal.signal.entropy, proposal.signal.lead))
            text += [proposal.token, *proposal.then]
            if text[-1] in tokenizer.eos:
                break
    finally:
        draft.close()
    said = b"".join(map(tokenizer.piece, text)).decode()
    assert len(said) == 9
    assert set(said[:4]) <= set("abc")
    assert said[5:].isdigit()
