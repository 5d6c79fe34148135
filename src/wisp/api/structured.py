"""Structured output: from the many ways to ask for it to one `Grammar`.

OpenAI has `response_format`, vLLM `structured_outputs` and, before, `guided_*`, SGLang `json_schema`, `regex` and
`ebnf`, llama.cpp `json_schema` and `grammar`. One of them at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from wisp.api.fields import Fields, as_object, refuse
from wisp.api.params import Common
from wisp.core.protocol.constraints import Grammar


class Asked(msgspec.Struct, frozen=True):
    """What the text must be, and the parameter that says so."""

    grammar: Grammar
    param: str


def structured(params: Common) -> Asked | None:
    """The one way that is used, None for none. Raises RequestError 400."""
    asked = [Asked(g, name) for name, g in _all(params) if g is not None]
    if len(asked) > 1:
        refuse(asked[1].param, f"cannot be used together with {asked[0].param}")
    if asked and (problem := asked[0].grammar.problem()):
        refuse(asked[0].param, problem)
    return asked[0] if asked else None


def _all(p: Common) -> Iterator[tuple[str, Grammar | None]]:
    yield "response_format", _response_format(p.response_format)
    yield "structured_outputs", _structured_outputs(p.structured_outputs)
    yield "guided_json", _schema("guided_json", p.guided_json)
    yield "guided_regex", _regex(p.guided_regex)
    yield "guided_choice", _choice("guided_choice", p.guided_choice)
    yield "guided_grammar", _lark(p.guided_grammar)
    yield "guided_json_object", Grammar("json_object") if p.guided_json_object else None
    yield "json_schema", _schema("json_schema", p.json_schema)
    yield "regex", _regex(p.regex)
    yield "grammar", _lark(p.grammar)
    yield "ebnf", _lark(p.ebnf)


def _response_format(value: dict[str, Any] | None) -> Grammar | None:
    if value is None:
        return None
    fields = Fields(value, "response_format")
    type_ = fields.string("type")
    if type_ == "text":
        return None
    if type_ == "json_object":
        return _schema("response_format.schema", fields.get("schema")) or Grammar("json_object")
    if type_ == "json_schema":
        # llama.cpp takes the schema itself here, too
        inner = value if "json_schema" not in value else fields.object("json_schema")
        if "schema" not in inner and "json_schema" not in value:
            refuse("response_format.json_schema", "expected an object with a name and a schema")
        return _schema("response_format.json_schema.schema", inner.get("schema")) or Grammar("json_object")
    return refuse("response_format.type", 'expected "text", "json_object" or "json_schema"')


def _structured_outputs(value: dict[str, Any] | None) -> Grammar | None:
    if value is None:
        return None
    path = "structured_outputs"
    fields = Fields(value, path)
    for name in ("structural_tag", "whitespace_pattern"):
        if fields.get(name) is not None:
            refuse(fields.path(name), "not supported", "unsupported_parameter")
    ways = [
        _schema(f"{path}.json", fields.get("json")),
        _regex(fields.string("regex")),
        _choice(f"{path}.choice", fields.get("choice")),
        _lark(fields.string("grammar")),
        Grammar("json_object") if fields.flag("json_object") else None,
    ]
    found = [way for way in ways if way is not None]
    if len(found) > 1:
        refuse(path, "expected one of json, regex, choice, grammar and json_object, not several")
    return found[0] if found else None


def _schema(param: str, value: Any) -> Grammar | None:
    """`value`: a schema, or the text of one."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            refuse(param, f"expected a JSON schema, got text that is no JSON: {error}")
    if isinstance(value, bool):
        return Grammar("json_schema", msgspec.json.encode(value).decode())
    return Grammar("json_schema", msgspec.json.encode(as_object(value, param).body).decode())


def _regex(value: str | None) -> Grammar | None:
    return Grammar("regex", value) if value else None


def _choice(param: str, value: Any) -> Grammar | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        refuse(param, "expected a list of strings, none of them empty")
    return Grammar("choice", msgspec.json.encode(value).decode())


def _lark(value: str | None) -> Grammar | None:
    """llguidance's dialect, or GBNF, which is told from it later."""
    return Grammar("lark", value) if value else None
