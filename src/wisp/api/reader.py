"""Reads an answer's text as content, reasoning and tool calls, in the format of the model's template."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from wisp.api.tools.events import Call, Event, Reasoning, Text, Tools
from wisp.api.tools.families import PARSERS, family_of
from wisp.api.tools.harmony import Harmony
from wisp.api.tools.markup import Markup, Pair, Parser
from wisp.engines.base import Tokenizer


class Family:
    """How one model writes reasoning and calls.

    names: the texts of the markers that are control tokens, by id; other tokens' texts are known anyway
    thinks: does its template have reasoning at all?
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.template = tokenizer.chat_template or ""
        self.parser: type[Parser] = PARSERS[name]
        self.names: dict[int, str] = {}
        for marker in self.parser.markers:
            if marker in tokenizer.controls:
                ids = tokenizer.encode(marker, add_bos=False, parse_special=True)
                if len(ids) == 1 and not tokenizer.piece(ids[0]):
                    self.names[ids[0]] = marker
        self.ids = {text: token for token, text in self.names.items()}
        self.pairs: tuple[Pair, ...] = self.parser.thinks if issubclass(self.parser, Markup) else ()
        self.thinks = issubclass(self.parser, Harmony) or any(
            p[0].rstrip() in self.template for p in self.pairs
        )

    def open_thought(self, prompt: str) -> Pair | None:
        """The pair of which the prompt ends right after the first, if it does."""
        end = prompt.rstrip()
        return next((pair for pair in self.pairs if end.endswith(pair[0].rstrip())), None)

    def thinks_in(self, text: str) -> bool:
        """Does `text`, the beginning of an answer, end inside of reasoning?"""
        return any(text.rfind(opener) > text.rfind(closer) for opener, closer in self.pairs)


_FAMILIES: dict[tuple[str, str], Family] = {}  # by the tokenizer's fingerprint and template, and name


def family(tokenizer: Tokenizer, name: str = "") -> Family:
    """The family of a model: `name`, or that of its template."""
    name = name or family_of(tokenizer.chat_template)
    key = (f"{tokenizer.fingerprint}/{hash(tokenizer.chat_template)}", name)
    if key not in _FAMILIES:
        if len(_FAMILIES) >= 16:
            _FAMILIES.clear()
        _FAMILIES[key] = Family(name, tokenizer)
    return _FAMILIES[key]


class Reading(msgspec.Struct, frozen=True):
    """How to read an answer. `names`: see `Family`; `thinking`: the prompt ends in reasoning; `one_call`: no more."""

    parser: type[Parser]
    names: Mapping[int, str] = {}
    tools: Tools = {}
    thinking: bool = False
    one_call: bool = False
    include_reasoning: bool = True


class Reader:
    """One answer's text, in pieces. `done`: nothing that may come counts any more."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parser = reading.parser(reading.tools, reading.thinking)
        self._events: list[Event] = []
        self.called = False
        self.done = False

    def piece(self, tokenizer: Tokenizer, token: int) -> bytes:
        """The bytes of a token, markers included."""
        name = self._reading.names.get(token)
        return tokenizer.piece(token) if name is None else name.encode()

    @property
    def reasons(self) -> bool:
        """Is what comes next reasoning?"""
        return self._parser.reasons

    def feed(self, text: str) -> None:
        """The next piece."""
        self._take(self._parser.feed(text))

    def end(self, *, cut: bool) -> None:
        """The answer has ended, by a limit if `cut`."""
        if not self.done:
            self._take(self._parser.end(cut=cut))

    def take(self) -> list[Event]:
        """What has become certain since the last call."""
        events, self._events = self._events, []
        return events

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if self.done:
                return
            if isinstance(event, Call):
                self.called = True
                self.done = self._reading.one_call
            if isinstance(event, Reasoning) and not self._reading.include_reasoning:
                continue
            last = self._events[-1] if self._events else None
            if isinstance(event, Text) and isinstance(last, Text):
                self._events[-1] = Text(last.text + event.text)
            elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
                self._events[-1] = Reasoning(last.text + event.text)
            else:
                self._events.append(event)
