"""Grammars for calls in notations of their own: Llama 4's Python, Gemma 4's objects."""

from __future__ import annotations

import keyword
import re

from wisp.api.tools.events import Tool
from wisp.api.tools.lark import (
    Mark,
    Parts,
    Schema,
    escaped,
    is_listed,
    is_text,
    listed,
    names,
    properties,
    schema_rule,
    separated,
    text,
    text_without,
)
from wisp.api.tools.object_calls import Gemma4

QUOTE = Gemma4.QUOTE
_REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/]+)")


def llama4(tools: list[Tool], template: str, mark: Mark) -> Parts | None:
    """In Python's notation, where names have to be Python's, too."""
    words = [word for tool in tools for word in (*tool.name.split("."), *names(tool))]
    if not all(word.isidentifier() and not keyword.iskeyword(word) for word in words):
        return None
    start, end = mark("<|python_start|>"), mark("<|python_end|>")
    if start.startswith('"') and "<|python_start|>" not in template:
        start = end = ""
    rules = []
    for i, tool in enumerate(tools):
        parts = []
        for j, (name, schema, needed) in enumerate(properties(tool)):
            rule = f"p{i}_{j}"
            parts.append((rule, needed))
            value = f"{rule}_v"
            if is_text(schema) and not is_listed(schema):
                rules.append(f'{value}: /"([^"\\\\\\n\\r]|\\\\["\\\\nrt])*"/')
            elif schema.get("type") == "boolean" and not is_listed(schema):
                rules.append(f'{value}: "True" | "False"')
            else:
                rules.append(f"{value}: {schema_rule(schema, tool.parameters)}")
            rules.append(f"{rule}: {text(name + '=')} {value}")
        uses, more = separated(f"a{i}", parts, ", ")
        rules += [f'call{i}: {text(tool.name + "(")} {uses} ")"', *more]
    return f'{start} "["', rules, text(", "), f'"]" {end}'


def gemma4(tools: list[Tool], template: str, mark: Mark) -> Parts | None:
    """In a notation of its own, in which not every schema can be written."""
    start, end, quote = mark("<|tool_call>"), mark("<tool_call|>"), mark(QUOTE)
    rules = []
    for i, tool in enumerate(tools):
        objects = _GemmaObjects(tool, quote)
        if not objects.add_object(f"o{i}", {"type": "object", **tool.parameters}):
            return None
        rules += [f"call{i}: {start} {text(f'call:{tool.name}')} o{i} {end}", *objects.rules]
    return "", rules, "", ""


class _GemmaObjects:
    """Rules for values in Gemma's notation. Those that add one say whether it can be written."""

    KEY = re.compile(r"[\w.-]+")  # without quotes

    def __init__(self, tool: Tool, quote: str) -> None:
        self.rules: list[str] = []
        self._tool = tool
        self._quote = quote

    def add_object(self, rule: str, schema: Schema, deepest: int = 8) -> bool:
        parts = []
        for j, (name, inner, needed) in enumerate(properties(self._tool, schema)):
            if self.KEY.fullmatch(name) is None or not self.add(f"{rule}_{j}v", inner, deepest):
                return False
            self.rules.append(f"{rule}_{j}: {text(name + ':')} {rule}_{j}v")
            parts.append((f"{rule}_{j}", needed))
        uses, more = separated(rule + "_", parts, ",")
        self.rules += [f'{rule}: "{{" {uses} "}}"', *more]
        return True

    def add(self, rule: str, schema: Schema, deepest: int) -> bool:
        """A value of any kind."""
        schema = self._resolved(schema)
        kind, quote = schema.get("type"), self._quote
        if kind == "object" and deepest:
            return self.add_object(rule, schema, deepest - 1)
        if kind == "array" and isinstance(schema.get("items"), dict) and deepest:
            self.rules.append(f'{rule}: "[" ({rule}i ("," {rule}i)*)? "]"')
            return self.add(f"{rule}i", schema["items"], deepest - 1)
        if is_text(schema) and is_listed(schema):
            self.rules.append(f"{rule}: {quote} ({listed(self._tool, schema)}) {quote}")
        elif is_text(schema) and quote.startswith('"'):
            self.rules += [f"{rule}: {quote} {rule}t", f"{rule}t[lazy]: /(.|\\n)*{escaped(QUOTE)}/"]
        elif is_text(schema):
            terminal = rule.upper()
            self.rules += [f"{rule}: {quote} {terminal} {quote}", f"{terminal}: {text_without(QUOTE)}"]
        elif kind in ("integer", "number", "boolean", "null"):
            self.rules.append(f"{rule}: {schema_rule(schema, self._tool.parameters)}")
        else:
            return False
        return True

    def _resolved(self, schema: Schema) -> Schema:
        """What a reference to a definition of the tool's stands for."""
        found = _REFERENCE.fullmatch(str(schema.get("$ref")))
        definitions = self._tool.parameters.get(found[1]) if found is not None else None
        inner = definitions.get(found[2]) if found is not None and isinstance(definitions, dict) else None
        return inner if isinstance(inner, dict) else schema
