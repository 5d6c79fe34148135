"""One generation's output as it grows: text, log probabilities, counts and times.

Committed tokens go in, deltas come out. Joined deltas are the whole answer, so a streamed and an unstreamed
answer cannot differ; and as tokens are taken one by one, neither can the same tokens in other groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from wisp.api.backend import Committed
from wisp.api.origins import Origins, origin, told
from wisp.api.text import TextStream
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

    finish: "" (goes on), "stop" or "length". told: origins and round, where they were asked for.
    """

    text: str
    entries: list[Entry]
    finish: str
    told: dict[str, Any] = {}


class Output:
    """tokens: how many count, the end-of-sequence token included, none after a stop string's last.
    shown_draft: how many of them came from drafts. first/last: when tokens arrived (0.0: not yet)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        logprobs: bool,
        min_tokens: int = 0,
        *,
        rounds: bool = False,
    ) -> None:
        self._text = TextStream(tokenizer.piece, stop, min_tokens)
        self._logprobs = logprobs
        self._waiting: list[Entry] = []
        self._origins = Origins() if rounds else None
        self.tokens = 0
        self.shown_draft = 0
        self.spec = SpecStats()
        self.finish = ""
        self.first = 0.0
        self.last = 0.0
        self.gaps_s: list[float] = []

    def add(self, item: Committed, now: float) -> Delta:
        """Take what was committed at time `now`. After a delta with a `finish`, take no more."""
        if self._logprobs and len(item.logprobs) != len(item.tokens):
            raise EngineError(f"{len(item.tokens)} tokens came with {len(item.logprobs)} log probabilities")
        self.spec.round(item.drafted, item.accepted)
        used = self._push(item)
        self.tokens += used
        self.shown_draft += min(item.from_draft, used)
        if used:
            self._arrived(now)
        self.finish = "stop" if self._text.stopped else item.finish
        if self.finish and not self._text.stopped:
            self._text.end()
            self.finish = "stop" if self._text.stopped else item.finish
        text = self._text.take()
        tell = {}
        if self._origins is not None:
            tell = told(item, self._origins.take(text, last=bool(self.finish)))
        return Delta(text, self._certain_entries(), self.finish, tell)

    def _push(self, item: Committed) -> int:
        """Push tokens up to the end or a stop string; how many count. The end-of-sequence token has no text."""
        shown = len(item.tokens) - (item.finish == "stop")
        for i in range(shown):
            stopped = self._text.push(item.tokens[i])
            if self._logprobs:
                self._waiting.append(Entry(item.logprobs[i], self._text.offsets[-1]))
            if self._origins is not None:
                self._origins.push(item.tokens[i], origin(item, i), self._text.offsets[-1])
            if stopped:
                return i + 1
        return len(item.tokens)

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
