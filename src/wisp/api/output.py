"""One generation's output as it grows: text, log probabilities, counts and times.

Committed tokens go in, deltas come out. Joined deltas are the whole answer, so a streamed and an unstreamed
answer cannot differ; and as tokens are taken one by one, neither can the same tokens in other groups.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec

from wisp.api.backend import Committed
from wisp.api.origins import Origins, origin, told
from wisp.api.reader import Reader
from wisp.api.text import TextStream
from wisp.api.tools.events import Event
from wisp.core.draft.stats import SpecStats
from wisp.core.errors import EngineError
from wisp.core.protocol.step import TokenLogprob
from wisp.engines.base import Tokenizer


class Entry(msgspec.Struct, frozen=True):
    """A shown token with its log probability. `offset`: characters of text before it."""

    logprob: TokenLogprob
    offset: int


class Delta(msgspec.Struct, frozen=True):
    """What became certain: text, the tokens that it begins in (if log probabilities were asked for), the end.

    finish: "" (goes on), "stop", "length" or "tool_calls". events: what a chat's client gets, if the answer is read;
    `text` is empty then. told: origins and round, where they were asked for.
    """

    text: str
    entries: list[Entry]
    finish: str
    events: list[Event] = []
    told: dict[str, Any] = {}


class Output:
    """tokens: how many count, the end-of-sequence token included, none after a stop string's last.
    shown_draft: how many of them came from drafts. reasoning: how many are reasoning, with the marker that ends it.
    cached: of the prompt, those whose KV was there.
    first/last: when tokens arrived (0.0: not yet).
    With `with_end` an end-of-sequence token has its log probability among the entries."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        logprobs: bool,
        min_tokens: int = 0,
        reader: Reader | None = None,
        *,
        with_end: bool = False,
        rounds: bool = False,
    ) -> None:
        piece = tokenizer.piece if reader is None else functools.partial(reader.piece, tokenizer)
        self._text = TextStream(piece, stop, min_tokens)
        self._reader = reader
        self._logprobs = logprobs
        self._with_end = with_end
        self._waiting: list[Entry] = []
        self._origins = Origins() if rounds else None
        self.tokens = 0
        self.shown_draft = 0
        self.reasoning = 0
        self.spec = SpecStats()
        self.cached = 0
        self.finish = ""
        self.first = 0.0
        self.last = 0.0
        self.gaps_s: list[float] = []

    def add(self, item: Committed, now: float) -> Delta:
        """Take what was committed at time `now`. After a delta with a `finish`, take no more."""
        if self._logprobs and len(item.logprobs) != len(item.tokens):
            raise EngineError(f"{len(item.tokens)} tokens came with {len(item.logprobs)} log probabilities")
        self.spec.round(item.drafted, item.accepted)
        self.cached = item.cached
        used = self._push(item)
        self.tokens += used
        self.shown_draft += min(item.from_draft, used)
        if used:
            self._arrived(now)
        self.finish = "stop" if self._text.stopped else item.finish
        if self.finish and not self._text.stopped:
            self._text.end()
            self.finish = "stop" if self._text.stopped else item.finish
        text, events = self._take(), []
        if self._reader is not None:
            text, events = "", self._read(self._reader, text)
        tell = {}
        if self._origins is not None:
            tell = told(item, self._origins.take(last=bool(self.finish)))
        return Delta(text, self._certain_entries(), self.finish, events, tell)

    def _take(self) -> str:
        """The text that has become certain."""
        text = self._text.take()
        if self._origins is not None:
            self._origins.show(text)
        return text

    @property
    def stop_string(self) -> str:
        """The stop string that ended it, "" for none."""
        return self._text.found

    def _read(self, reader: Reader, text: str) -> list[Event]:
        reader.feed(text)
        if reader.done:
            self.finish = "stop"
        if self.finish:
            reader.end(cut=self.finish == "length")
            if reader.called and self.finish == "stop":
                self.finish = "tool_calls"
        return reader.take()

    def _push(self, item: Committed) -> int:
        """Push tokens up to the end or a stop string; how many count. The end-of-sequence token has no text."""
        shown = len(item.tokens) - (item.finish == "stop")
        for i in range(shown):
            stopped = self._text.push(item.tokens[i])
            if self._logprobs:
                self._waiting.append(Entry(item.logprobs[i], self._text.offsets[-1]))
            if self._origins is not None:
                self._origins.push(item.tokens[i], origin(item, i), self._text.offsets[-1])
            if self._reader is not None:
                reasons = self._reader.reasons
                stopped = stopped or self._read_on(self._reader)
                self.reasoning += reasons or self._reader.reasons
            if stopped:
                return i + 1
        if self._logprobs and self._with_end and shown < len(item.tokens):
            self._waiting.append(Entry(item.logprobs[-1], self._text.length))
        return len(item.tokens)

    def _read_on(self, reader: Reader) -> bool:
        """Is the answer complete with this token? Taken one by one, what counts does not depend on their groups."""
        reader.feed(self._take())
        return reader.done

    def _certain_entries(self) -> list[Entry]:
        """Entries whose text has begun to show. Those of a stop string never do."""
        everything = self.finish and not self._text.stopped
        ready = len(self._waiting)
        if not everything:
            ready = next((i for i, e in enumerate(self._waiting) if e.offset >= self._text.released), ready)
        entries, self._waiting = self._waiting[:ready], self._waiting[ready:]
        return entries

    def _arrived(self, now: float) -> None:
        if self.first:
            self.gaps_s.append(now - self.last)
        else:
            self.first = now
        self.last = now


def together(outputs: Sequence[Output]) -> SpecStats:
    """The statistics of several answers as of one."""
    if len(outputs) == 1:
        return outputs[0].spec
    stats = SpecStats()
    for output in outputs:
        stats.add(output.spec)
    return stats
