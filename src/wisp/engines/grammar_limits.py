"""Limits on grammars. llguidance compiles some for minutes, and nothing can stop it, so these are refused beforehand.

What takes so long is regular expressions that have to hold together, and multiples likewise: of two numbers it makes an
automaton of as many states as their least common multiple has units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from wisp.core.errors import GrammarError

MOST_MULTIPLE = 10_000  # of multipleOf, in units of its last digit: a million takes a minute
MOST_JOINED = 8  # expressions that hold together: of these none takes half a second, of 29 some take minutes

_JSON = "%json"
_SPACE = " \t\r\n"
_PARTS = ("anyOf", "oneOf", "$ref")  # each may say something of a value that others speak of, too
_OWN = frozenset(
    {"pattern", "format", "multipleOf", "properties", "additionalProperties", "items", "prefixItems"}
)


def check_schema(schema: Any) -> None:
    """Raises GrammarError."""
    multiples: set[Decimal] = set()
    expressions: set[str] = set()
    joined = False
    for node in _nodes(schema):
        multiple = node.get("multipleOf")
        if type(multiple) in (int, float):
            multiples.add(_multiple(Decimal(repr(multiple))))
        expressions |= {v for k in ("pattern", "format") if isinstance(v := node.get(k), str)}
        joined = joined or _joins(node)
    if not joined:
        return
    if len(expressions) > MOST_JOINED:
        raise GrammarError(
            f"at most {MOST_JOINED} patterns and formats are taken where parts of a schema have to hold together "
            "(allOf, patternProperties, or anyOf, oneOf and $ref beside other keywords)"
        )
    if len(multiples) > 1:
        _multiple(_common(multiples))


def check_lark(source: str) -> None:
    """The same for a grammar in llguidance's dialect of Lark, with the schemas in it. Raises GrammarError."""
    rest, *parts = source.split(_JSON)
    for part in parts:
        text = part.lstrip(_SPACE)
        try:
            schema, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"{_JSON} is followed by no JSON: {error}") from None
        check_schema(schema)
        rest += text[end:]
    if rest.count("&") > MOST_JOINED:
        raise GrammarError(
            f"a Lark grammar may have at most {MOST_JOINED} times &; write it as \\x26 in texts"
        )


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            yield value
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def _joins(node: dict[str, Any]) -> bool:
    """May more than one of its parts speak of the same value?"""
    all_of = node.get("allOf")
    parts = len(all_of) if isinstance(all_of, list) else 0
    parts += sum(name in node for name in _PARTS) + (not _OWN.isdisjoint(node))
    return parts > 1 or "patternProperties" in node


def _multiple(value: Decimal) -> Decimal:
    digits = value.normalize().as_tuple()
    exponent = digits.exponent if isinstance(digits.exponent, int) else 0
    if not value.is_finite() or abs(value.scaleb(max(0, -exponent))) > MOST_MULTIPLE:
        raise GrammarError(
            f"multipleOf {value} has too many digits; at most {MOST_MULTIPLE} is taken, or 0.01 to 100.00, "
            "and so for what several that hold together come to"
        )
    return value.normalize()


def _common(values: set[Decimal]) -> Decimal:
    """The least common multiple."""
    digits = max(max(0, -int(v.as_tuple().exponent)) for v in values)
    whole = math.lcm(*(abs(int(v.scaleb(digits))) for v in values))
    return Decimal(whole).scaleb(-digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
