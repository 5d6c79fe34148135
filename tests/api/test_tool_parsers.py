"""Parsers of answers: each family's calls and reasoning, in pieces as at once, and no text lost."""

# ruff: noqa: E501 - what models say has long lines

from __future__ import annotations

import json
import random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisp.api.tools.events import Call, Event, Reasoning, Text, Tool
from wisp.api.tools.families import PARSERS, family_of
from wisp.api.tools.markup import Markup

TOOLS = {
    "f": Tool(
        "f", {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": "object"}}}
    ),
    "g": Tool("g"),
}
F = '{"name": "f", "arguments": {"s": "a </tool_call> b", "n": 3}}'
CALL_F = ("f", {"s": "a </tool_call> b", "n": 3})

# family: (answer, content, reasoning, calls)
CASES: dict[str, list[tuple[str, str, str, list[tuple[str, Any]]]]] = {
    "hermes": [
        (f"<think>\nhm\n</think>\n\nSure. <tool_call>\n{F}\n</tool_call>", "Sure.", "hm", [CALL_F]),
        (f"<tool_call>{F}</tool_call>\n<tool_call>\n{F}\n</tool_call>", "", "", [CALL_F, CALL_F]),
        (f"<tool_call>{F}", "", "", [CALL_F]),
        ("<tool_call>no json</tool_call> x", "<tool_call>no json</tool_call> x", "", []),
        ('a <tool_call>{"name": "f", "argu', 'a <tool_call>{"name": "f", "argu', "", []),
        ("I will. <tool_call>", "I will.", "", []),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', "", []),
        ("a < b <tool", "a < b <tool", "", []),
        (" plain\n", " plain\n", "", []),
        ('<tool_call>{"name": "g"}</tool_call>', "", "", [("g", {})]),
        ('<tool_call>{"name": "g", "arguments": "{\\"x\\": 1.5}"}</tool_call>', "", "", [("g", {"x": 1.5})]),
        ('<tool_call>{"name": "g", "arguments": {"x": NaN}}</tool_call>',
         '<tool_call>{"name": "g", "arguments": {"x": NaN}}</tool_call>', "", []),
    ],
    "qwen-xml": [
        ("x\n<tool_call>\n<function=f>\n<parameter=s>\nif a:\n    </parameter> b\n\n</parameter>\n<parameter=n>\n3\n"
         "</parameter>\n</function>\n</tool_call>", "x", "", [("f", {"s": "if a:\n    </parameter> b\n", "n": 3})]),
        ("<function=g>\n</function>\n</tool_call>y", "y", "", [("g", {})]),
        ("<think>a <tool_call>\n<function=g>\n</function>\n</tool_call>", "", "a", [("g", {})]),
        ("<tool_call>\n<function=f>\n<parameter=s>\nrm -rf /", "<tool_call>\n<function=f>\n<parameter=s>\nrm -rf /", "", []),
        ("<tool_call>\n<function=g>\n<parameter=a>\nTrue\n</parameter>\n<parameter=b>\n[1, 'x']\n</parameter>\n"
         "</function>\n</tool_call>", "", "", [("g", {"a": True, "b": [1, "x"]})]),
    ],
    "llama3": [
        ('{"name": "f", "parameters": {"n": 1}}; {"name": "g", "parameters": {}}', "", "", [("f", {"n": 1}), ("g", {})]),
        ('Ok <|python_tag|>{"name": "g", "parameters": {}}', "Ok ", "", [("g", {})]),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', "", []),
        ('{"name": "g", "parameters": {}} is how', '{"name": "g", "parameters": {}} is how', "", []),
        ('see {"name": "g", "parameters": {}}', 'see {"name": "g", "parameters": {}}', "", []),
    ],
    "llama4": [
        ("[f(s='it\\'s [x]', n=2), g()]", "", "", [("f", {"s": "it's [x]", "n": 2}), ("g", {})]),
        ("<|python_start|>[g()]<|python_end|>", "", "", [("g", {})]),
        ("[1, 2] are numbers", "[1, 2] are numbers", "", []),
        ("[g(", "[g(", "", []),
    ],
    "mistral": [
        ('Hi[TOOL_CALLS] [{"name": "f", "arguments": {"n": 1}}]', "Hi", "", [("f", {"n": 1})]),
        ('[THINK]hm[/THINK][TOOL_CALLS]f[ARGS]{"n": 1}[TOOL_CALLS]g[CALL_ID]123[ARGS]{}', "", "hm",
         [("f", {"n": 1}), ("g", {})]),
        ("[TOOL_CALLS] none", "[TOOL_CALLS] none", "", []),
    ],
    "deepseek": [
        ('a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"n": 1}\n```<｜tool▁call▁end｜>\n'
         "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "a", "", [("f", {"n": 1}), ("g", {})]),
    ],
    "dsml": [
        ('<think>t</think>a\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="s" string="true">'
         '</b>\n</｜DSML｜parameter>\n<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
         "</｜DSML｜function_calls>", "a", "t", [("f", {"s": "</b>\n", "n": 3})]),
    ],
    "harmony": [
        ("<|channel|>analysis<|message|>say <|end|> x<|end|><|start|>assistant<|channel|>commentary to=functions.f "
         '<|constrain|>json<|message|>{"s": "<|end|>"}<|call|>', "", "say <|end|> x", [("f", {"s": "<|end|>"})]),
        ("<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>Hi", "Hi", "t", []),
        ("Hi", "Hi", "", []),
        ("<|channel|>commentary to=functions.f<|message|>{", "{", "", []),
        ("<|channel|>final no message", "<|channel|>final no message", "", []),
    ],
    "glm": [
        ("<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>a </tool_call> b</arg_value>\n<arg_key>n</arg_key>\n"
         "<arg_value>3</arg_value>\n</tool_call>", "", "", [CALL_F]),
    ],
    "kimi-k2": [
        ("a<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
         '{"n": 1}<|tool_call_end|><|tool_calls_section_end|>', "a", "", [("f", {"n": 1})]),
    ],
    "kimi-k3": [
        ('<|open|>response<|sep|>a<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>'
         '<|open|>argument key="n" type="number"<|sep|>3<|close|>argument<|sep|><|close|>call<|sep|>'
         "<|close|>tools<|sep|>", "a", "", [("f", {"n": 3})]),
    ],
    "gemma4": [
        ('<|channel>thought\nt<channel|><|tool_call>call:f{n:3,o:{k:[1,<|"|>a,b<|"|>,true]}}<tool_call|>', "", "t",
         [("f", {"n": 3, "o": {"k": [1, "a,b", True]}})]),
        ("<|tool_call>call:f no<tool_call|>", "<|tool_call>call:f no<tool_call|>", "", []),
    ],
}  # fmt: skip
FLAT = [(family, *case) for family, cases in CASES.items() for case in cases]


def parse(family: str, pieces: list[str], *, cut: bool = False, tools: bool = True) -> list[Event]:
    """All events, with neighbouring ones of text joined."""
    parser = PARSERS[family](TOOLS if tools else {})
    events = [e for piece in pieces for e in parser.feed(piece)] + parser.end(cut=cut)
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        else:
            joined.append(event)
    return joined


def test_every_family_has_cases() -> None:
    assert CASES.keys() == PARSERS.keys()


@pytest.mark.parametrize(("family", "answer", "content", "reasoning", "calls"), FLAT)
def test_answers_are_read(
    family: str, answer: str, content: str, reasoning: str, calls: list[tuple[str, Any]]
) -> None:
    events = parse(family, [answer])
    assert "".join(e.text for e in events if isinstance(e, Text)) == content
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == reasoning
    assert [(e.name, json.loads(e.arguments)) for e in events if isinstance(e, Call)] == calls


@pytest.mark.parametrize(("family", "answer"), [case[:2] for case in FLAT])
def test_pieces_make_no_difference(family: str, answer: str) -> None:
    whole = parse(family, [answer])
    assert parse(family, list(answer)) == whole
    for seed in range(20):
        source, pieces, at = random.Random(seed), [], 0
        while at < len(answer):
            size = source.randint(1, 9)
            pieces.append(answer[at : at + size])
            at += size
        assert parse(family, pieces) == whole


def scraps(family: str) -> st.SearchStrategy[list[str]]:
    """Pieces of a family's answers, in any order, and other text."""
    answers = [case[0] for case in CASES[family]]
    parts = [a[i : i + n] for a in answers for n in (3, 17, 60) for i in range(0, len(a), n)]
    return st.lists(st.sampled_from([*parts, *PARSERS[family].markers, " ", "\n", "{", "}", "x"]), max_size=8)


@pytest.mark.parametrize("family", PARSERS)
def test_any_text_is_read_the_same_in_any_pieces(family: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(scraps(family), st.booleans())
    def check(pieces: list[str], cut: bool) -> None:
        text = "".join(pieces)
        assert (
            parse(family, pieces, cut=cut)
            == parse(family, [text], cut=cut)
            == parse(family, list(text), cut=cut)
        )

    check()


@pytest.mark.parametrize("family", PARSERS)
def test_text_without_markers_is_content(family: str) -> None:
    for text in ("", "Hello, world!", " \n a [b] {c} <d>\n", "1 < 2"):
        assert "".join(e.text for e in parse(family, list(text)) if isinstance(e, Text)) == text


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("family", "answer"), [case[:2] for case in FLAT])
def test_a_cut_answer_never_loses_words(family: str, answer: str, cut: bool) -> None:
    """Wherever an answer ends: what is in no complete call and in no marker is in content or reasoning."""
    for end in range(0, len(answer), 7):
        events = parse(family, [answer[:end]], cut=cut)
        if not any(isinstance(e, Call) for e in events):
            told = "".join(e.text for e in events if isinstance(e, Text | Reasoning))
            bare = answer[:end]
            parser = PARSERS[family]
            openers = getattr(parser, "openers", ())
            for marker in (
                "<|channel>thought\n",
                *sorted({*openers, *parser.markers}, key=len, reverse=True),
            ):
                bare, told = bare.replace(marker, ""), told.replace(marker, "")
            if family not in ("harmony", "kimi-k3"):  # whose headers have words in them
                assert "".join(told.split()) == "".join(bare.split())


def test_without_tools_nothing_is_a_call() -> None:
    events = parse("hermes", [f"<think>a</think><tool_call>{F}</tool_call>"], tools=False)
    assert events == [Reasoning("a"), Text(f"<tool_call>{F}</tool_call>")]


def test_a_long_call_in_small_pieces_takes_no_quadratic_time() -> None:
    text = json.dumps({"name": "f", "arguments": {"s": "x" * 400_000}})
    parser = PARSERS["hermes"](TOOLS)
    assert isinstance(parser, Markup)
    pieces = [f"<tool_call>{text}</tool_call>"[i : i + 40] for i in range(0, len(text) + 23, 40)]
    with patch.object(parser, "call", wraps=parser.call) as call:
        assert len([e for piece in pieces for e in parser.feed(piece)]) == 1
    assert call.call_count < 10


def test_a_long_call_full_of_ends_takes_no_quadratic_time_either() -> None:
    for family, head, part in (
        ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "', "}}"),
        ("llama4", "[f(s=[", "[1],"),
        ("qwen-xml", "<tool_call>\n<function=f>\n<parameter=s>\n", "</function>"),
        ("glm", "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>", "</arg_value><arg_key></tool_call>"),
    ):
        parser = PARSERS[family](TOOLS)
        assert isinstance(parser, Markup)
        with patch.object(parser, "call", wraps=parser.call) as call:
            parser.feed(head + part)
            for _ in range(60_000 // len(part)):
                parser.feed(part)
        sizes = [len(seen.args[0]) for seen in call.call_args_list]
        assert sum(size for size in sizes if size > parser.long) < 20 * 60_000, family


@pytest.mark.parametrize(
    ("template", "family"),
    [
        (None, "hermes"),
        ("<tool_call>{{ x | tojson }}</tool_call>", "hermes"),
        ("<tool_call><function=", "qwen-xml"),
        ("<|start_header_id|>ipython<|python_tag|>", "llama3"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>", "deepseek"),
        ("<|start|>assistant<|channel|>", "harmony"),
    ],
)
def test_a_template_shows_its_family(template: str | None, family: str) -> None:
    assert family_of(template) == family
