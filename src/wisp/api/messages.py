"""Chat messages: checked, and brought into the one shape that chat templates read."""

from __future__ import annotations

from typing import Any

import msgspec

from wisp.api.fields import Fields, as_object, refuse

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]


def parse_messages(body: Fields) -> list[Message]:
    """`messages`, with text parts joined and the arguments of tool calls parsed."""
    messages = body.list("messages")
    if not messages:
        refuse("messages", "expected a list of at least one message")
    return [_message(as_object(m, f"messages[{i}]")) for i, m in enumerate(messages)]


def _message(fields: Fields) -> Message:
    role = fields.string("role")
    if role not in ROLES:
        refuse(fields.path("role"), f"expected one of {', '.join(ROLES)}")
    message: Message = {"role": role, "content": _content(fields)}
    calls = [
        _tool_call(as_object(c, f"{fields.path('tool_calls')}[{i}]"))
        for i, c in enumerate(fields.list("tool_calls"))
    ]
    if calls and role != "assistant":
        refuse(fields.path("tool_calls"), "only an assistant's message can have tool calls")
    if fields.get("function_call") is not None:
        refuse(
            fields.path("function_call"),
            "not supported; say it as one of tool_calls",
            "unsupported_parameter",
        )
    if message["content"] is None and not calls:
        if role not in ("assistant", "tool"):  # these may have nothing to say
            refuse(fields.path("content"), "expected a string or a list of text parts")
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := fields.string(name)) is not None:
            message[name] = value
    return message


def _content(fields: Fields) -> str | None:
    content = fields.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        fields.wrong("content", "a string or a list of text parts")
    path = fields.path("content")
    return "\n".join(_text_part(as_object(p, f"{path}[{i}]")) for i, p in enumerate(content))


def _text_part(part: Fields) -> str:
    type_ = part.string("type")
    field = {"text": "text", "refusal": "refusal"}.get(type_ or "")
    if field is None:
        refuse(part.path("type"), "only text parts are supported; this model reads text alone")
    text = part.string(field)
    if text is None:
        part.wrong(field, "a string")
    return text


def _tool_call(call: Fields) -> Message:
    """Templates iterate over arguments, so OpenAI's JSON text becomes an object, as it does elsewhere. What a model
    has written need not be one: any other text is passed on as it is."""
    function = as_object(call.get("function"), call.path("function"))
    name = function.string("name")
    if not name:
        refuse(function.path("name"), "expected the name of a function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _object(arguments)
    if not isinstance(arguments, (dict, str)):
        refuse(function.path("arguments"), "expected an object, or text")
    parsed: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if (id_ := call.string("id")) is not None:
        parsed["id"] = id_
    return parsed


def _object(text: str) -> Any:
    """The object that `text` is in JSON, otherwise the text."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
