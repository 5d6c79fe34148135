"""Answers with calls between markers: the part that most families share.

The answer is `[reasoning] (content | call)*`. Text is reported as soon as no marker can begin in it, a call when it is
complete. So a client never gets half a call, and what is reported is a function of the text alone, however it comes in
pieces. What begins like a call and is none is content.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from wisp.api.tools.events import Broken, Call, Event, Incomplete, Reasoning, Text, Tools
from wisp.api.tools.reading import Waiting, held_back

Pair = tuple[str, str]
THINK: Pair = ("<think>", "</think>")


class Parser(ABC):
    """Reads one answer. `thinking`: the prompt ends inside of reasoning."""

    markers: ClassVar[tuple[str, ...]] = ()  # that may be control tokens, which are not text otherwise

    def __init__(self, tools: Tools, thinking: bool = False) -> None:
        self.tools = tools
        self.thinking = thinking

    @property
    @abstractmethod
    def reasons(self) -> bool:
        """Is what comes next reasoning?"""

    @abstractmethod
    def feed(self, text: str) -> list[Event]:
        """What has become certain with `text`, the next piece of the answer."""

    @abstractmethod
    def end(self, *, cut: bool = False) -> list[Event]:
        """What is left when the answer has ended. cut: not by the model."""


class Markup(Parser):
    """Content, reasoning at the beginning, and calls that begin with one of `openers`.

    thinks:  pairs around reasoning
    openers: texts that a call begins with; with `first_openers` only at the beginning of the content
    silent:  markers around calls that mean nothing
    closers: a waiting call is looked at again once one of these has come
    trims:   white space around calls is the format's
    long:    characters of a call that are read in no time
    """

    thinks: ClassVar[tuple[Pair, ...]] = (THINK,)
    openers: ClassVar[tuple[str, ...]] = ()
    first_openers: ClassVar[tuple[str, ...]] = ()
    silent: ClassVar[tuple[str, ...]] = ()
    closers: ClassVar[tuple[str, ...]] = ()
    trims: ClassVar[bool] = True
    long: ClassVar[int] = 1 << 13
    calls_while_thinking: ClassVar[bool] = False

    def __init__(self, tools: Tools, thinking: bool = False) -> None:
        super().__init__(tools, thinking)
        self._text = ""  # not yet reported
        self._waiting: Waiting | None = None  # of the call that it ends in
        self._pair = self.thinks[0] if thinking and self.thinks else None
        self._begun = thinking  # past the place where reasoning may begin
        self._lead = thinking  # white space that comes now is dropped
        self._content = False  # there was some
        self._called = False  # a call was the last thing
        self._events: list[Event] = []

    @abstractmethod
    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        """The calls that `text`, from an opener on, begins with, and where they end. Raises Incomplete or Broken.

        ended: the model has ended its answer here.
        """

    @property
    def reasons(self) -> bool:
        return self._pair is not None

    def feed(self, text: str) -> list[Event]:
        if self._waiting is not None and not self._waiting.worth_reading(text):
            return []
        self._come(text)
        return self._run(final=False, cut=False)

    def end(self, *, cut: bool = False) -> list[Event]:
        self._come("")
        return self._run(final=True, cut=cut)

    def _come(self, text: str) -> None:
        if self._waiting is not None:
            text, self._waiting = "".join(self._waiting.pieces), None
        self._text += text

    def _run(self, *, final: bool, cut: bool) -> list[Event]:
        self._events = []
        if not self._begun:
            self._begin(final)
        if self._begun:
            while self._step(final, cut):
                pass
        return self._events

    def _begin(self, final: bool) -> None:
        """Does the answer begin with reasoning?"""
        head = self._text.lstrip()
        if not final and any(
            len(head) < len(opener) and opener.startswith(head) for opener, _ in self.thinks
        ):
            return
        self._begun = True
        for pair in self.thinks:
            if head.startswith(pair[0]):
                self._text, self._pair, self._lead = head[len(pair[0]) :], pair, True
                return

    def _step(self, final: bool, cut: bool) -> bool:
        """Report what comes next. Is there more?"""
        return self._think(final, cut) if self._pair is not None else self._tell(final, cut)

    # --- reasoning

    def _think(self, final: bool, cut: bool) -> bool:
        assert self._pair is not None
        close = self._pair[1]
        at = self._text.find(close)
        call_at = self._find(self._text, self.openers)[0] if self._may_call(thinking=True) else -1
        if call_at >= 0 and not 0 <= at < call_at:
            return self._try(call_at, final, cut)
        if at >= 0:
            self._reason(self._text[:at].rstrip())
            self._text = self._text[at + len(close) :]
            self._pair, self._lead = None, True
            return True
        markers = (close, *(self.openers if self.calls_while_thinking else ()))
        held = 0 if final else held_back(self._text, markers)
        sure = self._text[: len(self._text) - held].rstrip()
        self._reason(sure)
        self._text = "" if final else self._text[len(sure) :]
        return False

    def _reason(self, text: str) -> None:
        if self._lead:
            text = text.lstrip()
        if text:
            self._lead = False
            self._events.append(Reasoning(text))

    # --- content

    def _may_call(self, *, thinking: bool = False) -> bool:
        return bool(self.tools) and (self.calls_while_thinking or not thinking)

    def _tell(self, final: bool, cut: bool) -> bool:
        openers = self.openers if self._may_call() else ()
        at, marker = self._find(self._text, (*openers, *self.silent))
        if self._may_call() and not self._content:
            head = self._text.lstrip()
            if head.startswith(self.first_openers or ("\0",)):
                return self._try(len(self._text) - len(head), final, cut)
        if at < 0:
            held = 0 if final else held_back(self._text, (*openers, *self.silent))
            self._report(len(self._text) - held, final)
            return False
        if marker in self.silent:
            self._report(at, False)
            kept = self._text[: self._text.find(marker)]
            self._text = ("" if self.trims else kept) + self._text[len(kept) + len(marker) :]
            return True
        return self._try(at, final, cut)

    def _try(self, at: int, final: bool, cut: bool) -> bool:
        """Is there a call at `at`?"""
        if self._pair is None:
            at -= self._report(at, False)
        text = self._text[at:]
        try:
            calls, end = self.call(text, ended=final and not cut)
        except Incomplete as incomplete:
            if not final:
                if not incomplete.soon:
                    self._waiting = Waiting(self.closers, text, self.long)
                return False
            return self._give_up(at)
        except Broken:
            return self._pass_over(at, final)
        if self._pair is not None:
            self._reason(self._text[:at].rstrip())
            self._pair = None
        self._text = text[end:]
        self._events += calls
        self._called, self._lead, self._content = True, False, True
        return True

    def _give_up(self, at: int) -> bool:
        """The answer has ended in a call: its text is content, but a marker alone is not."""
        _, marker = self._find(self._text[at:], (*self.openers, *self.first_openers))
        if self._text[at + len(marker) :].strip() or marker in self.first_openers:
            self._emit(self._text)
        elif self._pair is not None:
            self._reason(self._text[:at].rstrip())
        self._text = ""
        return False

    def _pass_over(self, at: int, final: bool) -> bool:
        """What begins like a call at `at` is none."""
        _, marker = self._find(self._text[at:], (*self.openers, *self.first_openers))
        past = at + max(1, len(marker))
        if self._pair is not None:
            self._reason(self._text[:past])
        else:
            self._emit(self._text[:past])
        self._text = self._text[past:]
        return True

    def _report(self, upto: int, final: bool) -> int:
        """Report content up to there; white space before that only if no call can come after it. How much was it?"""
        sure = upto
        if self.trims and not (final and not self._called):
            sure = len(self._text[:upto].rstrip())
        self._emit(self._text[:sure])
        self._text = "" if final and upto == len(self._text) else self._text[sure:]
        return sure

    def _emit(self, text: str) -> None:
        if self._lead:
            text = text.lstrip()
        if text:
            self._lead, self._called = False, False
            self._content = self._content or bool(text.strip())
            self._events.append(Text(text))

    def _find(self, text: str, markers: tuple[str, ...]) -> tuple[int, str]:
        """Where the first of `markers` is, and which; of several there the longest. (-1, "") for none."""
        found = [(text.find(m), -len(m), m) for m in markers]
        at, _, marker = min((f for f in found if f[0] >= 0), default=(-1, 0, ""))
        return at, marker
