"""Values of arguments that tag formats write as text: their types come from the tool's schema."""

from __future__ import annotations

import ast
import json
from typing import Any

from wisp.api.tools.events import Broken, Incomplete, json_at

_TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}
_LITERALS = {"True": True, "False": False, "None": None}
_LONGEST_LITERAL = 1 << 16  # characters of Python that are read where a model should have written JSON


def typed(text: str, schema: dict[str, Any]) -> Any:
    """The value that `text` stands for: text where the schema says so, otherwise JSON if it is JSON."""
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value = _value(text.strip())
    except ValueError:
        return text
    if isinstance(value, str):
        return value if types and "string" not in types else text
    return value if not types or _is_one(value, types) else text


def _types(schema: dict[str, Any]) -> set[str]:
    """The JSON types that a schema allows; none where it does not say."""
    found: set[str] = set()
    type_ = schema.get("type")
    found.update([type_] if isinstance(type_, str) else type_ if isinstance(type_, list) else [])
    for name in ("anyOf", "oneOf", "allOf"):
        for option in schema.get(name) or []:
            if isinstance(option, dict):
                found |= _types(option)
    values = [*(schema.get("enum") or []), *([schema["const"]] if "const" in schema else [])]
    if not found and values and all(isinstance(v, str) for v in values):
        found.add("string")
    if schema.get("nullable") is True and found:
        found.add("null")
    return {t for t in found if t in _TYPES}


def _is_one(value: Any, types: set[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return True
    return any(isinstance(value, _TYPES[t]) for t in types if t != "boolean")


def _value(text: str) -> Any:
    """JSON, or what Python would write for it. Raises ValueError."""
    if text in _LITERALS:
        return _LITERALS[text]
    try:
        value, end = json_at(text, 0, whole=True)
        if end == len(text):
            return value
    except (Broken, Incomplete):
        pass
    if text[:1] in ("{", "[") and len(text) <= _LONGEST_LITERAL:
        try:
            value = ast.literal_eval(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError from None
        return value
    raise ValueError
