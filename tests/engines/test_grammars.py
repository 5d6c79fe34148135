"""Grammars on the tiny vocabulary: what they allow, what cannot be compiled, and places found again."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisp.core.errors import GrammarBusyError, GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.edits import Bits, Matcher
from wisp.engines.base import Tokenizer
from wisp.engines.grammar_library import LIMITS
from wisp.engines.grammars import KEPT, MOST_ENDS, Grammars
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.plain import PlainTokenizer

PERSON = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Over bytes."""
    return Grammars(PlainTokenizer())


def ids(mask: Bits) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


def says(mask: Bits) -> bytes:
    """The allowed bytes; an end as "$"."""
    return bytes(min(i, 256) if i < 256 else ord("$") for i in ids(mask))


def test_masks_along_a_draft_stop_behind_what_is_not_allowed(grammars: Grammars) -> None:
    matcher = grammars.matcher(Grammar("choice", '["yes", "no", "yes!"]'))
    assert [says(m) for m in matcher.masks(b"", b"yes")] == [b"ny", b"e", b"s", b"!$"]
    assert [says(m) for m in matcher.masks(b"", b"yos")] == [b"ny", b"e"]
    assert [says(m) for m in matcher.masks(b"n", b"")] == [b"o"]
    assert [says(m) for m in matcher.masks(b"no", b"")] == [b"$"]


def test_behind_an_end_and_outside_of_the_grammar_there_are_only_ends(grammars: Grammars) -> None:
    matcher = grammars.matcher(Grammar("choice", '["yes", "no"]'))
    assert [says(m) for m in matcher.masks(b"no", [256, 256])] == [b"$", b"$", b"$"]
    assert [says(m) for m in matcher.masks([*b"no", 256], [256, 7])] == [b"$", b"$"]
    assert [says(m) for m in matcher.masks(b"nix", b"")] == [b"$"]
    assert [says(m) for m in matcher.masks(b"", b"")] == [b"ny"]  # and back


def test_every_kind(grammars: Grammars) -> None:
    begins = {
        Grammar("json_object"): b"{",
        PERSON: b"{",
        Grammar("regex", "[ab]c"): b"ab",
        Grammar("choice", '["x", "z"]'): b"xz",
        Grammar("lark", 'start: "q" A\nA: /[0-9]/'): b"q",
        Grammar("lark", 'root ::= "g" [0-9]'): b"g",  # GBNF
    }
    for grammar, begin in begins.items():
        assert says(grammars.matcher(grammar).masks([], [])[0]) == begin


def test_json_has_the_white_space_that_python_writes_and_no_more(grammars: Grammars) -> None:
    matcher = grammars.matcher(PERSON)
    text = json.dumps({"name": "M", "age": 3}).encode()
    masks = matcher.masks(b"", text)
    assert len(masks) == len(text) + 1
    forced = bytes(t for t, m in zip(text, masks, strict=False) if len(ids(m)) == 1)
    assert forced == b'{"name": ", "age": '  # with the first quote of the value, and without its second
    assert b" " not in says(matcher.masks(b'{"name": ', b"")[0])


def test_a_schema_can_ask_for_white_space_of_its_own(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "x-guidance": {"whitespace_flexible": True},
    }
    matcher = grammars.matcher(Grammar("json_schema", json.dumps(schema)))
    assert {*b" \n\t"} <= set(says(matcher.masks(b"{", b"")[0]))


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (Grammar("json_schema", '{"type": "object", "properties": {"a": {"not": {}}}}'), r'"not"'),
        (Grammar("json_schema", '{"if": {}, "then": {}}'), r'"if", "then"'),
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Grammar("json_schema", '{"type": "string", "format": "idn-email"}'), "idn-email"),
        (Grammar("json_schema", '{"type": "text"}'), "text"),
        (Grammar("json_schema", '{"$ref": "http://example.org/x"}'), "example.org"),
        (Grammar("json_schema", '{"type": '), "JSON"),
        (Grammar("json_schema", "[1]"), "object or a boolean"),
        (Grammar("json_schema", "false"), "nsatisfiable"),
        (Grammar("json_schema", '{"items": ' * 5000 + "{}" + "}" * 5000), "recursion"),
        (Grammar("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}'), r'"not"'),
        (Grammar("json_schema", '{"x-guidance": 5}'), "integer `5`"),
        (Grammar("regex", "(a"), "unclosed"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("choice", "[]"), "choices"),
        (Grammar("choice", '["a", ""]'), "choices"),
        (Grammar("lark", "start: nobody"), "nobody"),
        (Grammar("lark", "what is this"), "Lark|GBNF"),
    ],
)
def test_an_error_of_compilation_names_its_cause(grammars: Grammars, grammar: Grammar, named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        grammars.compile(grammar)
    with pytest.raises(GrammarError, match=named):
        grammars.matcher(grammar)


def test_compiled_grammars_are_remembered_for_each_key(grammars: Grammars) -> None:
    grammar = Grammar("regex", "abc")
    grammars.compile(grammar, "mine")
    assert grammars.ready(grammar, "mine")
    assert not grammars.ready(grammar, "yours")


def regex(i: int) -> Grammar:
    return Grammar("regex", f"a{{{i}}}")


def test_a_grammar_whose_session_lives_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session may wait for longer than it takes others to compile many."""
    monkeypatch.setattr("wisp.engines.grammars.KEPT", 2)
    monkeypatch.setattr("wisp.engines.grammars.KEYS", 2)
    grammars = Grammars(PlainTokenizer())
    waiting, another = regex(1), regex(1)
    grammars.compile(waiting, "a")
    for i in range(2, 6):
        grammars.compile(regex(i), "a")
    assert [i for i in range(1, 6) if grammars.ready(regex(i), "a")] == [1, 5]
    assert grammars.ready(another, "a")
    del waiting
    for key in "bcd":
        grammars.compile(regex(9), key)
    assert [key for key in "abcd" if grammars.ready(regex(9), key) or grammars.ready(regex(1), key)] == [
        "a",
        "d",
    ]
    del another
    grammars.compile(regex(9), "e")
    assert not grammars.ready(regex(1), "a")


def test_a_known_grammar_behind_a_new_end_is_not_ready_until_that_is_looked_up() -> None:
    """Looking up takes long with a large vocabulary, and nothing may take long where it is used."""
    grammars = Grammars(PlainTokenizer())
    first, second = (Grammar("regex", "abc", tuple(end)) for end in (b"</a>", b"</b>"))
    scored = Grammar("tokens", "[97]", tuple(b"</c>"))
    grammars.compile(first)
    assert [grammars.ready(g, "") for g in (first, second, scored)] == [True, False, False]
    for grammar in (second, scored):
        grammars.compile(grammar)
        assert grammars.ready(grammar, "")
    for i in range(MOST_ENDS):
        grammars.compile(Grammar("regex", "abc", tuple(b"<%d>" % i)))
        assert grammars.end(first.after)
    assert [grammars.ready(g, "") for g in (first, second)] == [True, False]
    with pytest.raises(GrammarError, match="at most 256 bytes"):
        grammars.compile(Grammar("regex", "abc", tuple(b"x" * 257)))


def test_many_wait_at_once_and_nothing_is_compiled_where_they_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammars, waiting = Grammars(PlainTokenizer()), [regex(i) for i in range(1, KEPT + 9)]
    for grammar in waiting:
        grammars.compile(grammar, "a")
    monkeypatch.setattr("wisp.engines.grammar_library._source", lambda *_: pytest.fail("compiled again"))
    for grammar in waiting:
        assert grammars.matcher(grammar).masks(b"", b"")


def test_large_grammars_are_forgotten_sooner_and_no_key_holds_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def large(i: int) -> Grammar:
        return Grammar("regex", f"a{{{i}}}" + "b" * 100)

    monkeypatch.setattr("wisp.engines.grammar_trial.Trials.run", lambda *_: 1000)
    monkeypatch.setattr("wisp.engines.grammars.KEPT_BYTES", 2500)
    monkeypatch.setattr("wisp.engines.grammars.MOST_BYTES", 6000)
    grammars = Grammars(PlainTokenizer())
    for i in range(1, 6):
        grammars.compile(large(i), "a")
    assert [i for i in range(1, 6) if grammars.ready(large(i), "a")] == [4, 5]
    living = [large(i) for i in (6, 7, 8)]
    for grammar in living:
        grammars.compile(grammar, "b")
    with pytest.raises(GrammarBusyError, match=r"3 different grammars.* try again when some have ended"):
        grammars.compile(large(9), "b")
    grammars.compile(living[0], "b")  # which is held already
    grammars.compile(large(9), "c")
    del living[1:], grammar
    grammars.compile(large(9), "b")


def test_grammars_of_all_keys_are_bounded_and_some_memory_is_left_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wisp.engines.grammar_trial.Trials.run", lambda *_: 1000)
    monkeypatch.setattr("wisp.engines.grammars.MOST_BYTES", 8100)  # eight of them
    grammars = Grammars(PlainTokenizer())
    for key in ("old", "new"):
        for i in range(1, 4):
            grammars.compile(regex(i), key)
    living: list[Grammar] = []
    counts: list[int] = []

    def compile_all(key: str) -> None:
        for i in range(1, 9):
            grammar = regex(i)
            grammars.compile(grammar, key)
            living.append(grammar)

    for key in ("greedy", "late", "last"):
        with pytest.raises(GrammarBusyError):
            compile_all(key)
        counts.append(len(living) - sum(counts))
    assert counts == [5, 2, 1]  # one more than what is left free
    kept = {key: [i for i in range(1, 9) if grammars.ready(regex(i), key)] for key in ("old", "new")}
    assert kept == {"old": [], "new": []}
    living.clear()
    grammars.compile(regex(1), "late")
    for i in range(5, 9):
        grammars.compile(regex(i), "old")
    held = sum(
        grammars.ready(regex(i), key) for i in range(1, 9) for key in ("old", "greedy", "late", "last")
    )
    assert held == 8


def test_control_tokens_are_no_text_but_can_be_named(tokenizer: LlamaTokenizer) -> None:
    grammars = Grammars(tokenizer)
    [control] = tokenizer.encode("<|im_start|>", add_bos=False, parse_special=True)
    anything = ids(grammars.matcher(Grammar("regex", r"(.|\n)*")).masks([], [])[0])
    assert control not in anything
    assert tokenizer.eos <= set(anything)
    for named in ("<|im_start|>", f"<[{control}]>"):
        assert ids(grammars.matcher(Grammar("lark", f'start: {named} "a"')).masks([], [])[0]) == [control]


def test_a_mask_is_as_long_as_the_vocabulary(tokenizer: LlamaTokenizer) -> None:
    [mask] = Grammars(tokenizer).matcher(PERSON).masks([], [])
    assert mask.size == (tokenizer.n_vocab + 31) // 32


@settings(max_examples=60)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([PERSON, Grammar("json_object"), Grammar("regex", "(ab|c){2,9}")]),
)
def test_any_way_to_a_place_gives_the_same_masks(shared: Grammars, seed: int, grammar: Grammar) -> None:
    """Walk at random, look back and ahead, and compare with a matcher that goes there straight."""
    source = random.Random(seed)
    wanderer, text = shared.matcher(grammar), list[int]()
    for _ in range(12):
        [mask] = wanderer.masks(text, [])
        expected = shared.matcher(grammar).masks(text, [])[0]
        assert np.array_equal(mask, expected)
        draft = _walk(shared, grammar, text, source)
        along = wanderer.masks(text, draft)
        for i, each in enumerate(along):
            assert np.array_equal(each, shared.matcher(grammar).masks([*text, *draft[:i]], [])[0])
        keep = source.randrange(len(text) + 1) if source.random() < 0.3 else len(text)
        text = text[:keep] + draft[: source.randint(0, len(along) - 1)] * (keep == len(text))


def _walk(grammars: Grammars, grammar: Grammar, text: Sequence[int], source: random.Random) -> list[int]:
    """A few tokens that the grammar allows, and perhaps one that it does not."""
    draft: list[int] = []
    for _ in range(source.randint(0, 4)):
        [mask] = grammars.matcher(grammar).masks([*text, *draft], [])
        draft.append(source.choice(ids(mask)))
    return [*draft, source.randrange(257)] if source.random() < 0.3 else draft


@pytest.fixture(scope="module")
def shared(grammars: Grammars) -> Grammars:
    for grammar in (PERSON, Grammar("json_object"), Grammar("regex", "(ab|c){2,9}")):
        grammars.compile(grammar)
    return grammars


def test_a_device_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wisp.engines.grammar_library.library", lambda: None)
    vocabulary: Tokenizer = PlainTokenizer()
    with pytest.raises(GrammarError, match="pip install"):
        Grammars(vocabulary).compile(PERSON)
    with pytest.raises(GrammarError, match="pip install"):
        Grammars(vocabulary).matcher(PERSON)


WIDE = Grammar("regex", "(" + "|".join(f"a{i}.*b{i}" for i in range(200)) + ")")


def test_a_text_that_exceeds_a_limit_ends_and_no_other_of_its_grammar_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LIMITS, "step_lexer_fuel", 20)
    grammars = Grammars(PlainTokenizer())
    grammars.compile(WIDE, "mine")
    first, second = grammars.matcher(WIDE), grammars.matcher(WIDE)
    for _ in range(2):
        assert says(second.masks(b"", b"")[0]) == b"a"
        with pytest.raises(GrammarError, match="too much work"):
            first.masks(b"a1zzzz", b"zzz")
        assert says(first.masks(b"", b"")[0]) == b"a"
    grammars.compile(WIDE, "mine")
    assert says(grammars.matcher(WIDE).masks(b"", b"")[0]) == b"a"


def test_a_grammar_that_takes_long_to_compile_is_over_with_the_first_such_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What matchers share is wrong from then on, and to make it anew would hold up all sessions."""
    monkeypatch.setitem(LIMITS, "step_lexer_fuel", 20)
    monkeypatch.setattr("wisp.engines.grammars.QUICK_S", -1.0)
    grammars = Grammars(PlainTokenizer())
    grammars.compile(WIDE, "mine")
    first, second = grammars.matcher(WIDE), grammars.matcher(WIDE)
    for _ in range(2):
        with pytest.raises(GrammarError, match="too much work"):
            first.masks(b"a1zzzz", b"zzz")
        with pytest.raises(GrammarError, match="too much work"):
            second.masks(b"", b"")
    with pytest.raises(GrammarError, match="too much work"):
        grammars.compile(WIDE, "mine")
    with pytest.raises(GrammarError, match="too much work"):
        grammars.matcher(WIDE)
    grammars.compile(WIDE, "yours")
    assert says(grammars.matcher(WIDE).masks(b"", b"")[0]) == b"a"


def strings(*most: int) -> Grammar:
    """An object of strings of at most so many characters."""
    names = [f"s{i}" for i in range(len(most))]
    properties = {n: {"type": "string", "maxLength": m} for n, m in zip(names, most, strict=True)}
    return Grammar("json_schema", json.dumps({"type": "object", "properties": properties, "required": names}))


def follow(matcher: Matcher, text: bytes) -> None:
    """As a session does that drafts eight bytes a round."""
    for i in range(0, len(text), 8):
        assert len(matcher.masks(text[:i], text[i : i + 8])) == len(text[i : i + 8]) + 1


def test_sessions_of_one_grammar_are_independent() -> None:
    """Their texts add up to more states than the limit has."""
    lengths = [300, 400, 500, 600, 700]
    grammars, grammar = Grammars(PlainTokenizer()), strings(*lengths)
    grammars.compile(grammar)
    for long in range(len(lengths)):
        said = {f"s{i}": "x" * n * (i == long) for i, n in enumerate(lengths)}
        follow(grammars.matcher(grammar), json.dumps(said).encode())


def test_a_long_string_comes_to_its_end() -> None:
    follow(Grammars(PlainTokenizer()).matcher(strings(4000)), json.dumps({"s0": "x" * 4000}).encode())


def test_ids_outside_of_the_vocabulary_leave_a_grammar_as_it_is(grammars: Grammars) -> None:
    """An edge may say anything that the engine has room for; llguidance takes it for an error of the grammar."""
    grammar = Grammar("choice", '["yes", "no"]')
    grammars.compile(grammar)
    first, second = grammars.matcher(grammar), grammars.matcher(grammar)
    for strange in (257, 300, 100_000):
        assert [says(m) for m in first.masks(b"", [strange])] == [b"ny"]
        assert [says(m) for m in first.masks(b"", [*b"y", strange])] == [b"ny", b"e"]
        assert [says(m) for m in first.masks([strange], b"")] == [b"$"]
    assert [says(m) for m in second.masks(b"", b"")] == [b"ny"]


def test_a_model_without_an_end_has_no_grammars() -> None:
    """Their texts could not end, and what comes behind them would be anything."""

    class Endless(PlainTokenizer):
        eos = frozenset()

    with pytest.raises(GrammarError, match="no end of sequence"):
        Grammars(Endless()).compile(PERSON)
    forced = Grammars(Endless()).matcher(Grammar("tokens", "[1, 2]"))
    assert [len(ids(m)) for m in forced.masks([1], [2, 7, 9])] == [1, 288, 288, 288]


def test_a_backslash_before_a_u_is_no_number_of_a_character(grammars: Grammars) -> None:
    schema = json.dumps({"type": "object", "description": r"such as C:\users"})
    grammars.compile(Grammar("lark", f"start: %json {schema}"))
