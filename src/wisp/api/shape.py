"""The interface of an answer's shape: whole, and as a stream of events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from wisp.api.errors import error_body
from wisp.api.output import Delta, Entry, Output
from wisp.api.requests import GenerationRequest
from wisp.api.responses import Head, Json
from wisp.api.sse import DONE, event
from wisp.core.errors import RequestError
from wisp.engines.base import Tokenizer


class Echo(msgspec.Struct, frozen=True):
    """What a completion says of its prompt: text and tokens that come before its own, and `prompt_logprobs`.

    first: the prompt's first token, which follows nothing and has no probability; entries: of the others
    """

    text: str = ""
    entries: list[Entry] = []
    first: int = 0
    scores: list[Json | None] | None = None


class Subject(msgspec.Struct, frozen=True):
    """What is answered. outputs: one for each choice; before: for each choice, what comes before its text."""

    head: Head
    tokenizer: Tokenizer
    ask: GenerationRequest
    outputs: list[Output]
    prompt_tokens: int
    before: Sequence[Echo] = ()


class Shape(ABC):
    """One answer. Its methods are called in the order in which they stand here, `whole` or the others."""

    prefix = ""  # of ids
    end = DONE  # what a stream ends with

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._head = subject.head

    @staticmethod
    def error(error: RequestError) -> Json:
        """The body of an answer that fails."""
        return error_body(error)

    @classmethod
    def failed(cls, error: RequestError) -> bytes:
        """The last event of a stream that fails."""
        return event(cls.error(error))

    def event(self, chunk: Json) -> bytes:
        """A chunk as it is sent."""
        return event(chunk)

    @abstractmethod
    def whole(self, choices: Sequence[Sequence[Delta]], usage: Json, metrics: Json) -> Json:
        """The answer to a request that is not streamed: from the deltas of each choice."""

    @abstractmethod
    def opening(self) -> list[Json]:
        """Chunks that come before any text."""

    @abstractmethod
    def chunk(self, index: int, delta: Delta) -> list[Json]:
        """The chunks that carry a delta of a choice; none if it has nothing to show."""

    @abstractmethod
    def finished(self, index: int, finish: str) -> list[Json]:
        """The end of a choice that is not the last to end."""

    @abstractmethod
    def closing(self, index: int, finish: str, usage: Json, metrics: Json) -> list[Json]:
        """The end of the last one, and of all."""
