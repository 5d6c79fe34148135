"""A request of one surface that becomes a chat: errors name what the client has sent, not what became of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from wisp.core.errors import RequestError

Json = dict[str, Any]
Names = Mapping[str, str]  # what the client calls a parameter, by its name here; of paths the longest counts


@contextmanager
def clients_words(names: Names) -> Iterator[None]:
    """Around work on a request: a RequestError speaks of its parameters as the client does."""
    try:
        yield
    except RequestError as error:
        if not names:
            raise
        text, param = str(error), error.param
        if param:
            param = _told(param, names)
            if text.startswith(f"{error.param}: "):
                text = param + text.removeprefix(error.param or "")
        for name, told in names.items():
            if re.fullmatch(r"\w+_\w+", name):  # other names are also words of a sentence
                text = re.sub(rf"\b{name}\b", told, text)
        raise RequestError(
            error.status, text, code=error.code, param=param, type=error.type, retry_after=error.retry_after
        ) from None


def _told(param: str, names: Names) -> str:
    """`param` as the client calls it."""
    for at in (len(param), *sorted((i for i, c in enumerate(param) if c in ".["), reverse=True)):
        if (told := names.get(param[:at])) is not None:
            return told + param[at:]
    return param


class History:
    """The messages of a chat that is made of something else, and where each comes from.

    names: for `clients_words`
    """

    def __init__(self, names: Names) -> None:
        self.messages: list[Json] = []
        self.tools: list[Json] = []
        self.names = dict(names)

    def add(self, message: Json, path: str) -> None:
        """The next message; `path`: where the client has said it."""
        self.names[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)

    def call(self, call: Json, path: str, arguments: str) -> None:
        """Another call of the last message. `arguments`: the field that has them at `path`."""
        calls = self.messages[-1].setdefault("tool_calls", [])
        at = f"messages[{len(self.messages) - 1}].tool_calls"
        self.names.setdefault(at, path)
        self.names[f"{at}[{len(calls)}]"] = self.names[f"{at}[{len(calls)}].function"] = path
        self.names[f"{at}[{len(calls)}].function.arguments"] = f"{path}.{arguments}"
        calls.append(call)

    def offer(self, function: Json, path: str, parameters: str) -> None:
        """Another tool. `parameters`: the field that has their schema at `path`."""
        at = f"tools[{len(self.tools)}]"
        self.names[at] = self.names[f"{at}.function"] = path
        self.names[f"{at}.function.parameters"] = f"{path}.{parameters}"
        self.tools.append({"type": "function", "function": function})
