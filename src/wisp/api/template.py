"""Chat templates: messages in, prompt text out.

Templates come with models and messages come from clients, so neither is trusted: jinja2's immutable sandbox,
a limit on what is rendered and on what `*` and `**` may build, and a deadline that is checked at every piece
of output and at every call. (The sandbox keeps code from running. A template that was written to waste time
or memory can still find a way; whoever picks the model picks its template.)

The environment has what Hugging Face's has, as templates are written against it: trimmed blocks, loop
controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `generation` blocks.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from wisp.core.errors import RequestError
from wisp.engines.special import NO_STAND_INS, StandIns

MAX_CHARS = 16 << 20
MAX_SECONDS = 2.0

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content or '' }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")


class _Budget(threading.local):
    """The rendering that runs in this thread: its deadline, and what stands for what in its strings."""

    deadline = float("inf")
    stand_ins: StandIns = NO_STAND_INS

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateError(f"rendering took longer than {MAX_SECONDS:g} s")


_budget = _Budget()


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on size and time."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "*" and not numbers:
            count, sequence = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(sequence, Sized) and len(sequence) * count > MAX_CHARS:
                raise jinja2.TemplateError("the template builds too long a sequence")
        if operator == "**" and not (numbers and abs(left) <= 1e6 and abs(right) <= 16):
            raise jinja2.TemplateError("the template builds too large a number")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _budget.check()
        return super().call(__context, __obj, *args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _BEYOND_ASCII.sub(_escaped, text) if ensure_ascii else text


def _escaped(char: re.Match[str]) -> str:
    """As JSON has it in ASCII; but what stands for a character stays, as that will be ASCII."""
    return char[0] if ord(char[0]) in _budget.stand_ins else json.dumps(char[0])[1:-1]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates use
    return datetime.datetime.now().strftime(format)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]  # makes text by the megabyte, and no template needs it
    return environment


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads."""

    def __init__(self, source: str) -> None:
        """Raises RequestError 500 where `source` does not compile."""
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.tested, self.written = _texts(environment.parse(source))
        except jinja2.TemplateError as exc:
            raise RequestError(
                500,
                f"The chat template of this model does not compile: {exc}. Use /v1/completions instead.",
                code="invalid_chat_template",
                type="server_error",
            ) from exc
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        bos_token: str = "",
        eos_token: str = "",
        args: Mapping[str, Any] | None = None,
        stand_ins: StandIns = NO_STAND_INS,
        open_end: bool = False,
    ) -> str:
        """The prompt, up to where the assistant's answer begins; with `open_end`, up to the end of the last message.

        `args` are further variables that a template may know, such as `enable_thinking`. `stand_ins`: of
        characters in the messages (`api.guard`). Raises RequestError 400 where the template refuses the messages or
        fails on them.
        """
        if reserved := _RESERVED.intersection(args or ()):
            message = f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be set"
            raise RequestError(400, message, param="chat_template_kwargs")
        variables = dict(args or {})
        variables.update(
            messages=[self._message(m) for m in messages],
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=not open_end,
            bos_token=bos_token,
            eos_token=eos_token,
        )
        try:
            return _bounded(self._template, variables, stand_ins)
        except RequestError:
            raise
        except Exception as exc:  # a template can raise anything
            message = f"The model's chat template refused these messages: {exc}"
            raise RequestError(400, message, param="messages", code="chat_template_error") from exc

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """`developer` is OpenAI's newer word for `system`; most templates know only the older one."""
        if message["role"] == "developer" and not self._knows_developer:
            return {**message, "role": "system"}
        return message


def _texts(tree: jinja2.nodes.Template) -> tuple[set[str], set[str]]:
    """(texts that a template compares with, looks for or names, pieces of text that it writes)."""
    tested = set()
    asks = (
        jinja2.nodes.Compare,
        jinja2.nodes.Call,
        jinja2.nodes.Filter,
        jinja2.nodes.Test,
        jinja2.nodes.Assign,
    )
    for node in tree.find_all(asks):
        for const in node.find_all(jinja2.nodes.Const):
            if isinstance(const.value, str) and const.value:
                tested.add(const.value)
    tested |= {n.attr for n in tree.find_all(jinja2.nodes.Getattr)}
    subscripts = (n.arg for n in tree.find_all(jinja2.nodes.Getitem))
    tested |= {n.value for n in subscripts if isinstance(n, jinja2.nodes.Const) and isinstance(n.value, str)}
    written = {t.data for t in tree.find_all(jinja2.nodes.TemplateData)}
    written |= {c.value for c in tree.find_all(jinja2.nodes.Const) if isinstance(c.value, str)}
    return tested, written


def _bounded(template: jinja2.Template, variables: Mapping[str, Any], stand_ins: StandIns) -> str:
    _budget.deadline = time.monotonic() + MAX_SECONDS
    _budget.stand_ins = stand_ins
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_CHARS:
                raise jinja2.TemplateError(f"the prompt is longer than {MAX_CHARS} characters")
            _budget.check()
            pieces.append(piece)
    finally:
        _budget.deadline = float("inf")
        _budget.stand_ins = NO_STAND_INS
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def chat_template(source: str | None) -> ChatTemplate:
    """The compiled template of a model; plain ChatML where it has none."""
    return ChatTemplate(source or CHATML)
