"""The answers of `/v1/messages`: blocks of content, whole or as a stream of events."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from wisp.api.formats import call_id, told_of
from wisp.api.output import Delta
from wisp.api.responses import Json
from wisp.api.shape import Shape, Subject
from wisp.api.sse import named_event
from wisp.api.tools.events import Call, Event, Reasoning, Text
from wisp.core.errors import RequestError

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip


class AnthropicFormat(Shape):
    """Of one answer."""

    prefix = "msg"
    end = b""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._blocks: list[Json] = []
        self._open = False
        self._told: list[Delta] = []  # with origins and rounds

    @staticmethod
    def error(error: RequestError) -> Json:
        kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}

    @classmethod
    def failed(cls, error: RequestError) -> bytes:
        return named_event("error", cls.error(error))

    def event(self, chunk: Json) -> bytes:
        return named_event(chunk["type"], chunk)

    def whole(self, choices: Sequence[Sequence[Delta]], usage: Json, metrics: Json) -> Json:
        for delta in choices[0]:
            self.chunk(0, delta)
        finish = choices[0][-1].finish
        ended = {"usage": _usage(usage), "metrics": metrics, **told_of(choices)}
        return self._message(self._blocks) | self._reason(finish) | ended

    def opening(self) -> list[Json]:
        return [{"type": "message_start", "message": self._message([])}]

    def chunk(self, index: int, delta: Delta) -> list[Json]:
        if delta.told:
            self._told.append(delta)
        events: Sequence[Event] = [Text(delta.text)] if delta.text else delta.events
        return [told for event in events for told in self._of_event(event)]

    def finished(self, index: int, finish: str) -> list[Json]:
        return []

    def closing(self, index: int, finish: str, usage: Json, metrics: Json) -> list[Json]:
        ended = {
            "type": "message_delta",
            "delta": self._reason(finish),
            "usage": _usage(usage),
            "metrics": metrics,
            **told_of([self._told]),
        }
        return [*self._close(), ended, {"type": "message_stop"}]

    def _of_event(self, event: Event) -> list[Json]:
        if isinstance(event, Call):
            return [*self._close(), *self._called(event)]
        kind = "thinking" if isinstance(event, Reasoning) else "text"
        told = []
        if not self._open or self._blocks[-1]["type"] != kind:
            told = self._close()
            self._open = True
            signed = {"signature": ""} if kind == "thinking" else {}
            self._blocks.append({"type": kind, kind: "", **signed})
            told.append(self._start(dict(self._blocks[-1])))
        self._blocks[-1][kind] += event.text
        return [*told, self._grow({"type": f"{kind}_delta", kind: event.text})]

    def _called(self, call: Call) -> list[Json]:
        block = {"type": "tool_use", "id": f"toolu_{call_id()}", "name": call.name, "input": {}}
        self._blocks.append({**block, "input": msgspec.json.decode(call.arguments)})
        self._open = True
        grown = self._grow({"type": "input_json_delta", "partial_json": call.arguments})
        return [self._start(block), grown, *self._close()]

    def _start(self, block: Json) -> Json:
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _grow(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[Json]:
        if not self._open:
            return []
        self._open = False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _reason(self, finish: str) -> Json:
        stop = self._subject.outputs[0].stop_string
        reason = "stop_sequence" if finish == "stop" and stop else _REASONS[finish]
        return {"stop_reason": reason, "stop_sequence": stop or None}

    def _message(self, blocks: list[Json]) -> Json:
        return {
            "id": f"{self.prefix}_{self._head.id}",
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self._subject.prompt_tokens, "output_tokens": 0},
        }


def _usage(usage: Json) -> Json:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }
