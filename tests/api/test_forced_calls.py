"""Whatever a grammar for calls allows is a call that the family's parser reads, with arguments that fit the schema."""

from __future__ import annotations

import codecs
import json
import random
from typing import Any

import numpy as np
import pytest

from api_fakes import ByteTokenizer
from wisp.api.backend import Target
from wisp.api.prepare import prepare
from wisp.api.reader import Family, Reader, Reading
from wisp.api.requests import parse_chat
from wisp.api.tools import forced, lark
from wisp.api.tools.events import Call, Event, Text, Tool
from wisp.api.tools.families import PARSERS
from wisp.core.errors import RequestError
from wisp.core.protocol.constraints import Grammar
from wisp.engines.grammar_trial import Trials
from wisp.engines.grammars import Grammars
from wisp.engines.special import Special, SpecialTokens

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
        "s": {"type": "string", "maxLength": 5, "pattern": "^[a-z<]*$"},
        "u": {"type": "string", "enum": ["c", 'f"']},
        "o": {"$ref": "#/$defs/O"},
    },
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {
        "O": {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False}
    },
}
TOOLS = {
    "f": Tool("f", SCHEMA),
    "g_2": Tool("g_2", {"type": "object", "properties": {}, "additionalProperties": False}),
}
TEMPLATES = {
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS][ARGS]"],
    "deepseek": ["", "```json"],
    "dsml": ["", "<｜DSML｜tool_calls>"],
    "llama4": ["", "<|python_start|>"],
}
FAMILIES = [
    (name, template, as_tokens)
    for name in PARSERS
    for template in TEMPLATES.get(name, [""])
    for as_tokens in (False, True)
]
MOST = 3000  # tokens of an answer


class Marked(ByteTokenizer):
    """Bytes, and a family's markers as control tokens."""

    def __init__(self, markers: tuple[str, ...], template: str) -> None:
        super().__init__()
        self.special = SpecialTokens(Special(257 + i, text, control=True) for i, text in enumerate(markers))
        self.controls = self.special.controls
        self.n_vocab = 257 + len(markers)
        self.eos = frozenset({256})
        self.chat_template = template
        self.fingerprint = f"{markers}{template}"

    def encode(self, text, *, add_bos, parse_special, stand_ins=None, check=None):  # type: ignore[no-untyped-def]
        parts = self.special.split(text, control=parse_special)
        return [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]


# What free text ends with, which no random text would find
ENDINGS = {
    "qwen-xml": "\n</parameter>\n",
    "glm": "</arg_value>\n",
    "dsml": "</｜DSML｜parameter>\n",
    "kimi-k3": "<|close|>argument<|sep|>",
    "gemma4": '<|"|>',
}


def answer(tokenizer: Marked, source: str, seed: int, ending: str) -> list[int]:
    """Tokens that the grammar allows, at random; ends of sequence where they can be had, and of text now and then."""
    matcher = Grammars(tokenizer).matcher(Grammar("lark", f"%llguidance {{}}\nstart: calls\n{source}\n"))
    choose = random.Random(seed)
    tokens: list[int] = []
    wanted: list[int] = []
    while len(tokens) < MOST:
        (mask,) = matcher.masks(tokens, [])
        allowed = [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]
        if 256 in allowed and (len(allowed) == 1 or choose.random() < 0.5):
            return tokens
        if not wanted and choose.random() < 0.1:
            as_text = choose.random() < 0.3
            wanted = tokenizer.encode(ending, add_bos=False, parse_special=not as_text)  # type: ignore[no-untyped-call]
        if wanted and wanted[0] in allowed:
            tokens.append(wanted.pop(0))
            continue
        wanted = []
        printable = [i for i in allowed if 32 <= i < 127 or i > 256] or allowed
        tokens.append(choose.choice(printable))
    pytest.fail(f"no end after {bytes(i for i in tokens if i < 256)!r}")


@pytest.mark.parametrize(("name", "template", "as_tokens"), FAMILIES)
def test_a_forced_answer_is_calls_and_nothing_else(name: str, template: str, as_tokens: bool) -> None:
    tokenizer = Marked(PARSERS[name].markers if as_tokens else (), template)
    family = Family(name, tokenizer)

    def mark(marker: str) -> str:
        token = family.ids.get(marker)
        return lark.text(marker) if token is None else f"<[{token}]>"

    source = forced.grammar(name, template, list(TOOLS.values()), parallel=True, mark=mark)
    assert source is not None
    called = set()
    for seed in range(8):
        reader = Reader(Reading(family.parser, family.names, TOOLS))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in answer(tokenizer, source, seed, ENDINGS.get(name, "")):
            reader.feed(decoder.decode(reader.piece(tokenizer, token)))
        reader.end(cut=False)
        events: list[Event] = reader.take()
        assert events
        assert not [e for e in events if isinstance(e, Text)]
        for call in events:
            if isinstance(call, Call):
                called.add(call.name)
                check(call)
    assert called == set(TOOLS)


@pytest.mark.parametrize(("name", "template", "as_tokens"), FAMILIES)
def test_along_a_draft_its_masks_are_those_one_by_one(name: str, template: str, as_tokens: bool) -> None:
    tokenizer = Marked(PARSERS[name].markers if as_tokens else (), template)
    family = Family(name, tokenizer)

    def mark(marker: str) -> str:
        token = family.ids.get(marker)
        return lark.text(marker) if token is None else f"<[{token}]>"

    source = forced.grammar(name, template, list(TOOLS.values()), parallel=True, mark=mark)
    assert source is not None
    tokens = answer(tokenizer, source, 3, ENDINGS.get(name, ""))
    grammars, grammar = Grammars(tokenizer), Grammar("lark", f"%llguidance {{}}\nstart: calls\n{source}\n")
    matcher, choose = grammars.matcher(grammar), random.Random(1)
    expected = [matcher.masks(tokens[:i], [])[0].copy() for i in range(len(tokens) + 1)]
    matcher = grammars.matcher(grammar)
    for _ in range(60):
        at = choose.randrange(len(tokens))
        n = choose.randrange(min(17, len(tokens) - at + 1))
        masks = matcher.masks(tokens[:at], tokens[at : at + n])
        assert np.array_equal(masks, expected[at : at + n + 1])


def check(call: Call) -> None:
    arguments = json.loads(call.arguments)
    if call.name == "g_2":
        assert arguments == {}
        return
    assert arguments.keys() <= SCHEMA["properties"].keys()  # type: ignore[attr-defined]
    assert type(arguments["n"]) is int
    assert isinstance(arguments.get("s", ""), str)
    assert arguments.get("u", "c") in ("c", 'f"')
    assert isinstance(arguments.get("o", {}), dict)


# which write parameters one by one
@pytest.mark.parametrize("name", ["qwen-xml", "glm", "dsml", "kimi-k3", "llama4", "gemma4"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "string", "enum": 5}}},
        {"properties": {"a": {"type": "string", "enum": None}}},
        {"properties": {"a": {"type": "string", "enum": []}}},
        {"properties": {"a": 5}, "required": 5},
    ],
)
def test_a_schema_that_is_none_is_the_clients_fault(name: str, parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "required"}
    tokenizer = Marked((), "")
    target = Target("m", tokenizer, 4000, "", Grammars(tokenizer))
    with pytest.raises(RequestError) as refused:
        prepare(parse_chat(body, {}), target, parser=name)
    assert (refused.value.status, refused.value.param in ("tools", "tool_choice")) == (400, True)


@pytest.mark.parametrize("forced", [True, False])
def test_a_schema_that_would_take_long_to_compile_is_a_400_that_says_what_it_has(
    monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    """As the schema of an answer, and as that of a call's arguments."""
    monkeypatch.setattr("wisp.engines.grammar_trial.TRIALS._limits", (0.3, 40 << 20))
    schema = {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    if forced:
        function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
        body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    else:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tokenizer = Marked((), "")
    target = Target("m", tokenizer, 4000, "", Grammars(tokenizer))
    with pytest.raises(
        RequestError, match=r"takes more than .* to compile; it has multipleOf, allOf"
    ) as refused:
        prepare(parse_chat(body, {}), target, parser="hermes")
    assert (refused.value.status, refused.value.code) == (400, "invalid_grammar")
    assert refused.value.param == ("tool_choice" if forced else "response_format")


def test_where_no_process_can_be_had_for_a_grammar_the_server_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("wisp.engines.grammars.TRIALS", Trials())
    monkeypatch.setattr("wisp.engines.grammar_trial._started", none)
    body = {"messages": [{"role": "user", "content": "x"}], "guided_regex": "a+"}
    tokenizer = Marked((), "")
    target = Target("m", tokenizer, 4000, "", Grammars(tokenizer))
    with pytest.raises(RequestError, match="no more processes") as refused:
        prepare(parse_chat(body, {}), target)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.retry_after
