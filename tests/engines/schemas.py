"""JSON schemas made from a seed, over every keyword that grammars support. Each keyword leads in turn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

NAMES = ("id", "name", "size", "tags", "color", "note", "x", "y", "né", "two words")
WORDS = ("red", "green", "lamp", "fox", "", "a b", 'quo"te', "ünï", "line\nbreak")
# Those that both sides know; `uri` and the like are not checked by jsonschema without more packages.
FORMATS = ("date", "email", "ipv4", "ipv6", "uuid", "date-time", "time", "duration", "hostname")
PATTERNS = ("^[a-f]{2,5}$", "^(on|off)$", "^[A-Z][a-z]*[0-9]$", "^x", "^\\d{3}-\\d{2}$")


class Maker:
    """Schemas of bounded depth, so that a small model comes to an end of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def schema(self, lead: str, depth: int = 2) -> Schema:
        """One in which the keyword `lead` is used at the top."""
        return KEYWORDS[lead](self, depth)

    def any(self, depth: int) -> Schema:
        """Anything; leaves only, where `depth` is 0."""
        lead = self.rng.choice(LEAVES if depth <= 0 else INNER)
        return KEYWORDS[lead](self, depth)

    def names(self, n: int) -> list[str]:
        return self.rng.sample(NAMES, n)


def _type(m: Maker, depth: int) -> Schema:
    return {"type": m.rng.choice(("boolean", "null", "integer", "number"))}


def _types(m: Maker, depth: int) -> Schema:
    return {"type": m.rng.sample(["boolean", "null", "integer"], 2)}


def _enum(m: Maker, depth: int) -> Schema:
    return {"enum": m.rng.sample([*WORDS, 0, -3, 2.5, True, None, [1, "a"], {"k": 1}], m.rng.randint(1, 5))}


def _const(m: Maker, depth: int) -> Schema:
    return {"const": m.rng.choice([*WORDS, 12, False, None, [], {"a": {"b": 2}}])}


def _length(m: Maker, depth: int) -> Schema:
    low = m.rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + m.rng.randint(0, 6)}


def _pattern(m: Maker, depth: int) -> Schema:
    pattern = m.rng.choice(PATTERNS)
    return {"type": "string", "pattern": pattern} | ({"maxLength": 9} if pattern == "^x" else {})


def _format(m: Maker, depth: int) -> Schema:
    return {"type": "string", "format": m.rng.choice(FORMATS)}


def _bounds(m: Maker, depth: int) -> Schema:
    kind, low = m.rng.choice(("integer", "number")), m.rng.randint(-120, 120)
    return {"type": kind, "minimum": low, "maximum": low + m.rng.randint(1, 300)}


def _exclusive(m: Maker, depth: int) -> Schema:
    kind, low = m.rng.choice(("integer", "number")), m.rng.randint(-9, 99)
    return {"type": kind, "exclusiveMinimum": low, "exclusiveMaximum": low + m.rng.randint(2, 40)}


def _multiple(m: Maker, depth: int) -> Schema:
    return {"type": "integer", "multipleOf": m.rng.choice((2, 3, 7, 10)), "minimum": 0, "maximum": 500}


def _items(m: Maker, depth: int) -> Schema:
    low = m.rng.randint(0, 2)
    return {
        "type": "array",
        "items": m.any(depth - 1),
        "minItems": low,
        "maxItems": low + m.rng.randint(0, 2),
    }


def _prefix_items(m: Maker, depth: int) -> Schema:
    prefix = [m.any(depth - 1) for _ in range(m.rng.randint(1, 3))]
    return {"type": "array", "prefixItems": prefix, "items": False, "minItems": m.rng.randint(0, len(prefix))}


def _properties(m: Maker, depth: int) -> Schema:
    names = m.names(m.rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: m.any(depth - 1) for name in names},
        "required": names[: m.rng.randint(0, len(names))],
        "additionalProperties": False,
    }


def _additional(m: Maker, depth: int) -> Schema:
    return {
        "type": "object",
        "properties": {"first": m.any(depth - 1)},
        "required": ["first"],
        "additionalProperties": m.any(depth - 1),
        "maxProperties": m.rng.randint(1, 3),
    }


def _property_counts(m: Maker, depth: int) -> Schema:
    return {"type": "object", "additionalProperties": m.any(0), "minProperties": 1, "maxProperties": 2}


def _pattern_properties(m: Maker, depth: int) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^[ab]{1,3}$": m.any(depth - 1), "^z[0-9]$": m.any(0)},
        "additionalProperties": False,
        "maxProperties": 2,
    }


def _any_of(m: Maker, depth: int) -> Schema:
    return {"anyOf": [m.any(depth - 1) for _ in range(m.rng.randint(1, 3))]}


def _one_of(m: Maker, depth: int) -> Schema:
    return {
        "oneOf": [_bounds(m, 0) | {"type": "integer"}, _length(m, 0), {"type": "null"}][: m.rng.randint(1, 3)]
    }


def _all_of(m: Maker, depth: int) -> Schema:
    return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": m.rng.randint(4, 60)}]}


def _ref(m: Maker, depth: int) -> Schema:
    return {
        "$defs": {"it": m.any(depth - 1)},
        "type": "array",
        "items": {"$ref": "#/$defs/it"},
        "maxItems": 2,
    }


def _recursive(m: Maker, depth: int) -> Schema:
    node = {
        "type": "object",
        "properties": {
            "v": {"type": "integer", "minimum": 0, "maximum": 9},
            "next": {"$ref": "#/$defs/node"},
        },
        "required": ["v"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


KEYWORDS: dict[str, Callable[[Maker, int], Schema]] = {
    "type": _type,
    "types": _types,
    "enum": _enum,
    "const": _const,
    "minLength": _length,
    "pattern": _pattern,
    "format": _format,
    "minimum": _bounds,
    "exclusiveMinimum": _exclusive,
    "multipleOf": _multiple,
    "items": _items,
    "prefixItems": _prefix_items,
    "properties": _properties,
    "additionalProperties": _additional,
    "minProperties": _property_counts,
    "patternProperties": _pattern_properties,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "allOf": _all_of,
    "$ref": _ref,
    "recursion": _recursive,
}
LEAVES = tuple(KEYWORDS)[:10]
INNER = tuple(KEYWORDS)[:-2]  # a reference is looked up from the top


def made(n: int, seed: int) -> list[Schema]:
    """`n` schemas."""
    maker, leads = Maker(seed), list(KEYWORDS)
    return [maker.schema(leads[i % len(leads)]) for i in range(n)]
