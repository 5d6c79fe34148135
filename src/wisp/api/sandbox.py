"""The sandbox of chat templates: jinja2's immutable one, with bounds on time and on what is made.

A template comes with a model, or from a verifier, so it may be written to harm. It runs in a thread that nothing can
stop, so whatever could take long or grow asks first:

    every turn of a loop, and every call      is there time left?
    operators, methods and filters that grow  how large would it be?
    lists and the like, and what is printed   how large is all that is in it, counted as often as it is in it?

So no value stands for more than `MAX_CHARS` characters and `MAX_ENTRIES` entries, and one rendering makes no more than
`MAX_MADE` characters.

The environment has what Hugging Face's has, as templates are written against it: trimmed blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `generation` blocks.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from wisp.engines.special import NO_STAND_INS, StandIns

MAX_CHARS = 16 << 20  # of one value; an entry of a list counts as one
MAX_ENTRIES = 1 << 20  # of lists and the like in one value
MAX_MADE = 32 * MAX_CHARS  # in one rendering
MAX_SECONDS = 2.0
MAX_DIGITS = 1000  # of a number
MAX_INDENT = 64
SHORT = (
    1 << 12
)  # characters that are made without a question: the time for them is bounded, and so is their number
_WIDE = re.compile(r"[0-9]{4,}|\*|\{[^{}]*\{")  # in a format: a width of thousands, or one from elsewhere

_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")


class _Budget(threading.local):
    """The rendering that runs in this thread: its deadline, what it may still make, and what stands for what in its
    strings."""

    deadline = float("inf")
    left = MAX_MADE
    stand_ins: StandIns = NO_STAND_INS

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateError(f"rendering took longer than {MAX_SECONDS:g} s")

    def spend(self, size: int) -> None:
        """So many characters are about to be made, in one piece."""
        self.left -= size
        if size > MAX_CHARS or self.left < 0:
            raise jinja2.TemplateError("the template makes more text than it may")
        self.check()


budget = _Budget()


def _size(value: Any) -> int:
    """Characters of a value, and of all values in it; what is in it twice counts twice. Raises TemplateError."""
    if isinstance(value, str):
        return len(value)
    size, entries, todo = 1, 0, [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            entries += 2 * len(item)
            todo += item.keys()
            todo += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            entries += len(item)
            if entries <= MAX_ENTRIES:
                todo += item
        elif isinstance(item, jinja2.utils.Namespace):
            entries += 1
            todo.append(object.__getattribute__(item, "_Namespace__attrs"))
        if size + entries > MAX_CHARS or entries > MAX_ENTRIES:
            raise jinja2.TemplateError("the template makes more text than it may")
        if not entries % 1024:
            budget.check()
    return size + entries


def _made(value: Any) -> Any:
    """The value, if it is not too large."""
    if type(value) is str and len(value) < SHORT:
        return value
    if isinstance(value, str | list | tuple | dict | set | jinja2.utils.Namespace):
        budget.spend(_size(value))
    return value


def _listed(value: Any) -> Any:
    """What comes one by one, as a list of bounded length."""
    if isinstance(value, str | list | tuple | Mapping):
        return value
    return _made(list(itertools.islice(value, MAX_ENTRIES + 1)))


# --- how large would it be?


def _padded(text: str, width: Any = 0, *_: Any) -> int:
    return len(text) + width if isinstance(width, int) else len(text)


def _replaced(text: str, old: Any = "", new: Any = "", *_: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def _joined(sep: str, items: Sequence[Any] = (), *_: Any) -> int:
    return _size(items) + len(items) * len(sep)


def _tabbed(text: str, width: Any = 8) -> int:
    return len(text) + text.count("\t") * width if isinstance(width, int) else len(text)


def _translated(text: str, table: Any = None) -> int:
    values = table.values() if isinstance(table, dict) else ()
    return len(text) * max((len(v) for v in values if isinstance(v, str)), default=1)


_METHODS: dict[str, Callable[..., int]] = {
    "center": _padded, "ljust": _padded, "rjust": _padded, "zfill": _padded, "replace": _replaced, "join": _joined,
    "expandtabs": _tabbed, "translate": _translated,
}  # fmt: skip


def _indented(value: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    text = str(value)
    return len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width))


def _as_json(value: Any, ensure_ascii: Any = False, indent: Any = None, *_: Any, **__: Any) -> int:
    if isinstance(indent, str):
        indent = len(indent)
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise jinja2.TemplateError(f"tojson: an indent is at most {MAX_INDENT}")
    return _size(value)  # nesting is bounded by Python's recursion


_FILTERS: dict[str, Callable[..., int]] = {
    "center": lambda v, width=80: _padded(str(v), width),
    "indent": _indented,
    "replace": lambda v, old, new, *_: _replaced(str(v), old, new),
    "tojson": _as_json,
    "batch": lambda v, n, *_: n,
    "slice": lambda v, n, *_: n,
    "wordwrap": lambda v, *_, **__: 2 * len(str(v)),
}
_GONE = ("pprint", "urlize")  # they take long, and no template needs them


def _guarded(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that asks first, and whose result is bounded."""
    ask = _FILTERS.get(name)
    first = hasattr(do, "jinja_pass_arg")  # jinja2 itself is then the first argument

    @functools.wraps(do)
    def guarded(*args: Any, **options: Any) -> Any:
        if ask is not None:
            budget.spend(max(0, ask(*args[first:], **options)))
        else:
            budget.check()
        return _made(do(*args, **options))

    return guarded


@jinja2.utils.pass_environment
def _join(environment: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    items = _listed(value)
    if attribute is not None:
        items = list(map(jinja2.filters.make_attrgetter(environment, attribute), items))
    budget.spend(_joined(str(d), items))
    return str(d).join(map(str, items))


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    if not 0 <= precision <= 20:
        raise jinja2.TemplateError("round: a precision is at most 20")
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


@jinja2.utils.pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise jinja2.TemplateError("sum: the start is a number")
    return jinja2.filters.sync_do_sum(environment, iterable, attribute, start)


def _format(value: Any, *args: Any, **named: Any) -> str:
    _check_format(str(value))
    return str(value) % (named or args)


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise jinja2.TemplateError("a format has a width of thousands, or one from elsewhere")


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
    return char[0] if ord(char[0]) in budget.stand_ins else json.dumps(char[0])[1:-1]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates use
    _check_format(format)
    return datetime.datetime.now().strftime(format)


# --- the environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_made,
        )
        own = {"tojson": _to_json, "join": _join, "round": _round, "sum": _sum, "format": _format}
        filters = {**self.filters, **own}
        self.filters = {name: _guarded(name, do) for name, do in filters.items() if name not in _GONE}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # makes text by the megabyte, and no template needs it

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **options: Any) -> str:
        """Python for a template, with our questions in it."""
        return super()._generate(_asking(source), *args, **options)

    # What the questions call:
    wisp_made = staticmethod(_made)

    @staticmethod
    def wisp_turn(size: int) -> None:
        """A turn of a loop whose own text has so many characters."""
        budget.spend(size)

    @staticmethod
    def wisp_concat(*values: Any) -> str:
        """`~`"""
        budget.spend(sum(map(_size, values)))
        return "".join(map(str, values))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str and len(left) + len(right) < SHORT:
            return left + right
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and not (numbers and abs(left) <= 1e6 and abs(right) <= 16):
            raise jinja2.TemplateError("the template builds too large a number")
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > 3 * MAX_DIGITS:
                raise jinja2.TemplateError("the template builds too large a number")
        elif operator == "*" and not numbers:
            count, sequence = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int):
                budget.spend(max(0, count) * _size(sequence))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "+" and not numbers:
            budget.spend(_size(left) + _size(right))
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget.check()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and (ask := _METHODS.get(__obj.__name__)) is not None:
            if __obj.__name__ == "join" and args:
                args = (_listed(args[0]), *args[1:])
            budget.spend(max(0, ask(owner, *args)))
        return _made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            return wrapped(*args, **kwargs)

        return checked


def _asking(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """The template with a question at each turn of a loop, and around what `~` and literals make."""
    n = jinja2.nodes

    def call(name: str, args: Iterable[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Call:
        return n.Call(n.EnvironmentAttribute(f"wisp_{name}"), list(args), [], None, None, lineno=line)

    def changed(node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        for name, value in node.iter_fields():
            if isinstance(value, n.Node):
                setattr(node, name, changed(value))
            elif isinstance(value, list):
                value[:] = [changed(v) if isinstance(v, n.Node) else v for v in value]
        if isinstance(node, n.For):
            text = sum(len(data.data) for data in node.find_all(n.TemplateData))
            node.body.insert(0, n.ExprStmt(call("turn", [n.Const(text)], node.lineno), lineno=node.lineno))
        elif isinstance(node, n.Concat):
            return call("concat", node.nodes, node.lineno)
        elif isinstance(node, n.List | n.Dict) or (isinstance(node, n.Tuple) and node.ctx == "load"):
            parts = node.iter_child_nodes()
            if any(not isinstance(part, n.Const) for part in parts):
                return call("made", [node], node.lineno)
        return node

    changed(tree)
    if tree.environment is not None:
        tree.set_environment(tree.environment)
    return tree
