"""The grammar of one sequence of tokens: the same masks along any draft as one by one, ends included."""

from __future__ import annotations

import random

import numpy as np
import pytest

from wisp.core.errors import GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.edits import Bits
from wisp.engines.grammars import Grammars
from wisp.engines.plain import PlainTokenizer

TOKENS = [104, 105, 256, 104, 256, 33]  # 256 is an end of sequence
GRAMMAR = Grammar("tokens", str(TOKENS))


def ids(masks: list[Bits]) -> list[list[int]]:
    return [np.flatnonzero(np.unpackbits(m.view(np.uint8), bitorder="little")).tolist() for m in masks]


def test_along_any_draft_the_next_token_alone_is_allowed() -> None:
    grammars = Grammars(PlainTokenizer())
    grammars.compile(GRAMMAR, "alice")
    assert grammars.ready(GRAMMAR, "alice")
    matcher = grammars.matcher(GRAMMAR)
    expected = [[t] for t in TOKENS] + [[256]]
    choose = random.Random(1)
    for _ in range(200):
        at = choose.randrange(len(TOKENS) + 1)
        n = choose.randrange(len(TOKENS) - at + 1)
        assert ids(matcher.masks(TOKENS[:at], TOKENS[at : at + n])) == expected[at : at + n + 1]


def test_a_draft_is_followed_up_to_its_first_wrong_token() -> None:
    matcher = Grammars(PlainTokenizer()).matcher(GRAMMAR)
    assert ids(matcher.masks([104], [105, 99, 104])) == [[105], [256]]
    assert ids(matcher.masks([99], [105])) == [[256]]


@pytest.mark.parametrize("source", ["[]", "[-1]", "[257]", '["a"]', "{oops", "5", "[true]"])
def test_only_lists_of_tokens_are_accepted(source: str) -> None:
    with pytest.raises(GrammarError, match="tokens must be"):
        Grammars(PlainTokenizer()).compile(Grammar("tokens", source))


@pytest.mark.parametrize("name", ["<[104]>", "<[99999]>", "<[^1]>", "<[*]>", "<[1-5]>"])
def test_tokens_of_text_cannot_be_named_by_number_in_other_grammars(name: str) -> None:
    """llguidance takes them, and then has other masks along a draft than one by one."""
    with pytest.raises(GrammarError, match="control token"):
        Grammars(PlainTokenizer()).compile(Grammar("lark", f"start: {name}"))
    Grammars(PlainTokenizer()).compile(Grammar("lark", "start: <[256]>"))
