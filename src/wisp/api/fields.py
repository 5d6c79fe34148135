"""Typed access to a JSON object from outside: every complaint names the field and says what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from wisp.core.errors import RequestError


def refuse(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    """Raise the 400 that says what is wrong with `param`."""
    raise RequestError(400, f"{param}: {message}", param=param, code=code)


def kind(value: object) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "an integer"),
        (float, "a number"),
        (list, "a list"),
    )
    return next((name for type_, name in names if isinstance(value, type_)), "an object")


class Fields:
    """A JSON object. A field that is null counts as absent, as with OpenAI."""

    def __init__(self, body: Mapping[str, Any], prefix: str = "") -> None:
        self.body = body
        self._prefix = prefix

    @property
    def where(self) -> str:
        """How errors call the object itself, e.g. `messages[0]`; "" for the body."""
        return self._prefix

    def get(self, name: str) -> Any:
        """The raw value, None if absent or null."""
        return self.body.get(name)

    def path(self, name: str) -> str:
        """How errors call a field, e.g. `messages[0].content`."""
        return f"{self._prefix}.{name}" if self._prefix else name

    def string(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            self.wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, "true or false")
        return bool(value)

    def list(self, name: str) -> list[Any]:
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            self.wrong(name, "a list")
        return value or []

    def object(self, name: str) -> dict[str, Any]:
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            self.wrong(name, "an object")
        return value or {}

    def wrong(self, name: str, expected: str) -> NoReturn:
        """Refuse the field: it is not what was expected."""
        value = self.get(name)
        shown = f"{value}" if isinstance(value, (int, float)) and abs(value) < 1e18 else kind(value)
        refuse(self.path(name), f"expected {expected}, got {shown}")


def as_object(value: object, path: str) -> Fields:
    """`value` as an object whose errors are named after `path`."""
    if not isinstance(value, dict):
        refuse(path, f"expected an object, got {kind(value)}")
    return Fields(value, path)
