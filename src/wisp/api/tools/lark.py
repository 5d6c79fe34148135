"""Pieces of grammars for calls, in llguidance's dialect of Lark: texts, JSON, and parameters one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from wisp.api.fields import refuse
from wisp.api.tools.events import Tool
from wisp.engines.grammar_library import strictly

Mark = Callable[[str], str]  # a marker as Lark has it: the number of a control token, or text
Schema = dict[str, Any]
Parts = tuple[str, list[str], str | None, str]
"""Of a family's calls: what comes before all, the rules for each, what comes between two (None: there is only one), and
after all."""
_PARAM = "tools"


def text(value: str) -> str:
    """A string as Lark has it."""
    return json.dumps(value, ensure_ascii=False)


def escaped(value: str) -> str:
    """A text in a regular expression."""
    return re.escape(value).replace("\\\n", "\\n").replace("/", "\\/")


def schema_rule(schema: dict[str, Any], whole: dict[str, Any] | None = None) -> str:
    """`%json` for a schema, written as Python writes JSON. `whole`: where its definitions are."""
    shared: dict[str, Any] = {
        name: whole[name] for name in ("$defs", "definitions") if whole and name in whole
    }
    return "%json " + json.dumps(strictly({**shared, **schema}), ensure_ascii=False)


def arguments(tool: Tool) -> str:
    """`%json` for a tool's arguments."""
    return schema_rule({"type": "object", **tool.parameters})


def text_without(*markers: str, ending: str = "") -> str:
    """A terminal of any text without any of these, and with that ending."""
    return " & ".join(
        [f"/(.|\\n)*{escaped(ending)}/", *(f"~/(.|\\n)*{escaped(m)}(.|\\n)*/" for m in markers)]
    )


def is_text(schema: Schema) -> bool:
    """Is it written as it is, without quotes?"""
    return schema.get("type") == "string" or not schema


def names(tool: Tool) -> list[str]:
    """Of its parameters."""
    return [name for name, _, _ in properties(tool)]


def properties(tool: Tool, schema: Schema | None = None) -> Iterator[tuple[str, Schema, bool]]:
    """(name, schema, is it required?) of each property of an object, or of the tool's arguments."""
    schema = tool.parameters if schema is None else schema
    found = schema.get("properties")
    required = _list(tool, "required", schema.get("required") or [])
    for name, inner in found.items() if isinstance(found, dict) else ():
        yield name, inner if isinstance(inner, dict) else {}, name in required


def separated(prefix: str, parts: list[tuple[str, bool]], by: str) -> tuple[str, list[str]]:
    """How to use rules in this order, of which only some have to be there, with `by` between them; and the rules for
    that."""
    first, rest = '""', '""'
    rules: list[str] = []
    for j, (rule, needed) in reversed(list(enumerate(parts))):
        begins, goes_on = f"{rule} {rest}", f"{text(by)} {rule} {rest}"
        rules.append(f"{prefix}f{j}: {begins}" + ("" if needed else f" | {first}"))
        rules.append(f"{prefix}r{j}: {goes_on}" + ("" if needed else f" | {rest}"))
        first, rest = f"{prefix}f{j}", f"{prefix}r{j}"
    return first, rules


class Tail(NamedTuple):
    """What ends a value: text, then a control token and more text as Lark has them, if any. marker: that token's name,
    which as text would end the value, too."""

    text: str
    then: str = ""
    marker: str = ""


def tail_at(before: str, marker: str, after: str, mark: Mark) -> Tail:
    """The end that a marker is, with these texts around it."""
    token = mark(marker)
    if token.startswith('"'):
        return Tail(before + marker + after)
    return Tail(before, f"{token} {text(after)}", marker)


def parameters(i: int, tool: Tool, head: Callable[[str, Schema], str], tail: Tail) -> tuple[str, list[str]]:
    """How the rules of the tool's parameters are used, and these rules: a text to its end, or JSON. i: of the tool."""
    end = f"{text(tail.text) if tail.text else ''} {tail.then}"
    uses, rules = [], []
    for j, (name, schema, needed) in enumerate(properties(tool)):
        rule = f"p{i}_{j}"
        uses.append(rule if needed else f"{rule}?")
        rules.append(f"{rule}: {head(name, schema)} {rule}_v")
        if is_text(schema) and is_listed(schema):
            options = listed(tool, schema)
            rules.append(f"{rule}_v: ({options}) {end}")
        elif is_text(schema) and tail.then:
            rules += [
                f"{rule}_v: P{i}_{j} {tail.then}",
                f"P{i}_{j}: {text_without(tail.marker, ending=tail.text)}",
            ]
        elif is_text(schema):
            rules.append(f"{rule}_v[lazy]: /(.|\\n)*{escaped(tail.text)}/")
        else:
            rules += [f"{rule}_v: {rule}_j {end}", f"{rule}_j: {schema_rule(schema, tool.parameters)}"]
    return " ".join(uses), rules


def is_listed(schema: Schema) -> bool:
    """Does it name the values that it allows?"""
    return "enum" in schema or "const" in schema


def listed(tool: Tool, schema: Schema) -> str:
    """Any of the texts that it names. Raises RequestError 400 where these are no list."""
    values = _list(tool, "enum", schema["enum"]) if "enum" in schema else [schema["const"]]
    return " | ".join(text(str(value)) for value in values) or refuse(
        _PARAM, f"{tool.name}: an enum is empty"
    )


def _list(tool: Tool, keyword: str, value: Any) -> list[Any]:
    return value if isinstance(value, list) else refuse(_PARAM, f"{tool.name}: expected a list for {keyword}")
