"""`/v1/responses` as a chat: the stateless part of OpenAI's newer request.

Stored conversations are refused by name. Tools other than functions are ignored, as clients offer them to any server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from wisp.api.fields import Fields, as_object, refuse
from wisp.api.requests import GenerationRequest, parse_chat
from wisp.api.slo import NO_CLASSES, SloClasses
from wisp.core.errors import RequestError

Json = dict[str, Any]

_STORED = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "truncation": ("disabled",),
}
_SAME = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "top_k", "min_p", "seed", "stop", "ignore_eos",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "min_tokens", "chat_template_kwargs",
    "enable_thinking",
)  # fmt: skip
# Parameters of the chat that this becomes, and where they came from
_CAME_FROM = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def parse_response(
    body: Json, headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/responses`. Raises RequestError 400 with `param`."""
    fields = Fields(body)
    for name, harmless in _STORED.items():
        if body.get(name) is not None and body[name] not in harmless:
            refuse(name, "not supported: nothing is stored here", "unsupported_parameter")
    tools = [_tool(as_object(t, f"tools[{i}]")) for i, t in enumerate(fields.list("tools"))]
    chat: Json = {name: body[name] for name in _SAME if body.get(name) is not None}
    chat |= {
        "messages": _messages(fields),
        "tools": [t for t in tools if t is not None],
        "tool_choice": _choice(fields, bool([t for t in tools if t is not None])),
        "max_completion_tokens": body.get("max_output_tokens"),
        "response_format": _format(fields.object("text").get("format")),
        "reasoning_effort": fields.object("reasoning").get("effort"),
    }
    try:
        ask = parse_chat(chat, headers, classes)
    except RequestError as error:
        name = re.split(r"[.\[]", error.param or "", maxsplit=1)[0]
        rest = (error.param or "").removeprefix(name).removeprefix(".json_schema")
        raise RequestError(
            error.status, str(error), code=error.code, param=_CAME_FROM.get(name, name) + rest
        ) from None
    echoed = {
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": ask.use.parallel,
        "temperature": ask.sampling.temperature,
        "top_p": ask.sampling.top_p,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": fields.list("tools"),
        "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
    }
    return msgspec.structs.replace(ask, echoed=echoed)


def _tool(tool: Fields) -> Json | None:
    if tool.string("type") != "function":
        return None
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: tool.get(n) for n in names if tool.get(n) is not None}}


def _choice(fields: Fields, any_tools: bool) -> Any:
    choice = fields.get("tool_choice")
    if not any_tools and choice in (None, "auto", "none"):
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        listed = Fields(choice, "tool_choice").list("tools")
        named = [as_object(t, f"tool_choice.tools[{i}]") for i, t in enumerate(listed)]
        tools = [{"type": "function", "function": {"name": t.get("name")}} for t in named]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def _format(given: Any) -> Json | None:
    """`text.format` is a `response_format` whose schema lies one level higher."""
    if given is None:
        return None
    fields = as_object(given, "text.format")
    if fields.string("type") != "json_schema":
        return fields.body if isinstance(fields.body, dict) else None
    if fields.get("schema") is None:
        refuse("text.format.schema", "expected a JSON schema")
    return {"type": "json_schema", "json_schema": {k: v for k, v in fields.body.items() if k != "type"}}


def _messages(fields: Fields) -> list[Json]:
    messages: list[Json] = []
    if instructions := fields.string("instructions"):
        messages.append({"role": "system", "content": instructions})
    given = fields.get("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        refuse("input", "expected a string, or a list of at least one item")
    for i, entry in enumerate(given):
        _add(messages, as_object(entry, f"input[{i}]"))
    return messages


def _add(messages: list[Json], item: Fields) -> None:
    """Add an item to the history. Calls and reasoning belong to the message of the assistant that they are next to."""
    type_ = item.string("type") or "message"
    if type_ == "message":
        role = item.string("role") or refuse(item.path("role"), "expected a role")
        content = _text(item.get("content"), item.path("content"))
        if role == "assistant" and messages and messages[-1].get("content", "") is None:
            messages[-1]["content"] = content
        else:
            messages.append({"role": role, "content": content})
    elif type_ == "function_call":
        call = {
            "id": item.string("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif type_ == "function_call_output":
        output = _text(item.get("output"), item.path("output"))
        messages.append({"role": "tool", "tool_call_id": item.string("call_id"), "content": output})
    elif type_ == "reasoning":
        parts = item.list("content") or item.list("summary")
        if text := _text(parts, item.path("content")):
            messages.append({"role": "assistant", "content": None, "reasoning_content": text})
    elif type_ == "item_reference":
        refuse(item.path("type"), "not supported: nothing is stored here", "unsupported_parameter")
    else:
        refuse(item.path("type"), f"items of type {type_!r} are not supported", "unsupported_parameter")


def _assistant(messages: list[Json]) -> Json:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: Any, path: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        refuse(path, "expected a string or a list of parts")
    texts = []
    for i, entry in enumerate(content):
        part = as_object(entry, f"{path}[{i}]")
        if part.string("type") not in _TEXT_PARTS and part.string("type") != "refusal":
            refuse(part.path("type"), "only text is supported; this model reads text alone")
        texts.append(part.string("refusal" if part.get("type") == "refusal" else "text") or "")
    return "\n".join(texts)
