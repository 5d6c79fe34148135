"""The shapes of answers: chat and completion, whole and in chunks.

A whole answer; and, streamed, chunks of text, a closing chunk, and a chunk of usage.
"""

from __future__ import annotations

import secrets
import string
from abc import abstractmethod
from collections.abc import Sequence

from wisp.api.output import Delta, Entry
from wisp.api.responses import Json
from wisp.api.responses import usage as usage_so_far
from wisp.api.shape import Echo, Shape, Subject
from wisp.api.spelling import control_name, finite, spelled
from wisp.api.tools.events import Call, Event, Reasoning, Text
from wisp.core.protocol.step import TokenLogprob, TopLogprob

_LETTERS = string.ascii_letters + string.digits


class ResponseFormat(Shape):
    """What chat and completion have in common."""

    whole_object = ""
    chunk_object = ""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._tokenizer = subject.tokenizer
        self._logprobs = subject.ask.logprobs is not None
        self._include_usage = subject.ask.include_usage
        self._choices = len(subject.outputs)
        self._before = subject.before
        self._called: dict[int, int] = {}  # calls so far, by choice

    def whole(self, choices: Sequence[Sequence[Delta]], usage: Json, metrics: Json) -> Json:
        found = [
            self._choice(i, self._full(i, deltas), self._all_logprobs(i, deltas), deltas[-1].finish)
            for i, deltas in enumerate(choices)
        ]
        whole = self._object(self.whole_object, found) | {"usage": usage, "metrics": metrics}
        return whole | told_of(choices)

    def opening(self) -> list[Json]:
        return []

    def chunk(self, index: int, delta: Delta) -> list[Json]:
        parts = self._parts(index, delta)
        if not parts and not delta.entries and not delta.told:
            return []
        entries = delta.entries
        chunks = []
        for content in parts or [self._nothing()]:  # log probabilities come with the first
            chunks.append(
                self._chunk([self._choice(index, content, self._log_probabilities(index, entries), None)])
            )
            entries = []
        if delta.told:
            chunks[0]["wisp"] = delta.told
        return chunks

    def finished(self, index: int, finish: str) -> list[Json]:
        """The chunk with a choice's finish reason."""
        return [self._chunk([self._choice(index, self._nothing(), None, finish)])]

    def closing(self, index: int, finish: str, usage: Json, metrics: Json) -> list[Json]:
        """The chunk with the last finish reason, and the one with usage if that was asked for."""
        (last,) = self.finished(index, finish)
        if not self._include_usage:
            return [last | {"metrics": metrics}]
        return [last, self._chunk([]) | {"usage": usage, "metrics": metrics}]

    def _object(self, name: str, choices: list[Json]) -> Json:
        head = self._head
        return {
            "id": f"{self.prefix}-{head.id}",
            "object": name,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
            "choices": choices,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = self._object(self.chunk_object, choices)
        if not self._include_usage:
            return chunk
        s = self._subject
        running = (
            s.ask.running_usage and choices
        )  # vLLM's; the last chunk has no choice, and is given its own
        return chunk | {"usage": usage_so_far(s.prompt_tokens, s.outputs, s.ask.n) if running else None}

    def _choice(self, index: int, content: Json, logprobs: Json | None, finish: str | None) -> Json:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _all_logprobs(self, index: int, deltas: Sequence[Delta]) -> Json | None:
        return self._log_probabilities(index, [e for d in deltas for e in d.entries])

    @abstractmethod
    def _full(self, index: int, deltas: Sequence[Delta]) -> Json:
        """The content of a whole answer."""

    @abstractmethod
    def _parts(self, index: int, delta: Delta) -> list[Json]:
        """The contents of the chunks for a delta."""

    @abstractmethod
    def _nothing(self) -> Json:
        """The content of a chunk that has none."""

    @abstractmethod
    def _log_probabilities(self, index: int, entries: Sequence[Entry]) -> Json | None:
        """`logprobs` of a choice; None if they were not asked for."""


class ChatFormat(ResponseFormat):
    """`chat.completion` and its chunks."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        first = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(i, first, None, None)]) for i in range(self._choices)]

    def _full(self, index: int, deltas: Sequence[Delta]) -> Json:
        events = [e for d in deltas for e in d.events]
        text = "".join(d.text for d in deltas) + "".join(e.text for e in events if isinstance(e, Text))
        reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
        calls = [tool_call(e) for e in events if isinstance(e, Call)]
        message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _parts(self, index: int, delta: Delta) -> list[Json]:
        if delta.text:
            return [{"delta": {"content": delta.text}}]
        return [{"delta": part} for event in delta.events for part in self._of_event(index, event)]

    def _of_event(self, index: int, event: Event) -> list[Json]:
        if isinstance(event, Text):
            return [{"content": event.text}]
        if isinstance(event, Reasoning):
            return [{"reasoning_content": event.text}]
        call = tool_call(event)
        at = self._called.get(index, 0)
        self._called[index] = at + 1
        begun = {"index": at, **call, "function": {"name": event.name, "arguments": ""}}
        rest = {"index": at, "function": {"arguments": event.arguments}}
        return [{"tool_calls": [begun]}, {"tool_calls": [rest]}]

    def _nothing(self) -> Json:
        return {"delta": {}}

    def _log_probabilities(self, index: int, entries: Sequence[Entry]) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [self._entry(e.logprob) for e in entries], "refusal": None}

    def _entry(self, chosen: TokenLogprob) -> Json:
        return self._one(chosen) | {"top_logprobs": [self._one(t) for t in chosen.top]}

    def _one(self, item: TokenLogprob | TopLogprob) -> Json:
        piece = self._tokenizer.piece(item.token)
        return {
            "token": piece.decode("utf-8", "replace") or control_name(item.token),
            "logprob": finite(item.logprob),
            "bytes": list(piece) if piece else None,
        }


class CompletionFormat(ResponseFormat):
    """`text_completion`, whole and in chunks."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self) -> list[Json]:
        found = []
        for i, before in enumerate(self._before):
            if before.text or before.scores is not None:
                choice = self._choice(i, {"text": before.text}, self._with_prompt(i, []), None)
                scores = {} if before.scores is None else {"prompt_logprobs": before.scores}
                found.append(self._chunk([choice | scores]))
        return found

    def _full(self, index: int, deltas: Sequence[Delta]) -> Json:
        before = self._before[index] if self._before else Echo()
        content: Json = {"text": before.text + "".join(d.text for d in deltas)}
        if before.scores is not None:
            content["prompt_logprobs"] = before.scores
        return content

    def _parts(self, index: int, delta: Delta) -> list[Json]:
        return [{"text": delta.text}] if delta.text else []

    def _nothing(self) -> Json:
        return {"text": ""}

    def _all_logprobs(self, index: int, deltas: Sequence[Delta]) -> Json | None:
        entries = [e for d in deltas for e in d.entries]
        return self._with_prompt(index, entries)

    def _with_prompt(self, index: int, entries: Sequence[Entry]) -> Json | None:
        """The log probabilities of the prompt's tokens, if it is shown, and of the answer's."""
        before = self._before[index] if self._before else Echo()
        found = self._log_probabilities(index, [*before.entries, *entries], skipped=len(before.entries))
        if found is None or not before.text:
            return found
        firsts = {"tokens": self._name(before.first), "text_offset": 0}
        return {name: [firsts.get(name), *values] for name, values in found.items()}

    def _log_probabilities(self, index: int, entries: Sequence[Entry], skipped: int = 0) -> Json | None:
        if not self._logprobs:
            return None
        shift = len(self._before[index].text) if self._before else 0
        return {
            "tokens": [self._name(e.logprob.token) for e in entries],
            "token_logprobs": [finite(e.logprob.logprob) for e in entries],
            "top_logprobs": [
                {self._name(t.token): finite(t.logprob) for t in e.logprob.top} for e in entries
            ],
            "text_offset": [e.offset + (shift if i >= skipped else 0) for i, e in enumerate(entries)],
        }

    def _name(self, token: int) -> str:
        return spelled(self._tokenizer, token)


def told_of(choices: Sequence[Sequence[Delta]]) -> Json:
    """The field `wisp` of a whole answer: origins and rounds, in the order of choices, where they were asked for."""
    told = [delta.told for deltas in choices for delta in deltas if delta.told]
    if not told:
        return {}
    rounds = [t["round"] for t in told if t["round"] is not None]
    return {"wisp": {"tokens": [token for t in told for token in t["tokens"]], "rounds": rounds}}


def tool_call(call: Call) -> Json:
    """With an id of nine letters and digits, as Mistral's templates demand; others take any."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id(), "type": "function", "function": function}


def call_id() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
