"""The events of an answer's parser, and the tools of a client."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec


class Text(msgspec.Struct, frozen=True):
    """Content for the user."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """What the model says to itself."""

    text: str


class Call(msgspec.Struct, frozen=True):
    """A whole call. `arguments` is the text of a JSON object."""

    name: str
    arguments: str


Event = Text | Reasoning | Call


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call. `parameters` is a JSON schema; strict: arguments must follow it."""

    name: str
    parameters: dict[str, Any] = {}
    strict: bool = False

    def schema_of(self, parameter: str) -> dict[str, Any]:
        """The schema of one parameter, {} where it says nothing."""
        properties = self.parameters.get("properties")
        schema = properties.get(parameter) if isinstance(properties, dict) else None
        return schema if isinstance(schema, dict) else {}


Tools = Mapping[str, Tool]


class Incomplete(Exception):
    """The call may go on in text that has not come yet. soon: a few characters will tell."""

    def __init__(self, *, soon: bool = False) -> None:
        super().__init__()
        self.soon = soon


class Broken(Exception):
    """This is no call."""


def call(name: object, arguments: object) -> Call:
    """A call of a function with an object as its arguments. Raises Broken for anything else."""
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):  # an object, encoded twice
        arguments, _ = json_at(arguments, 0, whole=True)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise Broken
    text = json.dumps(arguments, ensure_ascii=False)
    return Call(_sound(name), _sound(text))


def _sound(text: str) -> str:
    """Without halves of surrogate pairs, which are no text."""
    return text.encode("utf-8", "replace").decode()


def _constant(name: str) -> Any:
    raise Broken  # NaN and Infinity are no JSON


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise Broken
    return value


# What the decoder stops at where a number or a word is cut: "1." is 1, and then something else.
_CUT = re.compile(r"|[.eE][-+]?\d*|-|t(ru?)?|f(a(ls?)?)?|nu?l?")
# Models write line breaks into strings as they are; nothing else that JSON forbids is let through.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_constant, parse_float=_float)


def json_at(text: str, at: int, *, whole: bool = False) -> tuple[Any, int]:
    """The JSON value at `at` and where it ends. Raises Incomplete where more text may complete it (never with
    `whole`), otherwise Broken."""
    try:
        return _DECODER.raw_decode(text, at)
    except (RecursionError, ValueError) as error:
        if isinstance(error, json.JSONDecodeError) and not whole and _may_go_on(text, error):
            raise Incomplete from None
        raise Broken from None


def _may_go_on(text: str, error: json.JSONDecodeError) -> bool:
    """Did the text end before the value did?"""
    if error.msg.startswith("Unterminated string") or error.pos >= len(text):
        return True
    tail = text[error.pos :].rstrip()
    if error.msg.startswith("Invalid \\"):  # an escape that is cut
        return len(text) - error.pos < 6
    return _CUT.fullmatch(tail) is not None
