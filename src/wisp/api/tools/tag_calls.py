"""Families that write arguments between tags: Qwen3-Coder, GLM, DeepSeek V3.2 and later, Kimi K3.

Values are not escaped, so an end tag ends a value only where the format goes on after it.
"""

from __future__ import annotations

import html
import re
from typing import Any

from wisp.api.tools.events import Broken, Call, Incomplete, Tool, call, json_at
from wisp.api.tools.markup import Markup
from wisp.api.tools.reading import passed, skip
from wisp.api.tools.values import typed

NO_TOOL = Tool("")


class QwenXml(Markup):
    """`<tool_call>\\n<function=name>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>`"""

    markers = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    openers = ("<tool_call>", "<function=")
    closers = ("</function>", "</tool_call>")
    calls_while_thinking = True
    _HEAD = re.compile(r"(?:<tool_call>\s*)?<function=([^>\n]+)>\s*")
    _KEY = re.compile(r"<parameter=([^>\n]+)>(\n?)")
    # A value that began on a line of its own ends on one, too
    _END = (
        re.compile(r"</parameter>(?=\s*(?:<parameter=[^>\n]+>|</function>))|(?=</function>\s*</tool_call>)"),
        re.compile(
            r"\n</parameter>(?=\s*(?:<parameter=[^>\n]+>|</function>))"
            r"|(?=\n<parameter=[^>\n]+>\n)|(?=\n</function>\s*</tool_call>)"
        ),
    )

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        head = self._HEAD.match(text)
        if head is None:
            at = skip(text, len("<tool_call>")) if text.startswith("<tool_call>") else 0
            if "<function=".startswith(text[at : at + len("<function=")]) and "\n" not in text[at + 1 :]:
                raise Incomplete(soon=True)
            raise Broken
        name = head[1].strip()
        tool, at = self.tools.get(name, NO_TOOL), head.end()
        arguments: dict[str, Any] = {}
        while not text.startswith("</function>", at):
            key = self._KEY.match(text, at)
            if key is None:
                if len(text) - at < len("</function>") or text.startswith("<parameter=", at):
                    raise Incomplete(soon=True)
                raise Broken
            ending = self._END[bool(key[2])].search(text, key.end() - len(key[2]))
            if ending is None:
                raise Incomplete
            value = text[key.end() : max(ending.start(), key.end())]
            arguments[key[1].strip()] = typed(value, tool.schema_of(key[1].strip()))
            at = skip(text, ending.end())
        return [call(name, arguments)], passed(text, at + len("</function>"), "</tool_call>", ended)


class Glm(Markup):
    """`<tool_call>name\\n<arg_key>key</arg_key>\\n<arg_value>value</arg_value>\\n</tool_call>`"""

    markers = (
        "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>", "</think>"
    )  # fmt: skip
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)
    _HEAD = re.compile(r"<tool_call>\s*([^\s<]+)\s*")
    _KEY = re.compile(r"<arg_key>([^<]*)</arg_key>\s*<arg_value>")
    _END = re.compile(r"</arg_value>\s*(?=<arg_key>[^<]*</arg_key>\s*<arg_value>|</tool_call>)")

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        head = self._HEAD.match(text)
        if "</tool_call>" not in text:
            raise Incomplete
        if head is None:
            raise Broken
        tool, at = self.tools.get(head[1], NO_TOOL), head.end()
        arguments: dict[str, Any] = {}
        while not text.startswith("</tool_call>", at):
            key = self._KEY.match(text, at)
            if key is None:
                raise Broken
            end = self._END.search(text, key.end())
            if end is None:
                raise Incomplete
            arguments[key[1].strip()] = typed(text[key.end() : end.start()], tool.schema_of(key[1].strip()))
            at = end.end()
        return [call(head[1], arguments)], at + len("</tool_call>")


class Dsml(Markup):
    """DeepSeek V3.2 and later: `<｜DSML｜invoke name="..."><｜DSML｜parameter name="..." string="true">...`"""

    markers = ("｜DSML｜", "<think>", "</think>")
    _SECTIONS = ("function_calls>", "tool_calls>", " calls>")
    openers = (*(f"<｜DSML｜{s}" for s in _SECTIONS), "<｜DSML｜invoke", "<｜DSML｜ invoke")
    silent = tuple(f"</｜DSML｜{s}" for s in _SECTIONS)
    closers = ("invoke>", "/>")
    _HEAD = re.compile(
        r"(?:<｜DSML｜(?:function_calls|tool_calls| calls)>\s*)?<｜DSML｜ ?invoke name=\"([^\"]*)\"\s*(/?)>\s*"
    )
    _KEY = re.compile(r"<｜DSML｜ ?parameter name=\"([^\"]*)\"(?: string=\"(true|false)\")?\s*>")
    _END = re.compile(r"</｜DSML｜ ?parameter>\s*(?=<｜DSML｜ ?parameter name=\"|</｜DSML｜ ?invoke>)")
    _CLOSE = re.compile(r"</｜DSML｜ ?invoke>")

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        head = self._HEAD.match(text)
        if head is None:
            if ">" in text[text.find(">") + 1 :]:
                raise Broken
            raise Incomplete(soon=True)
        tool, at = self.tools.get(head[1], NO_TOOL), head.end()
        arguments: dict[str, Any] = {}
        if head[2]:
            return [call(head[1], arguments)], at
        while (close := self._CLOSE.match(text, at)) is None:
            key = self._KEY.match(text, at)
            end = self._END.search(text, key.end()) if key is not None else None
            if key is None or end is None:
                raise Incomplete
            arguments[key[1]] = _dsml_value(text[key.end() : end.start()], key[2], tool.schema_of(key[1]))
            at = end.end()
        return [call(head[1], arguments)], close.end()


def _dsml_value(text: str, string: str | None, schema: dict[str, Any]) -> Any:
    if string == "true":
        return text
    if string is None:
        return typed(text, schema)
    try:
        value, end = json_at(text, skip(text, 0), whole=True)
    except Broken:
        return text
    return value if not text[end:].strip() else text


class KimiK3(Markup):
    """`<|open|>call tool="..."<|sep|><|open|>argument key="..." type="..."<|sep|>value<|close|>argument<|sep|>...`"""

    markers = ("<|open|>", "<|close|>", "<|sep|>")
    thinks = (("<|open|>think<|sep|>", "<|close|>think<|sep|>"),)
    openers = ("<|open|>call ",)
    silent = (
        "<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|open|>tools<|sep|>", "<|close|>tools<|sep|>",
        "<|close|>message<|sep|>",
    )  # fmt: skip
    closers = ("<|sep|>",)
    trims = False
    _HEAD = re.compile(r"<\|open\|>call tool=\"([^\"]*)\"[^<]*<\|sep\|>")
    _KEY = re.compile(r"<\|open\|>argument key=\"([^\"]*)\"(?: type=\"([^\"]*)\")?[^<]*<\|sep\|>")
    _END = re.compile(r"<\|close\|>argument<\|sep\|>(?=<\|open\|>argument key=|<\|close\|>call<\|sep\|>)")
    _CLOSE = "<|close|>call<|sep|>"

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        head = self._HEAD.match(text)
        if head is None:
            raise Incomplete
        at = head.end()
        arguments: dict[str, Any] = {}
        while not text.startswith(self._CLOSE, at):
            key = self._KEY.match(text, at)
            end = self._END.search(text, key.end()) if key is not None else None
            if key is None or end is None:
                raise Incomplete
            schema = {"type": key[2]} if key[2] else {}
            arguments[html.unescape(key[1])] = typed(text[key.end() : end.start()], schema)
            at = end.end()
        return [call(html.unescape(head[1]), arguments)], at + len(self._CLOSE)
