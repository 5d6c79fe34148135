"""Every engine under every constraint: along drafts, good and bad, and wherever a session is resumed, what the same
engine says one token at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from wisp.check.lossless.constraints import MAKERS, constrain
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import INVALID_GRAMMAR, Slice
from wisp.engines.base import TargetEngine
from wisp.engines.emulated import EmulatedTarget, VirtualClock, hardware
from wisp.engines.grammars import Grammars
from wisp.engines.llama.target import LlamaTarget
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.null import NullTarget
from wisp.engines.plain import PlainTokenizer

PROMPT = [11, 12, 13, 12, 15]
LENGTH = 24


def emulated() -> TargetEngine:
    clock = VirtualClock()
    engine = EmulatedTarget("a100", hardware("a100-qwen3-32b"), now=clock.now, sleep=clock.sleep)
    engine.constraints.grammars = Grammars(PlainTokenizer())
    return engine


def null() -> TargetEngine:
    engine = NullTarget()
    engine.constraints.grammars = Grammars(PlainTokenizer())
    return engine


@pytest.fixture(scope="module", params=["llama.cpp", "emulated", "null"])
def engine(request: pytest.FixtureRequest) -> TargetEngine:
    if request.param != "llama.cpp":
        return emulated() if request.param == "emulated" else null()
    shared: LlamaTarget = request.getfixturevalue("shared_engine")
    tokenizer: LlamaTokenizer = request.getfixturevalue("tokenizer")
    shared.clear()
    shared.constraints.grammars = Grammars(tokenizer)
    return shared


def sliced(slot: int, start: int, text: list[int], draft: list[int], sampling: Sampling) -> Slice:
    """Feed what lies behind `start` and a draft. `text`: generated so far."""
    constraints = sampling.constraints
    counts_prompt = constraints is not None and constraints.repetition_penalty != 1.0
    past = [*PROMPT, *text] if counts_prompt else text
    chain = [*PROMPT, *text]
    return Slice(1, slot, start, chain[start:] + draft, len(draft), True, len(text), sampling, None, past)


def plain(engine: TargetEngine, sampling: Sampling, slot: int = 0) -> list[int]:
    text: list[int] = []
    while len(text) < LENGTH:
        start = len(PROMPT) + len(text) - 1 if text else 0
        [result] = engine.run([sliced(slot, start, text, [], sampling)])
        assert not result.error
        text += result.tokens
    return text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", MAKERS)
def test_along_drafts_it_says_what_it_says_without(
    engine: TargetEngine, name: str, temperature: float
) -> None:
    source = random.Random(name)
    without = plain(engine, Sampling(temperature, seed=3))
    sampling = constrain(name, Sampling(temperature, seed=3), without, source).ending(engine.info.eos)
    expected = plain(engine, sampling, slot=1)
    text, held, slot = list[int](), 0, 2
    while len(text) < LENGTH - 6:
        right = source.randint(0, 5)
        draft = expected[len(text) : len(text) + right]
        draft += [source.randrange(engine.info.n_vocab) for _ in range(source.randint(0, 2))]
        if source.random() < 0.2:  # resumed elsewhere
            slot, held = 5 - slot, 0
        [result] = engine.run([sliced(slot, held, text, draft, sampling)])
        assert not result.error
        assert result.tokens == expected[len(text) : len(text) + len(result.tokens)]
        held = len(PROMPT) + len(text) + result.accepted
        text += result.tokens


def test_the_constraints_bite(engine: TargetEngine) -> None:
    source = random.Random(1)
    without = plain(engine, Sampling(1.0, seed=3))
    changed = {
        name
        for name in MAKERS
        if plain(engine, constrain(name, Sampling(1.0, seed=3), without, source)) != without
    }
    assert changed >= set(MAKERS) - {
        "stop_token_ids",
        "min_tokens",
        "logit_bias",
        "repetition_penalty",
        "penalties",
    }


def test_a_grammar_that_cannot_be_compiled_fails_its_slice_alone(engine: TargetEngine) -> None:
    wrong = Sampling(constraints=Constraints(grammar=Grammar("regex", "(a")))
    batch = [sliced(0, 0, [], [], wrong), sliced(1, 0, [], [], Sampling())]
    refused, fine = engine.run(batch)
    assert refused.code == INVALID_GRAMMAR
    assert "unclosed" in refused.error
    assert len(fine.tokens) == 1


@pytest.mark.parametrize("make", [emulated, null])
def test_text_under_a_grammar_is_of_the_grammar(make: Callable[[], TargetEngine]) -> None:
    engine = make()
    grammar = Grammar("choice", '["the lamp", "a fox"]')
    text = plain(engine, Sampling(constraints=Constraints(grammar=grammar)))
    end = text.index(min(engine.info.eos))
    assert bytes(text[:end]) in (b"the lamp", b"a fox")
    assert set(text[end:]) <= engine.info.eos  # which may be ignored


def test_constraints_without_their_past_are_refused(engine: TargetEngine) -> None:
    if not isinstance(engine, LlamaTarget):
        return
    sampling = Sampling(constraints=Constraints(presence_penalty=1.0))
    [result] = engine.run([Slice(1, 0, 0, PROMPT, 0, True, 4, sampling)])
    assert "4 tokens generated" in result.error


@pytest.fixture(autouse=True)
def _empty(engine: TargetEngine) -> Iterator[None]:
    yield
    if isinstance(engine, LlamaTarget):
        engine.clear()


def test_an_engine_without_grammars_refuses_them() -> None:
    engine = NullTarget()
    [result] = engine.run(
        [sliced(0, 0, [], [], Sampling(constraints=Constraints(grammar=Grammar("json_object"))))]
    )
    assert (result.code, result.tokens) == (INVALID_GRAMMAR, [])
