"""Chat templates: messages in, prompt text out. `api.sandbox` bounds what a template may do."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes

from wisp.api import sandbox
from wisp.api.sandbox import budget
from wisp.core.errors import RequestError
from wisp.engines.special import NO_STAND_INS, StandIns

SHOWN = 300  # characters of what a template says of messages that it refuses

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content or '' }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads."""

    def __init__(self, source: str) -> None:
        """Raises RequestError 500 where `source` does not compile."""
        self.source = source
        environment = sandbox.Environment()
        try:
            self._template = environment.from_string(source)
            self.tested, self.written = _texts(environment.parse(source))
        except Exception as exc:  # jinja2's own, and Python's for what it makes of a template
            raise RequestError(
                500,
                f"The chat template of this model does not compile: {_shown(exc)}. Use /v1/completions instead.",
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
            message = f"The model's chat template refused these messages: {_shown(exc)}"
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
    budget.deadline = time.monotonic() + sandbox.MAX_SECONDS
    budget.left = sandbox.MAX_MADE
    budget.stand_ins = stand_ins
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(variables):
            size += len(piece)
            if size > sandbox.MAX_CHARS:
                raise jinja2.TemplateError(f"the prompt is longer than {sandbox.MAX_CHARS} characters")
            budget.check()
            pieces.append(piece)
    finally:
        budget.deadline = float("inf")
        budget.stand_ins = NO_STAND_INS
    return "".join(pieces)


def _shown(error: Exception) -> str:
    """What a template says, in part and as one line: it may have put anything into it."""
    text = " ".join(str(error)[:SHOWN].split())
    return "".join(c if c.isprintable() else "?" for c in text)


@functools.lru_cache(maxsize=8)
def chat_template(source: str | None) -> ChatTemplate:
    """The compiled template of a model; plain ChatML where it has none."""
    return ChatTemplate(source or CHATML)
