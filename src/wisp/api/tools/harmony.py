"""gpt-oss: an answer is messages, each with a header that says its channel and, of a call, the function.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{...}

The prompt ends in `<|start|>assistant`, so the first header is cut. What stands in the analysis channel is reasoning;
an end marker ends a message only where another begins after it.
"""

from __future__ import annotations

import re

from wisp.api.tools.events import Broken, Call, Event, Incomplete, Reasoning, Text, Tools, call, json_at
from wisp.api.tools.markup import Parser
from wisp.api.tools.reading import held_back, skip

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")


class Harmony(Parser):
    """States: in a header, or in the body of a message of some kind."""

    markers = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    _RECIPIENT = re.compile(r"\bto=(\S+?)(?=\s|<\||$)")
    _CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
    _BARE = re.compile(
        r"(?:\s|<\|start\|>assistant|to=\S+?(?=\s|<\||$)|<\|(?:channel|constrain)\|>\s*\w*)*"
    )  # cut
    _END = re.compile(r"(?:<\|end\|>|<\|call\|>|<\|return\|>)\s*(?:(?=<\|start\|>)|\Z)")

    def __init__(self, tools: Tools, thinking: bool = False) -> None:
        super().__init__(tools, thinking)
        self._text = ""
        self._begun = False
        self._kind: type[Text] | type[Reasoning] | type[Call] | None = (
            None  # of the message; None in a header
        )
        self._name = ""
        self._events: list[Event] = []

    @property
    def reasons(self) -> bool:
        return self._kind is Reasoning

    def feed(self, text: str) -> list[Event]:
        self._text += text
        return self._run(final=False)

    def end(self, *, cut: bool = False) -> list[Event]:
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Event]:
        self._events = []
        while self._header(final) if self._kind is None else self._body(final):
            pass
        return self._events

    def _header(self, final: bool) -> bool:
        if not self._begun and not self._is_header(final):
            return False
        at = self._text.find(MESSAGE)
        stray = self._END.search(self._text, 0, at if at >= 0 else len(self._text))
        if stray is not None and (final or stray.end() < len(self._text)):  # a header that never ends
            self._say(Text, self._text[: stray.start()])
            self._text = self._text[stray.end() :]
            return True
        if at < 0:
            if final and not self._BARE.fullmatch(self._text):
                self._say(Text, self._text)
            self._text = "" if final else self._text
            return False
        self._open(self._text[:at])
        self._text = self._text[at + len(MESSAGE) :]
        return True

    def _is_header(self, final: bool) -> bool:
        """Does the answer begin with a header? Otherwise it is content. (False, too, while that is not known.)"""
        head = self._text.lstrip()
        beginnings = (CHANNEL, START, "to=", MESSAGE, CONSTRAIN)
        if head.startswith(beginnings):
            self._begun = True
            return True
        if final or not any(b.startswith(head) for b in beginnings):
            self._begun, self._kind = True, Text
            return bool(self._text) and self._body(final)
        return False

    def _open(self, header: str) -> None:
        """Begin the message that `header` announces."""
        channels = self._CHANNEL.findall(header)
        last = header[header.rfind(CHANNEL) :] if len(channels) > 1 else header
        recipient = self._RECIPIENT.search(last)
        name = recipient[1] if recipient is not None else ""
        if name.startswith("functions."):
            self._kind, self._name = Call, name.removeprefix("functions.")
        elif channels and channels[-1] == "analysis":
            self._kind = Reasoning
        else:
            self._kind = Text

    def _body(self, final: bool) -> bool:
        if self._kind is Call:
            return self._arguments(final)
        assert self._kind is not None
        at = 0
        while (end := self._END.search(self._text, at)) is not None:
            if not final and end.end() == len(self._text):  # a message may or may not begin after it
                self._say(self._kind, self._text[: end.start()])
                self._text = self._text[end.start() :]
                return False
            self._say(self._kind, self._text[: end.start()])
            self._text, self._kind = self._text[end.end() :], None
            return bool(self._text)
        held = 0 if final else held_back(self._text, (*ENDS, *(e + START for e in ENDS)))
        self._say(self._kind, self._text[: len(self._text) - held])
        self._text = self._text[len(self._text) - held :]
        return False

    def _arguments(self, final: bool) -> bool:
        at = skip(self._text, 0)
        try:
            if at == len(self._text):
                raise Incomplete
            value, end = json_at(self._text, at, whole=final)
            self._events.append(call(self._name, value))
        except Incomplete:
            if final:
                self._say(Text, self._text)
                self._text = ""
            return False
        except Broken:
            self._kind = Text
            return True
        self._text, self._kind = self._text[end:], None
        self._begun = True
        closing = self._END.match(self._text, skip(self._text, 0))
        if closing is not None:
            self._text = self._text[closing.end() :]
        return bool(self._text)

    def _say(self, kind: type[Event], text: str) -> None:
        if text and kind is Reasoning:
            self._events.append(Reasoning(text))
        elif text:
            self._events.append(Text(text))
