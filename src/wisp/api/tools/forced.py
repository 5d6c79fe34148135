"""Grammars for forced calls: the family's own format, with arguments that fit the schema.

They are in llguidance's dialect of Lark. A marker that is a control token stands there by its id; any other is text.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Container, Sequence

from wisp.api.tools.events import Tool
from wisp.api.tools.forced_objects import gemma4, llama4
from wisp.api.tools.lark import (
    Mark,
    Parts,
    Schema,
    Tail,
    arguments,
    escaped,
    is_text,
    names,
    parameters,
    tail_at,
    text,
    text_without,
)


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


def free_text(openers: Sequence[str], tokens: Container[str]) -> tuple[str, str]:
    """(a symbol for text in which no call begins, its rules). openers: of calls, first the one that is written.

    Text has no tokens. Where the one that is written is none, a lexer would read it as text as far as it goes, so text
    is in pieces there: what an opener cannot begin in, and what may become one. That takes a single opener; with more,
    a call can only come before any text.
    """
    written = [opener for opener in openers if opener not in tokens]
    if openers[0] in tokens or len(written) > 1:
        return "TEXT", f"TEXT: {text_without(*written)}"
    *rest, last = (escaped(char) for char in openers[0][:-1])
    for char in reversed(rest):
        last = f"{char}({last})?"
    return "text", f"text: (CHUNK | PART)*\nCHUNK: /[^{escaped(openers[0][0])}]+/\nPART: /{last}/"


def _hermes(tools: list[Tool], template: str, mark: Mark) -> Parts:
    start, end = mark("<tool_call>"), mark("</tool_call>")
    rules = []
    for i, tool in enumerate(tools):
        head = text(f'\n{{"name": {text(tool.name)}, "arguments": ')
        rules += [f'call{i}: {start} {head} args{i} "}}\\n" {end}', f"args{i}: {arguments(tool)}"]
    return "", rules, text("\n"), ""


def _llama3(tools: list[Tool], template: str, mark: Mark) -> Parts:
    rules = []
    for i, tool in enumerate(tools):
        head = text(f'{{"name": {text(tool.name)}, "parameters": ')
        rules += [f'call{i}: {head} args{i} "}}"', f"args{i}: {arguments(tool)}"]
    return "", rules, None, ""


def _mistral(tools: list[Tool], template: str, mark: Mark) -> Parts:
    calls = mark("[TOOL_CALLS]")
    rules = []
    if "[ARGS]" in template:
        for i, tool in enumerate(tools):
            rules += [
                f"call{i}: {calls} {text(tool.name)} {mark('[ARGS]')} args{i}",
                f"args{i}: {arguments(tool)}",
            ]
        return "", rules, "", ""
    for i, tool in enumerate(tools):
        head = text(f'{{"name": {text(tool.name)}, "arguments": ')
        rules += [f'call{i}: {head} args{i} "}}"', f"args{i}: {arguments(tool)}"]
    return f'{calls} " ["', rules, text(", "), '"]"'


def _deepseek(tools: list[Tool], template: str, mark: Mark) -> Parts:
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
        rules += [f"call{i}: {call} {head} args{i} {tail} {end}", f"args{i}: {arguments(tool)}"]
    return begin, rules, text("\n") if fenced else "", close


def _kimi_k2(tools: list[Tool], template: str, mark: Mark) -> Parts:
    begin, end = mark("<|tool_calls_section_begin|>"), mark("<|tool_calls_section_end|>")
    call, args, close = (
        mark("<|tool_call_begin|>"),
        mark("<|tool_call_argument_begin|>"),
        mark("<|tool_call_end|>"),
    )
    rules = []
    for i, tool in enumerate(tools):
        head = f"{call} {text(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {args}"
        rules += [f"call{i}: {head} args{i} {close}", f"args{i}: {arguments(tool)}"]
    return begin, rules, "", end


def _harmony(tools: list[Tool], template: str, mark: Mark) -> Parts:
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
        rules += [f"call{i}: {head} args{i}", f"args{i}: {arguments(tool)}"]
    return before, rules, None, ""


def _qwen_xml(tools: list[Tool], template: str, mark: Mark) -> Parts:
    start, end = mark("<tool_call>"), mark("</tool_call>")

    def head(name: str, schema: Schema) -> str:
        return text(f"<parameter={name}>\n")

    rules = []
    for i, tool in enumerate(tools):
        uses, more = parameters(i, tool, head, Tail("\n</parameter>\n"))
        opened, closed = text(f"\n<function={tool.name}>\n"), text("</function>\n")
        rules += [f"call{i}: {start} {opened} {uses} {closed} {end}", *more]
    return "", rules, text("\n"), ""


def _glm(tools: list[Tool], template: str, mark: Mark) -> Parts:
    start, end, key, key_end, value = (
        mark(m) for m in ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>")
    )

    def head(name: str, schema: Schema) -> str:
        return f'{key} {text(name)} {key_end} "\\n" {value}'

    rules = []
    for i, tool in enumerate(tools):
        uses, more = parameters(i, tool, head, tail_at("", "</arg_value>", "\n", mark))
        rules += [f"call{i}: {start} {text(tool.name + chr(10))} {uses} {end}", *more]
    return "", rules, text("\n"), ""


def _dsml(tools: list[Tool], template: str, mark: Mark) -> Parts | None:
    if any('"' in name for tool in tools for name in (tool.name, *names(tool))):
        return None  # there is no way to write it
    sign = mark("｜DSML｜")
    section = next(
        (s for s in ("tool_calls", "function_calls") if f"<｜DSML｜{s}>" in template), "function_calls"
    )

    def tag(inner: str, slash: str = "") -> str:
        return f'"<{slash}" {sign} {text(inner)}'

    def head(name: str, schema: Schema) -> str:
        return tag(f'parameter name="{name}" string="{"true" if is_text(schema) else "false"}">')

    rules = []
    for i, tool in enumerate(tools):
        uses, more = parameters(i, tool, head, tail_at("</", "｜DSML｜", "parameter>\n", mark))
        opened, closed = tag(f'invoke name="{tool.name}">\n'), tag("invoke>\n", "/")
        rules += [f"call{i}: {opened} {uses} {closed}", *more]
    return tag(f"{section}>\n"), rules, "", tag(f"{section}>", "/")


def _kimi_k3(tools: list[Tool], template: str, mark: Mark) -> Parts:
    opened, close, sep = mark("<|open|>"), mark("<|close|>"), mark("<|sep|>")

    def head(name: str, schema: Schema) -> str:
        kind = "string" if is_text(schema) else schema.get("type")
        typed = f' type="{kind}"' if isinstance(kind, str) else ""
        argument = text(f'argument key="{html.escape(name)}"{typed}')
        return f"{opened} {argument} {sep}"

    tail = Tail("<|close|>argument<|sep|>")
    if not close.startswith('"'):
        tail = Tail("", f'{close} "argument" {sep}', "<|close|>")
    rules = []
    for i, tool in enumerate(tools):
        uses, more = parameters(i, tool, head, tail)
        called = text(f'call tool="{html.escape(tool.name)}" index="')
        rules += [f'call{i}: {opened} {called} /[1-9][0-9]?/ "\\"" {sep} {uses} {close} "call" {sep}', *more]
    return f'{opened} "tools" {sep}', rules, "", f'{close} "tools" {sep}'


_WRITERS: dict[str, Callable[[list[Tool], str, Mark], Parts | None]] = {
    "hermes": _hermes,
    "qwen-xml": _qwen_xml,
    "llama3": _llama3,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "harmony": _harmony,
    "kimi-k2": _kimi_k2,
    "glm": _glm,
    "dsml": _dsml,
    "kimi-k3": _kimi_k3,
    "llama4": llama4,
    "gemma4": gemma4,
}
