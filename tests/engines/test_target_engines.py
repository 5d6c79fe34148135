"""What every target engine does with slices, whatever runs below it: llama.cpp, and vLLM where that is installed."""

from __future__ import annotations

import math
import random

import pytest

from slices import PROMPT, SAMPLING, Target, other, verify
from vllm_rig import TINY, reference, with_vllm
from wisp.check.lossless.constraints import MAKERS, constrain
from wisp.core.errors import EngineError
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import INVALID_GRAMMAR, Copy, Slice
from wisp.engines.grammars import Grammars
from wisp.engines.llama.reference import reference_tokens
from wisp.engines.llama.tokenizer import LlamaTokenizer

BEYOND = 99  # no slot of any engine here


@pytest.fixture(params=["llama.cpp", pytest.param("vllm", marks=with_vllm)])
def engine(request: pytest.FixtureRequest) -> Target:
    """Slots of 256 tokens, all empty."""
    found: Target = request.getfixturevalue(
        "engine_of_llama" if request.param == "llama.cpp" else "engine_of_vllm"
    )
    return found


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return reference(PROMPT, SAMPLING, 24)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING, Sampling(0.7, 20, 0.9, 0.01, 5)])
def test_without_drafts_it_says_what_the_reference_says(engine: Target, sampling: Sampling) -> None:
    said: list[int] = []
    start, feed = 0, PROMPT
    for position in range(24):
        [result] = engine.run([Slice(1, 0, start, feed, 0, True, position, sampling)])
        said += result.tokens
        start, feed = start + len(feed), result.tokens
    assert said == reference(PROMPT, sampling, 24)


def test_a_right_draft_is_accepted_whole_with_a_bonus(engine: Target, answer: list[int]) -> None:
    [result] = engine.run([verify(0, answer[:9])])
    assert (result.accepted, result.tokens) == (9, answer[:10])
    assert engine.held(0) == len(PROMPT) + 9


def test_the_first_disagreement_is_corrected_and_the_rest_rolled_back(
    engine: Target, answer: list[int]
) -> None:
    [result] = engine.run([verify(0, [*answer[:3], other(answer[3]), *answer[4:9]])])
    assert (result.accepted, result.tokens) == (3, answer[:4])
    assert engine.held(0) == len(PROMPT) + 3
    [result] = engine.run([Slice(1, 0, 8, answer[3:8], 4, position=4, sampling=SAMPLING)])
    assert (result.accepted, result.tokens) == (4, answer[4:9])


def test_prefill_says_nothing_and_may_come_in_chunks(engine: Target, answer: list[int]) -> None:
    [result] = engine.run([Slice(9, 0, 0, PROMPT[:2], sample=False)])
    assert (result.session, result.accepted, result.tokens, result.error) == (9, 0, [], "")
    engine.run([Slice(9, 0, 2, PROMPT[2:4], sample=False)])
    assert engine.held(0) == 4
    assert engine.run([verify(0, answer[:2], start=4)])[0].tokens == answer[:3]


@pytest.mark.parametrize(
    "copy", [Copy(0, 0, 1), Copy(1, 0, 1), Copy(0, BEYOND, 1), Copy(-1, 0, 0), Copy(0, 1, -1)]
)
def test_impossible_copies_are_refused(engine: Target, copy: Copy) -> None:
    engine.run([Slice(1, 0, 0, PROMPT, sample=False)])
    with pytest.raises(EngineError, match="slot"):
        engine.copy(copy)
    assert engine.held(0) == len(PROMPT)


def test_two_slices_of_one_slot_are_refused(engine: Target) -> None:
    with pytest.raises(EngineError, match="same slot"):
        engine.run([Slice(1, 0, 0, [1]), Slice(2, 0, 0, [1])])


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        (Slice(1, 0, 0, []), "at least one token"),
        (Slice(1, 0, 6, [1]), "holds 5 tokens"),
        (Slice(1, 0, -1, [1]), "to start from"),
        (Slice(1, 0, 5, [1] * 252), "exceed the slot's 256"),
        (Slice(1, 0, 5, [1, -1]), "vocabulary"),
        (Slice(1, 0, 5, [1, 1 << 40]), "vocabulary"),
        (Slice(1, 0, 5, [1, 2], 2), "draft tokens"),
        (Slice(1, 0, 5, [1, 2], -1), "draft tokens"),
        (Slice(1, 0, 5, [1, 2], 1, sample=False), "draft tokens"),
        (Slice(1, 0, 5, [1], sampling=Sampling(top_p=0.0)), "top_p"),
        (Slice(1, BEYOND, 0, [1]), f"slot {BEYOND}"),
        (Slice(1, -1, 0, [1]), "slot -1"),
    ],
)
def test_a_slice_that_cannot_be_run_fails_alone(
    engine: Target, answer: list[int], work: Slice, complaint: str
) -> None:
    engine.run([Slice(1, 0, 0, PROMPT, sample=False)])
    failed, good = engine.run([work, verify(1, answer[:2])])
    assert complaint in failed.error
    assert failed.tokens == []
    assert good.tokens == answer[:3]
    if work.slot == 0:
        assert engine.held(0) == 0
        assert engine.run([verify(0, [])])[0].tokens == answer[:1]


def test_a_context_can_be_filled_to_its_last_token(engine: Target) -> None:
    long = [i % 256 for i in range(250)]
    [result] = engine.run([Slice(1, 0, 0, long + [1] * 6, 6)])
    assert result.tokens[:1] == reference(long, Sampling(), 1)
    assert engine.held(0) == 250 + result.accepted


def test_logprobs_are_the_targets_own(engine: Target, answer: list[int]) -> None:
    [none] = engine.run([verify(0, answer[:2])])
    assert none.logprobs == []
    [bare] = engine.run([verify(1, answer[:2], logprobs=0)])
    assert [entry.token for entry in bare.logprobs] == answer[:3]
    assert all(entry.top == [] and entry.logprob < 0 for entry in bare.logprobs)
    [full] = engine.run([verify(2, [], logprobs=engine.info.n_vocab)])
    [entry] = full.logprobs
    assert math.fsum(math.exp(top.logprob) for top in entry.top) == pytest.approx(1.0)
    assert [t.logprob for t in entry.top] == sorted((t.logprob for t in entry.top), reverse=True)
    assert entry.logprob == next(t.logprob for t in entry.top if t.token == entry.token)


@pytest.mark.parametrize("name", MAKERS)
def test_constraints_hold_along_drafts(engine: Target, tokenizer: LlamaTokenizer, name: str) -> None:
    engine.constraints.grammars = grammars = Grammars(tokenizer)
    sampling = constrain(name, SAMPLING, reference(PROMPT, SAMPLING, 24), random.Random(name))
    sampling = sampling.ending(engine.info.eos)
    expected = reference_tokens(TINY, PROMPT, sampling, 24, matchers=grammars)
    text: list[int] = []
    held = 0
    while len(text) < 18:
        right = expected[len(text) : len(text) + 3]
        draft = [*right[:2], other(right[2]), 5] if len(text) % 2 else right
        chain = [*PROMPT, *text]
        past = chain if name in ("repetition_penalty", "all_at_once") else text
        [result] = engine.run(
            [Slice(1, 0, held, chain[held:] + draft, len(draft), True, len(text), sampling, None, past)]
        )
        assert result.tokens == expected[len(text) : len(text) + len(result.tokens)]
        held = len(chain) + result.accepted
        text += result.tokens


def test_a_grammar_that_cannot_be_compiled_is_an_error_of_its_slice(
    engine: Target, tokenizer: LlamaTokenizer
) -> None:
    engine.constraints.grammars = Grammars(tokenizer)
    wrong = Sampling(constraints=Constraints(grammar=Grammar("regex", "(a")))
    refused, fine = engine.run([Slice(1, 0, 0, PROMPT, sampling=wrong), Slice(2, 1, 0, PROMPT)])
    assert (refused.code, fine.error) == (INVALID_GRAMMAR, "")
    assert "unclosed" in refused.error
