"""The answers of `/v1/responses`: a list of items, whole or as a stream of events.

The whole answer is the last event's content, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wisp.api.formats import call_id, told_of
from wisp.api.output import Delta
from wisp.api.responses import Json
from wisp.api.shape import Shape, Subject
from wisp.api.sse import named_event
from wisp.api.tools.events import Call, Event, Reasoning, Text
from wisp.core.errors import RequestError


class ResponsesFormat(Shape):
    """Of one answer. `_items` are those that are complete, and the one that grows."""

    prefix = "resp"
    end = b""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._echoed = subject.ask.echoed
        self._items: list[Json] = []
        self._open = False
        self._sent = 0
        self._told: list[Delta] = []  # with origins and rounds

    @classmethod
    def failed(cls, error: RequestError) -> bytes:
        told = {"code": error.code, "message": str(error), "param": error.param}
        return named_event("error", {"type": "error", **told, "sequence_number": 0})

    def event(self, chunk: Json) -> bytes:
        return named_event(chunk["type"], chunk)

    def whole(self, choices: Sequence[Sequence[Delta]], usage: Json, metrics: Json) -> Json:
        for delta in choices[0]:
            self.chunk(0, delta)
        response: Json = self.closing(0, choices[0][-1].finish, usage, metrics)[-1]["response"]
        return response

    def opening(self) -> list[Json]:
        response = self._response("in_progress")
        return [self._tell(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def chunk(self, index: int, delta: Delta) -> list[Json]:
        if delta.told:
            self._told.append(delta)
        events: Sequence[Event] = [Text(delta.text)] if delta.text else delta.events
        return [told for event in events for told in self._of_event(event)]

    def finished(self, index: int, finish: str) -> list[Json]:
        return []

    def closing(self, index: int, finish: str, usage: Json, metrics: Json) -> list[Json]:
        complete = finish != "length"
        status = "completed" if complete else "incomplete"
        told = self._close(status)
        response = self._response(status) | {
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {
                    "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]
                },
                "total_tokens": usage["total_tokens"],
            },
            "metrics": metrics,
            **told_of([self._told]),
        }
        return [*told, self._tell(f"response.{response['status']}", response=response)]

    # --- items

    def _of_event(self, event: Event) -> list[Json]:
        if isinstance(event, Call):
            return [*self._close(), *self._called(event)]
        kind = "reasoning" if isinstance(event, Reasoning) else "message"
        told = []
        if not self._open or self._items[-1]["type"] != kind:
            told = [*self._close(), *self._begin(kind)]
        self._part()["text"] += event.text
        return [
            *told,
            self._tell(f"{self._stem()}.delta", **self._place(), delta=event.text, **self._extra()),
        ]

    def _begin(self, kind: str) -> list[Json]:
        """An item of text or reasoning, and its only part."""
        self._open = True
        if kind == "message":
            item: Json = {
                "id": f"msg_{call_id()}",
                "type": kind,
                "status": "in_progress",
                "role": "assistant",
            }
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": f"rs_{call_id()}", "type": kind, "summary": [], "status": "in_progress"}
            part = {"type": "reasoning_text", "text": ""}
        self._items.append({**item, "content": []})
        added = self._tell("response.output_item.added", output_index=self._at(), item=dict(self._items[-1]))
        self._items[-1]["content"] = [part]
        return [added, self._tell("response.content_part.added", **self._place(), part=dict(part))]

    def _close(self, status: str = "completed") -> list[Json]:
        """The item that grows has ended."""
        if not self._open:
            return []
        self._open = False
        part, stem = self._part(), self._stem()
        self._items[-1]["status"] = status
        return [
            self._tell(f"{stem}.done", **self._place(), text=part["text"], **self._extra()),
            self._tell("response.content_part.done", **self._place(), part=dict(part)),
            self._tell("response.output_item.done", output_index=self._at(), item=dict(self._items[-1])),
        ]

    def _called(self, call: Call) -> list[Json]:
        item = {
            "id": f"fc_{call_id()}",
            "type": "function_call",
            "status": "completed",
            "call_id": call_id(),
            "name": call.name,
            "arguments": call.arguments,
        }
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": self._at()}
        begun = {**item, "status": "in_progress", "arguments": ""}
        stem, arguments = "response.function_call_arguments", call.arguments
        return [
            self._tell("response.output_item.added", output_index=self._at(), item=begun),
            self._tell(f"{stem}.delta", **place, delta=arguments),
            self._tell(f"{stem}.done", **place, arguments=arguments, name=call.name),
            self._tell("response.output_item.done", output_index=self._at(), item=item),
        ]

    def _part(self) -> Json:
        part: Json = self._items[-1]["content"][0]
        return part

    def _stem(self) -> str:
        return "response.output_text" if self._items[-1]["type"] == "message" else "response.reasoning_text"

    def _extra(self) -> Json:
        return {"logprobs": []} if self._items[-1]["type"] == "message" else {}

    def _at(self) -> int:
        return len(self._items) - 1

    def _place(self) -> Json:
        return {"item_id": self._items[-1]["id"], "output_index": self._at(), "content_index": 0}

    def _tell(self, type_: str, **fields: Any) -> Json:
        told = {"type": type_, "sequence_number": self._sent, **fields}
        self._sent += 1
        return told

    def _response(self, status: str) -> Json:
        head = self._head
        return {
            "id": f"{self.prefix}_{head.id}",
            "object": "response",
            "created_at": head.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": head.model,
            "output": list(self._items),
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self._echoed,
        }
