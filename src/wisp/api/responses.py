"""OpenAI's response objects, as plain dicts.

Two shapes, chat and completion, with the same four methods: a whole answer; and, streamed, a chunk of text, a
closing chunk, and a chunk of usage. Extensions: `metrics.speculative_decoding`, in the shape that vLLM has
it, and `metrics.seed`, with which the same request gives the same text again; `wisp`, where it was asked for
(`api.extras`).
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from wisp.api.backend import Target
from wisp.api.output import Delta, Entry, Output
from wisp.core.protocol.step import TokenLogprob, TopLogprob
from wisp.engines.base import Tokenizer

Json = dict[str, Any]

_STARTED = int(time.time())
_LOWEST_LOGPROB = -9999.0  # OpenAI's value for "impossible"; JSON has no infinity


class Head(msgspec.Struct, frozen=True):
    """What all objects of one response share."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def new_head(chat: bool, target: Target) -> Head:
    return Head(
        id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=target.model,
        system_fingerprint=f"wisp-{target.digest[:12]}",
    )


class ResponseFormat(ABC):
    """What chat and completion have in common."""

    whole_object = ""
    chunk_object = ""

    def __init__(self, head: Head, tokenizer: Tokenizer, logprobs: bool, include_usage: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage

    def whole(self, deltas: Sequence[Delta], usage: Json, metrics: Json) -> Json:
        """The answer to a request that is not streamed."""
        text = "".join(d.text for d in deltas)
        entries = [e for d in deltas for e in d.entries]
        choice = self._choice(self._full(text), self._log_probabilities(entries), deltas[-1].finish)
        whole = self._object(self.whole_object, [choice]) | {"usage": usage, "metrics": metrics}
        told = [d.told for d in deltas if d.told]
        if not told:
            return whole
        rounds = [t["round"] for t in told if t["round"] is not None]
        return whole | {"wisp": {"tokens": [token for t in told for token in t["tokens"]], "rounds": rounds}}

    def opening(self) -> list[Json]:
        """Chunks that come before any text."""
        return []

    def chunk(self, delta: Delta) -> list[Json]:
        """The chunk that carries a delta's text; none if it has nothing to show."""
        if not delta.text and not delta.entries and not delta.told:
            return []
        choice = self._choice(self._part(delta.text), self._log_probabilities(delta.entries), None)
        return [self._chunk([choice]) | ({"wisp": delta.told} if delta.told else {})]

    def closing(self, finish: str, usage: Json, metrics: Json) -> list[Json]:
        """The chunk with the finish reason, and the one with usage if that was asked for."""
        last = self._chunk([self._choice(self._part(""), None, finish)])
        if not self._include_usage:
            return [last | {"metrics": metrics}]
        return [last, self._chunk([]) | {"usage": usage, "metrics": metrics}]

    def _object(self, name: str, choices: list[Json]) -> Json:
        head = self._head
        return {
            "id": head.id,
            "object": name,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
            "choices": choices,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = self._object(self.chunk_object, choices)
        return chunk | {"usage": None} if self._include_usage else chunk

    def _choice(self, content: Json, logprobs: Json | None, finish: str | None) -> Json:
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}

    @abstractmethod
    def _full(self, text: str) -> Json:
        """The content of a whole answer."""

    @abstractmethod
    def _part(self, text: str) -> Json:
        """The content of a chunk."""

    @abstractmethod
    def _log_probabilities(self, entries: Sequence[Entry]) -> Json | None:
        """`logprobs` of a choice; None if they were not asked for."""


class ChatFormat(ResponseFormat):
    """`chat.completion` and its chunks."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        return [self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None, None)])]

    def _full(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _log_probabilities(self, entries: Sequence[Entry]) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [self._entry(e.logprob) for e in entries], "refusal": None}

    def _entry(self, chosen: TokenLogprob) -> Json:
        return self._one(chosen) | {"top_logprobs": [self._one(t) for t in chosen.top]}

    def _one(self, item: TokenLogprob | TopLogprob) -> Json:
        piece = self._tokenizer.piece(item.token)
        return {
            "token": piece.decode("utf-8", "replace") or control_name(item.token),
            "logprob": _finite(item.logprob),
            "bytes": list(piece) if piece else None,
        }


class CompletionFormat(ResponseFormat):
    """`text_completion`, whole and in chunks."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def _full(self, text: str) -> Json:
        return {"text": text}

    _part = _full

    def _log_probabilities(self, entries: Sequence[Entry]) -> Json | None:
        if not self._logprobs:
            return None
        return {
            "tokens": [self._name(e.logprob.token) for e in entries],
            "token_logprobs": [_finite(e.logprob.logprob) for e in entries],
            "top_logprobs": [
                {self._name(t.token): _finite(t.logprob) for t in e.logprob.top} for e in entries
            ],
            "text_offset": [e.offset for e in entries],
        }

    def _name(self, token: int) -> str:
        """A token as text. Parts of characters are spelt out, as OpenAI does: they are keys, and must differ."""
        piece = self._tokenizer.piece(token)
        try:
            return piece.decode("utf-8") or control_name(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def control_name(token: int) -> str:
    """The name, in vLLM's spelling, of a token that has no text."""
    return f"token_id:{token}"


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def usage(prompt_tokens: int, output: Output) -> Json:
    """`usage`. Draft tokens that were rejected cost the client nothing and are not among completion_tokens."""
    spec = output.spec
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output.tokens,
        "total_tokens": prompt_tokens + output.tokens,
        "completion_tokens_details": {
            "accepted_prediction_tokens": output.shown_draft,
            "rejected_prediction_tokens": spec.num_draft_tokens - spec.num_accepted_draft_tokens,
        },
    }


def metrics(seed: int, output: Output) -> Json:
    """`metrics`: how speculation went, and the seed."""
    return {"seed": seed, "speculative_decoding": output.spec.report()}


def model_object(target: Target) -> Json:
    """One model; `max_model_len` is vLLM's extension."""
    return {
        "id": target.model,
        "object": "model",
        "created": _STARTED,
        "owned_by": "wisp",
        "max_model_len": target.context,
    }


def model_list(target: Target) -> Json:
    return {"object": "list", "data": [model_object(target)]}
