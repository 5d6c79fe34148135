"""Families that write calls in notations of their own: Llama 4's Python, Gemma 4's objects."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from wisp.api.tools.events import Broken, Call, Incomplete, call
from wisp.api.tools.markup import Markup
from wisp.api.tools.reading import expect, passed, skip

_DEEPEST = 64  # levels of objects and lists in arguments


class Pythonic(Markup):
    """`[name(key=value, ...), ...]`, with or without `<|python_start|>` and `<|python_end|>` around it."""

    markers = ("<|python_start|>", "<|python_end|>")
    thinks = ()
    openers = ("<|python_start|>",)
    first_openers = ("[",)
    closers = ("]",)
    trims = False
    long = 1 << 8
    _HEAD = re.compile(r"\[\s*[A-Za-z_][\w.]*\(")
    _HEAD_BEGUN = re.compile(r"\[\s*([A-Za-z_][\w.]{0,200})?")
    _PARTS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|['\"\[\](){}]", re.DOTALL)

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        at = skip(text, len("<|python_start|>")) if text.startswith("<|python_start|>") else 0
        if at == len(text):
            raise Incomplete(soon=True)
        if self._HEAD.match(text, at) is None:
            if self._HEAD_BEGUN.fullmatch(text, at):
                raise Incomplete(soon=True)
            raise Broken
        end = self._close(text, at)
        try:
            tree = ast.parse(text[at:end], mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise Broken from None
        if not isinstance(tree, ast.List) or not tree.elts:
            raise Broken
        calls = [self._call(element, text[at:end]) for element in tree.elts]
        if at:
            end = passed(text, end, "<|python_end|>", ended)
        elif skip(text, end) == len(text):
            if not ended:
                raise Incomplete(soon=True)
            end = len(text)
        else:
            raise Broken  # a list that words follow is quoted
        return calls, end

    def _close(self, text: str, at: int) -> int:
        depth = 0
        for part in self._PARTS.finditer(text, at):
            if part[0] in ("'", '"'):
                raise Incomplete
            depth += part[0] in ("[", "(", "{")
            depth -= part[0] in ("]", ")", "}")
            if not depth:
                return part.end()
        raise Incomplete

    def _call(self, node: ast.expr, source: str) -> Call:
        if not isinstance(node, ast.Call) or node.args:
            raise Broken
        name = ast.unparse(node.func)
        if name not in self.tools:
            raise Broken
        try:
            arguments = {k.arg: _literal(k.value, source) for k in node.keywords}
            return call(name, arguments)
        except (ValueError, TypeError, RecursionError):
            raise Broken from None


def _literal(node: ast.expr, source: str) -> Any:
    """A value in Python's notation, or in JSON's. Raises ValueError."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return json.loads(ast.get_source_segment(source, node) or "")


class Gemma4(Markup):
    """`<|tool_call>call:name{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>`"""

    QUOTE = '<|"|>'
    markers = ("<|tool_call>", "<tool_call|>", QUOTE, "<|channel>", "<channel|>", "<|tool_response>")
    thinks = (("<|channel>thought\n", "<channel|>"), ("<|channel>", "<channel|>"))
    openers = ("<|tool_call>",)
    closers = ("}", "<tool_call|>")
    trims = False
    _NAME = re.compile(r"\s*([\w.-]+)\s*(?=\{)")
    _WORD = re.compile(r"[^,:\[\]{}<]*")

    def call(self, text: str, ended: bool) -> tuple[list[Call], int]:
        at = expect(text, len("<|tool_call>"), "call:")
        name = self._NAME.match(text, at)
        if name is None:
            if "{" in text or "<tool_call|>" in text:
                raise Broken
            raise Incomplete
        value, at = self._object(text, name.end(), _DEEPEST)
        end = passed(text, at, "<tool_call|>", ended)
        return [call(name[1], value)], end

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        at = skip(text, at)
        if not depth:
            raise Broken
        if text.startswith(self.QUOTE, at):
            return self._string(text, at)
        if text.startswith("{", at):
            return self._object(text, at, depth)
        if text.startswith("[", at):
            return self._list(text, at, depth)
        word = self._WORD.match(text, at)
        assert word is not None
        if word.end() == len(text) or text[word.end()] == "<":
            raise Incomplete
        return _scalar(word[0].strip()), word.end()

    def _string(self, text: str, at: int) -> tuple[str, int]:
        at += len(self.QUOTE)
        end = text.find(self.QUOTE, at)
        if end < 0:
            raise Incomplete
        return text[at:end], end + len(self.QUOTE)

    def _object(self, text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        at = skip(text, at + 1)
        while not text.startswith("}", at):
            if text.startswith(self.QUOTE, at):
                key, at = self._string(text, at)
            else:
                colon = text.find(":", at)
                if colon < 0:
                    raise Incomplete
                key, at = text[at:colon].strip(), colon
            at = skip(text, at)
            if at == len(text):
                raise Incomplete
            if text[at] != ":":
                raise Broken
            found[key], at = self._value(text, at + 1, depth - 1)
            at = _next(text, at, "}")
        return found, at + 1

    def _list(self, text: str, at: int, depth: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        at = skip(text, at + 1)
        while not text.startswith("]", at):
            value, at = self._value(text, at, depth - 1)
            found.append(value)
            at = _next(text, at, "]")
        return found, at + 1


def _next(text: str, at: int, close: str) -> int:
    """Where the next element is, or the end. Raises Incomplete or Broken."""
    at = skip(text, at)
    if at == len(text):
        raise Incomplete
    if text[at] == ",":
        at = skip(text, at + 1)
        if at == len(text):
            raise Incomplete
        return at
    if text[at] != close:
        raise Broken
    return at


def _scalar(word: str) -> Any:
    words: dict[str, Any] = {"true": True, "false": False, "null": None}
    if word in words:
        return words[word]
    for number in (int, float):
        try:
            value = number(word)
        except ValueError:
            continue
        if "_" not in word and value == value and abs(value) != float("inf"):
            return value
    return word
