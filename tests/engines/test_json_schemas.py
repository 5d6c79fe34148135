"""No output of the tiny pair under a schema is one that the schema rejects, by an independent validator."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsonschema
import pytest

from schemas import KEYWORDS, Schema, made
from wisp.core.errors import GrammarError
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice
from wisp.engines.constrained_draft import ConstrainedDraft
from wisp.engines.grammars import Grammars
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.llama.target import LlamaTarget
from wisp.engines.llama.tokenizer import LlamaTokenizer

ALL, SOME = 315, 42
LONGEST = 300  # tokens
VALIDATOR = jsonschema.Draft202012Validator
PROMPT = "Answer in JSON:\n"


class Pair:
    """The tiny pair, drafting by the grammar."""

    def __init__(self, target: Path, draft: Path, tokenizer: LlamaTokenizer) -> None:
        self.grammars = Grammars(tokenizer)
        self.tokenizer = tokenizer
        self.target = LlamaTarget(target, slots=1, slot_tokens=512, threads=1, check=False)
        self.target.constraints.grammars = self.grammars
        self.draft = ConstrainedDraft(LlamaDraft(draft, slots=1, slot_tokens=512, threads=1))
        self.draft.matchers = self.grammars
        self.prompt = tokenizer.encode(PROMPT, add_bos=True, parse_special=False)
        closing = [
            i for i in range(tokenizer.n_vocab) if tokenizer.piece(i)[:1] in b'"}],' and tokenizer.piece(i)
        ]
        # Or a model of this size writes digits and letters for ever.
        self.ending = tuple((i, 4.0) for i in closing) + tuple((i, 8.0) for i in sorted(tokenizer.eos))

    def close(self) -> None:
        self.draft.close()
        self.target.close()

    def answer(self, sampling: Sampling, name: str) -> list[int]:
        """Tokens up to an end, or LONGEST."""
        text: list[int] = []
        held = 0
        while len(text) < LONGEST and not (text and text[-1] in self.tokenizer.eos):
            guess = self._drafted(text, sampling, name)
            chain = [*self.prompt, *text]
            work = Slice(1, 0, held, chain[held:] + guess, len(guess), True, len(text), sampling, None, text)
            [result] = self.target.run([work])
            assert not result.error
            held = len(chain) + result.accepted
            text += _up_to_end(result.tokens, self.tokenizer.eos)
        self.draft.forget(name)
        return text

    def _drafted(self, text: list[int], sampling: Sampling, name: str) -> list[int]:
        guess: list[int] = []
        while len(guess) < 4:
            context = [*self.prompt, *text, *guess]
            proposal = self.draft.propose(name, context, len(text) + len(guess), sampling)
            if proposal is None:
                break
            guess += [proposal.token, *proposal.then]
        return _up_to_end(guess, self.tokenizer.eos)


def _up_to_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])


@pytest.fixture(scope="module")
def pair(tiny_target: Path, tiny_draft: Path, tokenizer: LlamaTokenizer) -> Iterator[Pair]:
    pair = Pair(tiny_target, tiny_draft, tokenizer)
    yield pair
    pair.close()


def check(pair: Pair, schemas: Sequence[Schema]) -> tuple[list[str], list[str], int]:
    """(outputs that a validator rejects, schemas that are refused, outputs that did not come to an end)."""
    wrong, refused, endless = [], [], 0
    for seed, schema in enumerate(schemas):
        grammar = Grammar("json_schema", json.dumps(schema))
        try:
            pair.grammars.compile(grammar)
        except GrammarError as error:
            refused.append(f"{error}: {grammar.source}")
            continue
        constraints = Constraints(pair.ending, grammar=grammar)
        text = pair.answer(Sampling(1.0, seed=seed, constraints=constraints), str(seed))
        if text[-1] not in pair.tokenizer.eos:
            endless += 1
            continue
        said = b"".join(map(pair.tokenizer.piece, text)).decode("utf-8", "replace")
        try:
            value, formats = json.loads(said), VALIDATOR.FORMAT_CHECKER
            jsonschema.validate(value, schema, VALIDATOR, format_checker=formats)
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append(f"{said!r} under {grammar.source}: {error}")
    return wrong, refused, endless


def test_some_schemas_of_every_keyword(pair: Pair) -> None:
    assert 2 * len(KEYWORDS) <= SOME
    wrong, refused, endless = check(pair, made(SOME, seed=1))
    assert wrong == []
    assert refused == []
    assert endless <= SOME // 6


@pytest.mark.extended
def test_three_hundred_schemas(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    schemas = made(ALL, seed=2)
    wrong, refused, endless = check(pair, schemas)
    with capsys.disabled():
        print(
            f"\n{ALL} schemas: {len(wrong)} wrong, {len(refused)} refused, {endless} without an end in {LONGEST} tokens"
        )
        print("\n".join(refused))
    assert wrong == []
    assert len(refused) + endless <= ALL // 6
