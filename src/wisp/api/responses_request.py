"""`/v1/responses` as a chat: the stateless part of OpenAI's newer request.

Stored conversations are refused by name. Tools other than functions are ignored, as clients offer them to any server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from wisp.api.fields import Fields, as_object, refuse
from wisp.api.naming import History, clients_words
from wisp.api.params import REFUSED_CHAT, check_refused, passed_on
from wisp.api.requests import GenerationRequest, parse_chat
from wisp.api.slo import NO_CLASSES, SloClasses

Json = dict[str, Any]

_STORED = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "truncation": ("disabled",),
}
# Parameters of a chat that have another name here, or that an answer of items has no place for
_ELSEWHERE = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_REFUSED = REFUSED_CHAT | {"n": (1,), "logprobs": (False,), "top_logprobs": (0,), "prompt_logprobs": ()}
_OWN = frozenset({"tools", "tool_choice", "stream_options", *_ELSEWHERE, *_REFUSED})
# What the parameters of the chat that this becomes are called here
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
}
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def parse_response(
    body: Json, headers: Mapping[str, str], classes: SloClasses = NO_CLASSES
) -> GenerationRequest:
    """The body of `/v1/responses`. Raises RequestError 400 with `param`, as the client calls it."""
    fields = Fields(body)
    for name, harmless in _STORED.items():
        if body.get(name) is not None and body[name] not in harmless:
            refuse(name, "not supported: nothing is stored here", "unsupported_parameter")
    if "message.output_text.logprobs" in fields.list("include"):
        refuse("include", "log probabilities are not supported here", "unsupported_parameter")
    check_refused(body, _REFUSED)
    chat = passed_on(body, _OWN, _ELSEWHERE)
    history = History(_NAMES)
    _read_input(history, fields)
    for i, tool in enumerate(fields.list("tools")):
        _offer(history, as_object(tool, f"tools[{i}]"))
    chat |= {
        "messages": history.messages,
        "tools": history.tools,
        "tool_choice": _choice(fields, bool(history.tools)),
        "max_completion_tokens": body.get("max_output_tokens"),
        "response_format": _format(fields.object("text").get("format")),
        "reasoning_effort": fields.object("reasoning").get("effort"),
    }
    with clients_words(history.names):
        ask = parse_chat(chat, headers, classes)
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
    return msgspec.structs.replace(ask, echoed=echoed, names=history.names)


def _offer(history: History, tool: Fields) -> None:
    if tool.string("type") == "function":
        names = ("name", "description", "parameters", "strict")
        function = {n: tool.get(n) for n in names if tool.get(n) is not None}
        history.offer(function, tool.where, "parameters")


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


def _read_input(history: History, fields: Fields) -> None:
    if instructions := fields.string("instructions"):
        history.add({"role": "system", "content": instructions}, "instructions")
    given = fields.get("input")
    if isinstance(given, str):
        history.add({"role": "user", "content": given}, "input")
        return
    if not isinstance(given, list) or not given:
        refuse("input", "expected a string, or a list of at least one item")
    for i, entry in enumerate(given):
        _add(history, as_object(entry, f"input[{i}]"))


def _add(history: History, item: Fields) -> None:
    """Add an item to the history. Calls and reasoning belong to the message of the assistant that they are next to."""
    type_ = item.string("type") or "message"
    messages = history.messages
    if type_ == "message":
        role = item.string("role") or refuse(item.path("role"), "expected a role")
        content = _text(item.get("content"), item.path("content"))
        if role == "assistant" and messages and messages[-1].get("content", "") is None:
            messages[-1]["content"] = content
        else:
            history.add({"role": role, "content": content}, item.where)
    elif type_ == "function_call":
        call = {
            "id": item.string("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        if not messages or messages[-1]["role"] != "assistant":
            history.add({"role": "assistant", "content": None}, item.where)
        history.call(call, item.where, "arguments")
    elif type_ == "function_call_output":
        output = _text(item.get("output"), item.path("output"))
        history.add({"role": "tool", "tool_call_id": item.string("call_id"), "content": output}, item.where)
    elif type_ == "reasoning":
        parts = item.list("content") or item.list("summary")
        if text := _text(parts, item.path("content")):
            history.add({"role": "assistant", "content": None, "reasoning_content": text}, item.where)
    elif type_ == "item_reference":
        refuse(item.path("type"), "not supported: nothing is stored here", "unsupported_parameter")
    else:
        refuse(item.path("type"), f"items of type {type_!r} are not supported", "unsupported_parameter")


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
