"""The guard of chat templates: text from a client never becomes a control token.

A template puts its own markers (`<|im_end|>`) around what clients send, and only afterwards is the whole read. So
while the template works, the first and last characters of control tokens (`<` and `>`, say) are replaced in all
that comes from the client by characters that stand for them, one for one: trimming, slicing, joining and writing as
JSON go on as before. What looks like a control token then is one only if both its ends are the template's; the
tokenizer puts the characters back in everything else.

Two finer points:
- Templates look for text of their own in a message, such as `</think>`. Such text stays as it is, if a control token
  can neither begin nor end in it.
- A template may write both ends of a control token around a string from the client (`<{{ key }}>`): a string that
  would make one is changed, too. A message's role is one of a few words, and the template's to use.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from wisp.api.messages import Message
from wisp.api.template import chat_template
from wisp.core.errors import RequestError
from wisp.engines.special import NO_STAND_INS, StandIns

_FROM_CLIENT = ("content", "name", "tool_call_id", "reasoning_content", "tool_calls")  # all but the role
_FIRST_STAND_IN = 0x2800  # braille patterns: printable, so that nothing escapes them, and no letters


class Guard:
    """What to replace in strings from clients, for one template and one vocabulary's control tokens."""

    def __init__(self, tested: Set[str], written: Set[str], source: str, controls: Set[str]) -> None:
        """tested: texts that the template looks for or names; written: pieces of text that it writes."""
        self._ends = {text[0] for text in controls} | {text[-1] for text in controls}
        self._marks = re.compile(f"[{re.escape(''.join(sorted(self._ends)))}]") if controls else None
        heads = {text[:i] for text in controls for i in range(1, len(text) + 1)}
        tails = {text[-i:] for text in controls for i in range(1, len(text) + 1)}
        kept = [
            text
            for text in tested
            if self._marks is not None
            and self._marks.search(text)
            and not any(text[i:] in heads or text[: i + 1] in tails for i in range(len(text)))
            and not any(text in control or control in text for control in controls)
        ]
        kept.sort(key=len, reverse=True)
        self._kept = re.compile(f"({'|'.join(map(re.escape, kept))})") if kept else None
        before, after = _ends(written, heads, tails)
        inner = {
            text[i:j]
            for text in controls
            for i in range(1, len(text))
            if text[:i] in before
            for j in range(i + 1, len(text))
            if text[j:] in after
        }
        self._inner = inner.difference(tested)
        self._taken = set(source).union(*controls)

    def __call__(
        self, messages: list[Message], tools: list[Any], args: Mapping[str, Any]
    ) -> tuple[list[Message], list[Any], dict[str, Any], StandIns]:
        """All of these guarded, and what stands for what in them. Nothing changes where nothing has to."""
        values = dict(args)
        try:
            strings = [
                *_strings([_said(m) for m in messages]),
                *_strings(tools),
                *_strings([*values.values()]),
            ]
            if not any(self._changes(s) for s in strings):
                return messages, tools, values, NO_STAND_INS
            stand_ins = self._choose(self._taken.union(*strings))
            return (
                [m | self._guarded(_said(m), stand_ins) for m in messages],
                self._guarded(tools, stand_ins),
                {name: self._guarded(value, stand_ins) for name, value in values.items()},
                {ord(stand_in): char for char, stand_in in stand_ins.items()},
            )
        except RecursionError:
            raise RequestError(400, "The messages or tools are nested too deeply.") from None

    def _changes(self, text: str) -> bool:
        return (
            self._marks is not None and self._marks.search(text) is not None
        ) or text.strip() in self._inner

    def _choose(self, taken: Set[str]) -> dict[str, str]:
        """A character for each that may have to be replaced, none of which is in use."""
        free = (chr(i) for i in range(_FIRST_STAND_IN, 0x110000))
        usable = (c for c in free if c.isprintable() and not c.isalnum() and c not in taken)
        replaced = sorted(self._ends | {text[0] for text in self._inner})
        found = dict(zip(replaced, usable, strict=False))
        if len(found) < len(replaced):
            raise RequestError(400, "The messages use every character there is; leave some out.")
        return found

    def _guarded(self, value: Any, stand_ins: dict[str, str]) -> Any:
        if isinstance(value, str):
            return self._text(value, stand_ins)
        if isinstance(value, dict):
            return {self._guarded(k, stand_ins): self._guarded(v, stand_ins) for k, v in value.items()}
        if isinstance(value, list):
            return [self._guarded(v, stand_ins) for v in value]
        return value

    def _text(self, text: str, stand_ins: dict[str, str]) -> str:
        if not self._changes(text):
            return text
        if (inner := text.strip()) in self._inner:
            return text.replace(inner[0], stand_ins[inner[0]], 1)
        table = {ord(char): stand_ins[char] for char in self._ends}
        parts = self._kept.split(text) if self._kept is not None else [text]
        return "".join(part if i % 2 else part.translate(table) for i, part in enumerate(parts))


def _ends(written: Iterable[str], heads: Set[str], tails: Set[str]) -> tuple[set[str], set[str]]:
    """(heads of control tokens in which what a template writes ends, tails in which it begins)."""
    before: set[str] = set()
    after: set[str] = set()
    longest = max(map(len, heads), default=0)
    for text in written:
        sizes = range(1, min(len(text), longest) + 1)
        before.update(text[-i:] for i in sizes if text[-i:] in heads)
        after.update(text[:i] for i in sizes if text[:i] in tails)
    return before, after


def _said(message: Message) -> Message:
    return {name: message[name] for name in _FROM_CLIENT if name in message}


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


@functools.lru_cache(maxsize=8)
def guard(source: str | None, controls: frozenset[str]) -> Guard:
    """The guard of a model's template (None: as `chat_template`) and control tokens."""
    template = chat_template(source)
    return Guard(template.tested, template.written, template.source, controls)
