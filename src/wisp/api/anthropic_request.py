"""`/v1/messages`, Anthropic's request, as a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wisp.api.backend import Target
from wisp.api.fields import Fields, as_object, refuse
from wisp.api.prepare import prompt_ids
from wisp.api.requests import GenerationRequest, parse_chat
from wisp.api.slo import NO_CLASSES, SloClasses
from wisp.core.errors import RequestError
from wisp.engines.base import Check

Json = dict[str, Any]

_SAME = ("model", "stream", "temperature", "top_p", "top_k", "seed", "min_p", "chat_template_kwargs")
_CAME_FROM = {"stop": "stop_sequences", "continue_final_message": "messages"}


def parse_anthropic(
    body: Json, headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/messages`. Raises RequestError 400 with `param`."""
    if body.get("max_tokens") is None:
        refuse("max_tokens", "expected an integer of at least 1")
    return _parsed(body, headers, classes)


def count_tokens(body: Json, target: Target, check: Check) -> Json:
    """`/v1/messages/count_tokens`. Raises RequestError 400."""
    return {"input_tokens": len(prompt_ids(_parsed(body, {}, NO_CLASSES), target, check))}


def _parsed(body: Json, headers: Mapping[str, str], classes: SloClasses) -> GenerationRequest:
    fields = Fields(body)
    messages = _messages(fields)
    offered = [_tool(as_object(t, f"tools[{i}]")) for i, t in enumerate(fields.list("tools"))]
    tools = [tool for tool in offered if tool is not None]
    choice = Fields(fields.object("tool_choice"), "tool_choice")
    chat: Json = {name: body[name] for name in _SAME if body.get(name) is not None}
    chat |= {
        "messages": messages,
        "tools": tools,
        "tool_choice": _choice(choice) if tools else None,
        "parallel_tool_calls": not choice.flag("disable_parallel_tool_use"),
        "max_tokens": body.get("max_tokens"),
        "stop": body.get("stop_sequences"),
        "continue_final_message": messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
    }
    thinking = fields.object("thinking").get("type")
    if thinking is not None:
        chat["enable_thinking"] = thinking != "disabled"
    try:
        return parse_chat(chat, headers, classes)
    except RequestError as error:
        param = _CAME_FROM.get(error.param or "", error.param)
        raise RequestError(error.status, str(error), code=error.code, param=param) from None


def _choice(choice: Fields) -> Any:
    type_ = choice.string("type")
    if type_ == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    names = {None: None, "auto": "auto", "any": "required", "none": "none"}
    if type_ not in names:
        refuse("tool_choice.type", 'expected "auto", "any", "tool" or "none"')
    return names[type_]


def _tool(tool: Fields) -> Json | None:
    """A function; None for tools that Anthropic's own servers have."""
    if tool.string("type") not in (None, "custom"):
        return None
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _messages(fields: Fields) -> list[Json]:
    messages: list[Json] = []
    if system := _text(fields.get("system"), "system"):
        messages.append({"role": "system", "content": system})
    given = fields.list("messages")
    if not given:
        refuse("messages", "expected a list of at least one message")
    for i, entry in enumerate(given):
        message = as_object(entry, f"messages[{i}]")
        role = message.string("role")
        if role not in ("user", "assistant", "system"):
            refuse(message.path("role"), "expected user or assistant")
        content = message.get("content")
        if isinstance(content, list):
            _add(
                messages,
                role,
                [as_object(b, f"{message.path('content')}[{j}]") for j, b in enumerate(content)],
            )
        else:
            messages.append({"role": role, "content": message.string("content")})
    return messages


def _add(messages: list[Json], role: str, blocks: list[Fields]) -> None:
    """Add one message of blocks: results of tools are messages of their own, before what the user says."""
    texts: list[str] = []
    message: Json = {"role": role, "content": None}
    for block in blocks:
        type_ = block.string("type")
        if type_ == "text":
            texts.append(block.string("text") or "")
        elif type_ == "thinking":
            message["reasoning_content"] = block.string("thinking")
        elif type_ == "redacted_thinking":
            continue
        elif type_ == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            call = {"id": block.string("id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif type_ == "tool_result":
            result = _text(block.get("content"), block.path("content"))
            messages.append({"role": "tool", "tool_call_id": block.string("tool_use_id"), "content": result})
        else:
            refuse(
                block.path("type"), f"blocks of type {type_!r} are not supported; this model reads text alone"
            )
    if texts:
        message["content"] = "\n".join(texts)
    if texts or len(message) > 2 or not blocks:
        messages.append(message)


def _text(content: Any, path: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        refuse(path, "expected a string or a list of blocks")
    blocks = [as_object(b, f"{path}[{i}]") for i, b in enumerate(content)]
    for block in blocks:
        if block.string("type") != "text":
            refuse(block.path("type"), "only text is supported; this model reads text alone")
    return "\n".join(block.string("text") or "" for block in blocks)
