"""`/v1/messages`, Anthropic's request, as a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from wisp.api.backend import Target
from wisp.api.fields import Fields, as_object, refuse
from wisp.api.naming import History, clients_words
from wisp.api.params import REFUSED_CHAT, check_refused, passed_on
from wisp.api.prepare import prompt_ids
from wisp.api.requests import GenerationRequest, parse_chat
from wisp.api.slo import NO_CLASSES, SloClasses
from wisp.engines.base import Check

Json = dict[str, Any]

# Parameters of a chat that have another name here, or that an answer of blocks has no place for
_ELSEWHERE = {
    "stop": "stop_sequences",
    "max_completion_tokens": "max_tokens",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
_REFUSED = REFUSED_CHAT | {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "output_format": (),
}
_OWN = frozenset({"messages", "tools", "tool_choice", "max_tokens", "stream_options", *_ELSEWHERE, *_REFUSED})
# What the parameters of the chat that this becomes are called here
_NAMES = {
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "tool_choice.function": "tool_choice",
}


def parse_anthropic(
    body: Json, headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/messages`. Raises RequestError 400 with `param`."""
    if body.get("max_tokens") is None:
        refuse("max_tokens", "expected an integer of at least 1")
    return _parsed(body, headers, classes)


def count_tokens(body: Json, target: Target, check: Check) -> Json:
    """`/v1/messages/count_tokens`. Raises RequestError 400."""
    ask = _parsed(body, {}, NO_CLASSES)
    with clients_words(ask.names):
        return {"input_tokens": len(prompt_ids(ask, target, check))}


def _parsed(body: Json, headers: Mapping[str, str], classes: SloClasses) -> GenerationRequest:
    fields = Fields(body)
    check_refused(body, _REFUSED)
    if fields.object("output_config").get("format") is not None:
        refuse("output_config.format", "not supported; say it as response_format", "unsupported_parameter")
    chat = passed_on(body, _OWN, _ELSEWHERE)
    history = History(_NAMES)
    _read_messages(history, fields)
    for i, tool in enumerate(fields.list("tools")):
        _offer(history, as_object(tool, f"tools[{i}]"))
    last = history.messages[-1]
    if "continue_final_message" not in chat:
        chat["continue_final_message"] = last["role"] == "assistant" and "tool_calls" not in last
        history.names["continue_final_message"] = "messages"
    choice = Fields(fields.object("tool_choice"), "tool_choice")
    chat |= {
        "messages": history.messages,
        "tools": history.tools,
        "tool_choice": _choice(choice, bool(history.tools)),
        "parallel_tool_calls": not choice.flag("disable_parallel_tool_use"),
        "max_tokens": body.get("max_tokens"),
        "stop": body.get("stop_sequences"),
    }
    thinking = fields.object("thinking").get("type")
    if thinking is not None:
        chat["enable_thinking"] = thinking != "disabled"
    with clients_words(history.names):
        ask = parse_chat(chat, headers, classes)
    return msgspec.structs.replace(ask, names=history.names)


def _choice(choice: Fields, any_tools: bool) -> Any:
    """As a chat has it. Where no tools are left, one that forces a call goes on, to be refused."""
    type_ = choice.string("type")
    if type_ == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    names = {None: None, "auto": "auto", "any": "required", "none": "none"}
    if type_ not in names:
        refuse("tool_choice.type", 'expected "auto", "any", "tool" or "none"')
    return names[type_] if any_tools or type_ == "any" else None


def _offer(history: History, tool: Fields) -> None:
    """Offer a function; tools that Anthropic's own servers have are left out."""
    if tool.string("type") not in (None, "custom"):
        return
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    history.offer({k: v for k, v in function.items() if v is not None}, tool.where, "input_schema")


def _read_messages(history: History, fields: Fields) -> None:
    if system := _text(fields.get("system"), "system"):
        history.add({"role": "system", "content": system}, "system")
    before = len(history.messages)
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
            blocks = [as_object(b, f"{message.path('content')}[{j}]") for j, b in enumerate(content)]
            _add(history, role, blocks, message.where)
        else:
            history.add({"role": role, "content": message.string("content")}, message.where)
    if len(history.messages) == before:
        refuse("messages", "expected more than redacted thinking, which cannot be read here")


def _add(history: History, role: str, blocks: list[Fields], path: str) -> None:
    """Add one message of blocks: results of tools are messages of their own, before what the user says."""
    texts: list[str] = []
    calls: list[tuple[Json, str]] = []
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
            calls.append(({"id": block.string("id"), "type": "function", "function": function}, block.where))
        elif type_ == "tool_result":
            result = {"role": "tool", "tool_call_id": block.string("tool_use_id")}
            text = _text(block.get("content"), block.path("content"))
            history.add({**result, "content": text}, block.where)
        else:
            refuse(
                block.path("type"), f"blocks of type {type_!r} are not supported; this model reads text alone"
            )
    if texts:
        message["content"] = "\n".join(texts)
    if texts or calls or "reasoning_content" in message or not blocks:
        history.add(message, path)
    for call, where in calls:
        history.call(call, where, "input")


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
