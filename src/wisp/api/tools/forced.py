"""Grammars under which an answer is a call in the family's own format, with arguments that the schema allows.

They are in llguidance's dialect of Lark. A marker that is a control token stands there by its id; any other is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from wisp.api.fields import refuse
from wisp.api.tools.events import Tool
from wisp.engines.grammar_library import strictly

Mark = Callable[[str], str]  # a marker as Lark has it
_PARAM = "tools"


def grammar(family: str, template: str, tools: list[Tool], *, parallel: bool, mark: Mark) -> str | None:
    """The rules for one call of one of `tools` or, with `parallel`, several. The first rule is `calls`. None: this
    family's calls cannot be forced."""
    writer = _WRITERS.get(family)
    if writer is None:
        return None
    parts = writer(tools, template, mark)
    if parts is None:
        return None
    before, call, between, after = parts
    many = (
        f"{before} call ({between} call)* {after}"
        if parallel and between is not None
        else f"{before} call {after}"
    )
    return "\n".join([f"calls: {many}", f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}", *call])


def free_text(opener: str, is_token: bool) -> str:
    """A terminal of text in which no call begins."""
    if is_token:
        return "/(.|\\n)*/"
    return f"/(.|\\n)*/ & ~/(.|\\n)*{_escaped(opener)}(.|\\n)*/"


def text(value: str) -> str:
    """A string as Lark has it."""
    return json.dumps(value, ensure_ascii=False)


def _escaped(value: str) -> str:
    return re.escape(value).replace("\\\n", "\\n").replace("/", "\\/")


_Parts = tuple[
    str, list[str], str | None, str
]  # before all calls, rules for each, between two (None: only one), after


def schema_rule(schema: dict[str, Any], whole: dict[str, Any] | None = None) -> str:
    """`%json` for a schema, written as Python writes JSON. `whole`: where its definitions are."""
    shared: dict[str, Any] = {
        name: whole[name] for name in ("$defs", "definitions") if whole and name in whole
    }
    return "%json " + json.dumps(strictly({**shared, **schema}), ensure_ascii=False)


def _arguments(tool: Tool) -> str:
    return schema_rule({"type": "object", **tool.parameters})


def _hermes(tools: list[Tool], template: str, mark: Mark) -> _Parts:
    start, end = mark("<tool_call>"), mark("</tool_call>")
    rules = []
    for i, tool in enumerate(tools):
        head = text(f'\n{{"name": {text(tool.name)}, "arguments": ')
        rules += [f'call{i}: {start} {head} args{i} "}}\\n" {end}', f"args{i}: {_arguments(tool)}"]
    return "", rules, text("\n"), ""


def _llama3(tools: list[Tool], template: str, mark: Mark) -> _Parts:
    rules = []
    for i, tool in enumerate(tools):
        head = text(f'{{"name": {text(tool.name)}, "parameters": ')
        rules += [f'call{i}: {head} args{i} "}}"', f"args{i}: {_arguments(tool)}"]
    return "", rules, None, ""


def _mistral(tools: list[Tool], template: str, mark: Mark) -> _Parts:
    calls = mark("[TOOL_CALLS]")
    rules = []
    if "[ARGS]" in template:
        for i, tool in enumerate(tools):
            rules += [
                f"call{i}: {calls} {text(tool.name)} {mark('[ARGS]')} args{i}",
                f"args{i}: {_arguments(tool)}",
            ]
        return "", rules, "", ""
    for i, tool in enumerate(tools):
        head = text(f'{{"name": {text(tool.name)}, "arguments": ')
        rules += [f'call{i}: {head} args{i} "}}"', f"args{i}: {_arguments(tool)}"]
    return f'{calls} " ["', rules, text(", "), '"]"'


def _deepseek(tools: list[Tool], template: str, mark: Mark) -> _Parts:
    begin, call, sep, end, close = (
        mark(f"<｜tool▁{n}｜>") for n in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
    )
    fenced = "```json" in template
    rules = []
    for i, tool in enumerate(tools):
        head = (
            f'"function" {sep} {text(tool.name + chr(10) + "```json" + chr(10))}'
            if fenced
            else f"{text(tool.name)} {sep}"
        )
        tail = text("\n```") if fenced else ""
        rules += [f"call{i}: {call} {head} args{i} {tail} {end}", f"args{i}: {_arguments(tool)}"]
    return begin, rules, text("\n") if fenced else "", close


def _kimi_k2(tools: list[Tool], template: str, mark: Mark) -> _Parts:
    begin, end = mark("<|tool_calls_section_begin|>"), mark("<|tool_calls_section_end|>")
    call, args, close = (
        mark("<|tool_call_begin|>"),
        mark("<|tool_call_argument_begin|>"),
        mark("<|tool_call_end|>"),
    )
    rules = []
    for i, tool in enumerate(tools):
        head = f"{call} {text(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {args}"
        rules += [f"call{i}: {head} args{i} {close}", f"args{i}: {_arguments(tool)}"]
    return begin, rules, "", end


def _harmony(tools: list[Tool], template: str, mark: Mark) -> _Parts:
    channel, message, end, start, constrain = (
        mark(f"<|{n}|>") for n in ("channel", "message", "end", "start", "constrain")
    )
    before = (
        ""
        if end.startswith('"')
        else f'({channel} "analysis" {message} /(.|\\n)*/ {end} {start} "assistant")?'
    )
    rules = []
    for i, tool in enumerate(tools):
        head = f'{channel} {text(f"commentary to=functions.{tool.name} ")} {constrain} "json" {message}'
        rules += [f"call{i}: {head} args{i}", f"args{i}: {_arguments(tool)}"]
    return before, rules, None, ""


def _qwen_xml(tools: list[Tool], template: str, mark: Mark) -> _Parts:
    start, end = mark("<tool_call>"), mark("</tool_call>")
    rules = []
    for i, tool in enumerate(tools):
        parts = list(_parameters(f"p{i}", tool, "<parameter={}>\n", "\n</parameter>\n"))
        uses = " ".join(use for use, _ in parts)
        head, tail = text(f"\n<function={tool.name}>\n"), text("</function>\n")
        rules += [f"call{i}: {start} {head} {uses} {tail} {end}", *(r for _, rs in parts for r in rs)]
    return "", rules, text("\n"), ""


def _glm(tools: list[Tool], template: str, mark: Mark) -> _Parts | None:
    start, end = mark("<tool_call>"), mark("</tool_call>")
    if not start.startswith('"'):  # its tags are control tokens, which free text cannot end with
        return None
    rules = []
    for i, tool in enumerate(tools):
        parts = list(_parameters(f"p{i}", tool, "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n"))
        uses = " ".join(use for use, _ in parts)
        rules += [
            f"call{i}: {start} {text(tool.name + chr(10))} {uses} {end}",
            *(r for _, rs in parts for r in rs),
        ]
    return "", rules, text("\n"), ""


def _parameters(prefix: str, tool: Tool, head: str, tail: str) -> Iterator[tuple[str, list[str]]]:
    """For each parameter of the tool how its rule is used, and the rules: a text to its end tag, or JSON."""
    properties = tool.parameters.get("properties")
    required = _list(tool, "required", tool.parameters.get("required") or [])
    for j, name in enumerate(properties if isinstance(properties, dict) else ()):
        schema, rule = tool.schema_of(name), f"{prefix}_{j}"
        rules = [f"{rule}: {text(head.format(name))} {rule}_v"]
        if schema.get("type") == "string" and "enum" in schema:
            values = _list(tool, "enum", schema["enum"]) or refuse(_PARAM, f"{tool.name}: an enum is empty")
            options = " | ".join(text(str(v) + tail) for v in values)
            rules.append(f"{rule}_v: {options}")
        elif schema.get("type") == "string" or not schema:
            rules.append(f"{rule}_v[lazy]: /(.|\\n)*{_escaped(tail)}/")
        else:
            rules += [f"{rule}_v: {rule}_j {text(tail)}", f"{rule}_j: {schema_rule(schema, tool.parameters)}"]
        yield (rule if name in required else f"{rule}?"), rules


def _list(tool: Tool, keyword: str, value: Any) -> list[Any]:
    return value if isinstance(value, list) else refuse(_PARAM, f"{tool.name}: expected a list for {keyword}")


_WRITERS: dict[str, Callable[[list[Tool], str, Mark], _Parts | None]] = {
    "hermes": _hermes,
    "qwen-xml": _qwen_xml,
    "llama3": _llama3,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "harmony": _harmony,
    "kimi-k2": _kimi_k2,
    "glm": _glm,
}
