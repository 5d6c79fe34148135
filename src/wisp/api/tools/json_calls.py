"""Families that write a call's arguments in JSON: Hermes and Qwen, Llama 3, Mistral, DeepSeek V3, Kimi K2."""

from __future__ import annotations

import re
from typing import Any

from wisp.api.tools.events import Broken, Call, Incomplete, call, json_at
from wisp.api.tools.markup import THINK, Markup
from wisp.api.tools.reading import expect, passed, skip, until


def from_object(value: Any) -> Call:
    """The call in `{"name": ..., "arguments": {...}}`; Llama says "parameters". Raises Broken."""
    if not isinstance(value, dict):
        raise Broken
    arguments = value["arguments"] if "arguments" in value else value.get("parameters")
    return call(value.get("name"), arguments)


class Hermes(Markup):
    """`<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`"""

    markers = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    openers = ("<tool_call>",)
    closers = ("}",)

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        at = skip(text, len("<tool_call>"))
        if at == len(text):
            raise Incomplete
        value, end = json_at(text, at)
        return [from_object(value)], passed(text, end, "</tool_call>", ended)


class Llama3(Markup):
    """`{"name": ..., "parameters": {...}}` alone, or after `<|python_tag|>`; several with ";" between them."""

    markers = ("<|python_tag|>",)
    thinks = ()
    openers = ("<|python_tag|>",)
    first_openers = ("{",)
    closers = ("}",)
    trims = False

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        calls: list[Call] = []
        at = len("<|python_tag|>") if text.startswith("<|python_tag|>") else 0
        end = 0
        while True:
            at = skip(text, at)
            if at == len(text):
                raise Incomplete
            value, end = json_at(text, at)
            found = from_object(value)
            if found.name not in self.tools:
                raise Broken
            calls.append(found)
            at = skip(text, end)
            if text[at : at + 1] in (";", ","):
                at += 1
            elif not text.startswith("{", at):
                break
        if at == len(text):
            if not ended:
                raise Incomplete(soon=True)
            return calls, at
        if text[:1] == "{":  # an object that is followed by words is quoted, not called
            raise Broken
        return calls, end


class Mistral(Markup):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, since 2025 `[TOOL_CALLS]name[ARGS]{...}`."""

    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[TOOL_CONTENT]")
    thinks = (("[THINK]", "[/THINK]"), THINK)
    openers = ("[TOOL_CALLS]",)
    closers = ("}", "]")
    trims = False
    _NAME = re.compile(r"[\w.-]+")

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        at = skip(text, len("[TOOL_CALLS]"))
        if at == len(text):
            raise Incomplete(soon=True)
        if text[at] in "[{":
            value, end = json_at(text, at)
            listed = value if isinstance(value, list) else [value]
            return [from_object(v) for v in listed], end
        name = self._NAME.match(text, at)
        if name is None:
            raise Broken
        at = name.end()
        if at == len(text):
            raise Incomplete(soon=True)
        if text.startswith("[CALL_ID]", at):
            id_ = self._NAME.match(text, at + len("[CALL_ID]"))
            if id_ is None or id_.end() == len(text):
                raise Incomplete(soon=True)
            at = id_.end()
        elif "[CALL_ID]".startswith(text[at:]):
            raise Incomplete(soon=True)
        if not text.startswith("{", at):
            at = expect(text, at, "[ARGS]")
        at = skip(text, at)
        if at == len(text):
            raise Incomplete(soon=True)
        value, end = json_at(text, at)
        return [call(name[0], value)], end


class DeepSeek(Markup):
    """V3 and R1: `...<｜tool▁sep｜>name\\n```json\\n{...}\\n```...`; V3.1: `name<｜tool▁sep｜>{...}`."""

    SECTION, CALL, SEP, CALL_END, SECTION_END = (
        f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
    )
    markers = (SECTION, CALL, SEP, CALL_END, SECTION_END, "<think>", "</think>")
    openers = (SECTION, CALL)
    silent = (SECTION_END,)
    closers = ("}", "`", CALL_END)

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        at = 0
        if text.startswith(self.SECTION):
            at = skip(text, len(self.SECTION))
            if at == len(text):
                raise Incomplete(soon=True)
        at = expect(text, at, self.CALL)
        sep = until(text, at, self.SEP)
        name, at = text[at:sep].strip(), sep + len(self.SEP)
        brace = text.find("{", at)
        if brace < 0:
            raise Incomplete
        between = text[at:brace]
        if name == "function" and "\n" in between:
            name, _, between = between.partition("\n")
        if between.strip() not in ("", "```json", "```"):
            raise Broken
        value, end = json_at(text, brace)
        if between.strip():
            end = passed(text, end, "```", ended)
        return [call(name.strip(), value)], passed(text, end, self.CALL_END, ended)


class KimiK2(Markup):
    """`<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`"""

    SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    markers = (SECTION, SECTION_END, CALL, ARGUMENTS, CALL_END, "<think>", "</think>")
    openers = (CALL,)
    silent = (SECTION, SECTION_END)
    closers = ("}", CALL_END)
    calls_while_thinking = True
    trims = False
    _ID = re.compile(r"\s*(?:functions\.)?(.+?)(?::\d+)?\s*", re.DOTALL)

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        at = len(self.CALL)
        arguments = until(text, at, self.ARGUMENTS)
        id_ = self._ID.fullmatch(text[at:arguments])
        at = skip(text, arguments + len(self.ARGUMENTS))
        if id_ is None:
            raise Broken
        if at == len(text):
            raise Incomplete
        value, end = json_at(text, at)
        return [call(id_[1], value)], passed(text, end, self.CALL_END, ended)
