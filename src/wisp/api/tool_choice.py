"""`tools`, `tool_choice` and `parallel_tool_calls`: the tools in the prompt, and the calls that may or must be made."""

from __future__ import annotations

from typing import Any

import msgspec

from wisp.api.fields import Fields, as_object, refuse
from wisp.api.params import Chat
from wisp.api.tools.events import Tool

Shown = dict[str, Any]  # a tool as templates read it
_CHOICES = '"none", "auto", "required", or an object that names a function'


class ToolUse(msgspec.Struct, frozen=True):
    """What a request says of tools.

    shown:    the tools, for the template; none of them where nothing may be called
    tools:    those that may be called, by name
    forced:   the answer must be a call
    fewer:    some of the tools that are shown may not be called
    parallel: it may be several
    """

    shown: list[Shown] = []
    tools: dict[str, Tool] = {}
    forced: bool = False
    fewer: bool = False
    parallel: bool = True


def tool_use(params: Chat) -> ToolUse:
    """Raises RequestError 400."""
    shown = params.tools or []
    tools = {}
    for i, entry in enumerate(shown):
        tool = _tool(as_object(entry, f"tools[{i}]"))
        tools[tool.name] = tool
    parallel = params.parallel_tool_calls is not False
    choice = params.tool_choice
    if choice in (None, "auto"):
        return ToolUse(shown, tools, parallel=parallel)
    if choice == "none":
        return ToolUse()
    if not tools:
        refuse("tool_choice", "only allowed where there are tools")
    if choice == "required":
        return ToolUse(shown, tools, forced=True, parallel=parallel)
    if not isinstance(choice, dict):
        refuse("tool_choice", f"expected {_CHOICES}")
    fields = Fields(choice, "tool_choice")
    if fields.string("type") == "allowed_tools":
        return _allowed(fields, shown, tools, parallel)
    name = _function_name(fields)
    if name not in tools:
        refuse("tool_choice", f"there is no function of this name among the tools: {name!r}")
    return ToolUse(shown, {name: tools[name]}, forced=True, parallel=False)


def _tool(fields: Fields) -> Tool:
    if fields.string("type") != "function":
        refuse(fields.path("type"), 'only tools of type "function" are supported')
    function = as_object(fields.get("function"), fields.path("function"))
    name = function.string("name")
    if not name:
        refuse(function.path("name"), "expected the name of a function")
    return Tool(name, function.object("parameters"), function.flag("strict"))


def _function_name(fields: Fields) -> str:
    if fields.string("type") != "function":
        refuse("tool_choice", f"expected {_CHOICES}")
    name = as_object(fields.get("function"), "tool_choice.function").string("name")
    return name or refuse("tool_choice.function.name", "expected the name of a function")


def _allowed(fields: Fields, shown: list[Shown], tools: dict[str, Tool], parallel: bool) -> ToolUse:
    """OpenAI's `{"type": "allowed_tools", ...}`: all tools are shown, and some may be called."""
    inner = fields.object("allowed_tools") or fields.body
    allowed = Fields(inner, "tool_choice.allowed_tools")
    mode = allowed.string("mode") or "auto"
    if mode not in ("auto", "required"):
        refuse(allowed.path("mode"), 'expected "auto" or "required"')
    names = [
        _function_name(as_object(entry, f"{allowed.path('tools')}[{i}]"))
        for i, entry in enumerate(allowed.list("tools"))
    ]
    if not names or not all(name in tools for name in names):
        refuse(allowed.path("tools"), "expected some of the request's tools")
    allowed_tools = {n: tools[n] for n in names}
    fewer = len(allowed_tools) < len(tools)
    return ToolUse(shown, allowed_tools, forced=mode == "required", fewer=fewer, parallel=parallel)
