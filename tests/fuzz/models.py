"""What comes with a model, or from a verifier: GGUF headers, tokenizers, chat templates. And grammars of clients."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import wisp.engines
from fuzz.base import FuzzTarget, Reader, must, sane
from fuzz.bodies import SCHEMA, TOOL
from fuzz.mutate import lines_of, write_lines
from hf_files import tokenizer_files
from schemas import KEYWORDS, Maker
from wisp.api.template import CHATML, ChatTemplate
from wisp.core.errors import ConfigError, GrammarError, ModelError, RequestError
from wisp.core.protocol.constraints import MOST_SOURCE, Grammar
from wisp.engines.build import read_tokenizer
from wisp.engines.grammars import Grammars
from wisp.engines.huggingface import HfTokenizer
from wisp.engines.llama.gguf import check_blob, header_only
from wisp.engines.plain import NumberTokenizer, PlainTokenizer

TINY_TARGET = Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf"
GGUF_KINDS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


def gguf_structure(data: bytes) -> list[Any]:
    """[magic, version, tensors, number of pairs (None: as it is), pairs], each of [name, kind, value]."""
    version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    at = 24

    def number(form: str) -> Any:
        nonlocal at
        value = struct.unpack_from(form, data, at)[0]
        at += struct.calcsize(form)
        return value

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            size = number("<Q")
            at += size
            return data[at - size : at].decode("utf-8", "surrogateescape")
        if kind == 9:
            of, count = number("<I"), number("<Q")
            return [of, None, *(value(of) for _ in range(count))]
        return number(GGUF_KINDS[kind])

    found = []
    for _ in range(pairs):
        name = value(8)
        kind = number("<I")
        found.append([name, kind, value(kind)])
    return ["GGUF", version, tensors, None, found]


def write_gguf(value: Any) -> bytes:
    """Raises what the mutator passes over, where a structure is too far from one."""

    def text(said: Any) -> bytes:
        data = str(said).encode("utf-8", "surrogateescape")
        return struct.pack("<Q", len(data)) + data

    def written(kind: int, said: Any) -> bytes:
        if kind == 8:
            return text(said)
        if kind == 9:
            of, count, *items = said
            inner = b"".join(written(of, item) for item in items)
            return struct.pack("<IQ", of, len(items) if count is None else count) + inner
        form = GGUF_KINDS.get(kind, "<I")
        return bytes(struct.pack(form, said))

    try:
        magic, version, tensors, count, pairs = value
        body = b"".join(
            text(name) + struct.pack("<I", kind) + written(kind, said) for name, kind, said in pairs
        )
        head: bytes = magic.encode() + struct.pack(
            "<IQQ", version, tensors, len(pairs) if count is None else count
        )
    except (struct.error, AttributeError) as error:
        raise ValueError from error
    blob = head + body
    return blob + b"\0" * (-len(blob) % 32)


def gguf_examples() -> list[Any]:
    return [gguf_structure(header_only(TINY_TARGET))]


def gguf_blobs(folder: Path) -> Reader:
    path = folder / "model.gguf"

    def read(data: bytes) -> None:
        try:
            check_blob(data)
        except ModelError as error:
            sane(error)
        path.write_bytes(data)
        must(len(header_only(path)) <= len(data) + 32, "more came out than was there")

    return read


def hf_examples(folder: Path) -> list[Any]:
    tokenizer_files(TINY_TARGET, folder)
    return [json.loads(HfTokenizer.open(folder, 512).blob())]


def tokenizer_examples() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = hf_examples(Path(folder))
    plain_ones = (PlainTokenizer(), NumberTokenizer(300, frozenset({299})))
    return [*gguf_examples(), *found, *(json.loads(t.blob()) for t in plain_ones)]


def write_tokenizer(value: Any) -> bytes:
    return write_gguf(value) if isinstance(value, list) else json.dumps(value).encode()


def tokenizers(_: Path) -> Reader:
    """What a verifier hands out, as an edge reads it, and works with it."""

    def read(data: bytes) -> None:
        tokenizer = read_tokenizer(data)
        try:
            must(len(tokenizer.fingerprint) == 64, "a fingerprint is none")
            ids = tokenizer.encode("Hi <|im_end|> é 12", add_bos=True, parse_special=True)
            must(all(i >= 0 for i in ids), "an id is none")
            b"".join(map(tokenizer.piece, [*ids, -1, 0, tokenizer.n_vocab, 1 << 40]))
            tokenizer.fewest("Hi")
        finally:
            close = getattr(tokenizer, "close", None)
            if close is not None:
                close()

    return read


# --- templates

PIECES = (
    "{%- for message in messages -%}", "{%- endfor -%}", "{{- message.content -}}",
    "{{ message['role'] | upper }}", "{%- if tools -%}", "{%- endif -%}", "{%- else -%}",
    "{{ tools | tojson(indent=2) }}", "{% set ns = namespace(x='a', n=1, l=[]) %}",
    "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x + ns.x %}", "{% set ns.n = ns.n * ns.n + 3 %}",
    "{% set ns.l = [ns.l, ns.l] %}", "{% set ns.l = ns.l + ns.l %}", "{% set ns.x = ns.x * 9 %}",
    "{% for i in range(99999) %}", "{% for j in r %}", "{% set r = range(90000) %}", "{{ 'a'.ljust(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:1000000000}'.format(1) }}", "{{ 'a' | center(10**9) }}",
    "{{ 'a\\n' | indent(10**9) }}", "{{ ns.x | replace('', ns.x) }}", "{{ ns.x.join(r | map('string')) }}",
    "{{ ns.l }}", "{{ ns.l | tojson }}", "{{ ns.l == ns.l }}", "{{ ns.n }}",
    "{{ 1.5 | round(10**7, 'ceil') }}", "{{ r | list | length }}", "{{ r | batch(10**9, 'x') | list }}",
    "{% macro m(a) %}{{ m(a) }}{{ m(a) }}{% endmacro %}", "{{ m(1) }}", "{{ ''.__class__ }}",
    "{{ messages.append(1) }}", "{{ messages[0].x.y }}", "{{ raise_exception('no') }}",
    "{{ strftime_now('%d %b %Y') }}", "{% generation %}x{% endgeneration %}", "{{ bos_token }}", "{% break %}",
    "{{ 'a'.zfill(10**9) }}", "{{ '\\t'.expandtabs(10**9) }}", "{{ 9**9**9 }}", "{{ ns.x | wordwrap(1) }}",
    "{{ (ns.x ~ 'b') | urlize }}", "{% set ns.l = {'a': ns.l, 'b': ns.l} %}", "{{ dict(a=ns.l, b=ns.l) }}",
    "{% set ns.l = (ns.l, ns.l) %}", "{{ ns.l | string | length }}", "{{ ns.x.replace('a', ns.x) }}",
    "{{ ns.x.splitlines() | sum(start=[]) }}", "{{ [ns.l] | sort }}", "{{ ns.x | list | join(ns.x) }}",
)  # fmt: skip


def template_examples() -> list[Any]:
    """Templates as lists of pieces, so that pieces move between them."""
    whole = [list(PIECES[i : i + 8]) for i in range(0, len(PIECES), 4)]
    loops = [[PIECES[8], PIECES[15], piece, PIECES[1]] for piece in PIECES]
    return [*whole, *loops, [CHATML], [*PIECES[:5]]]


def write_template(value: Any) -> bytes:
    return (
        "".join(map(str, value)).encode("utf-8", "replace")
        if isinstance(value, list)
        else str(value).encode()
    )


def templates(_: Path) -> Reader:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi <b>"},
        {"role": "assistant", "content": "é", "tool_calls": []},
    ]

    def read(data: bytes) -> None:
        template = ChatTemplate(data.decode("utf-8", "replace"))
        try:
            text = template.render(messages, tools=[TOOL], bos_token="<s>", eos_token="</s>", args={"x": 1})
        except RequestError as error:
            must(error.status == 400, f"status {error.status}: {error}")
            sane(error)
        else:
            must(isinstance(text, str), "a prompt is text")

    return read


# --- grammars

LARK = """start: "a" thing+
thing: WORD | NUMBER | %json {"type": "object"}
WORD: /[a-z]{1,20}/
NUMBER: /[0-9]+/ & /.{1,4}/
"""
GBNF = 'root ::= "yes" ws ( "no" | list )\nlist ::= "[" item ("," item)* "]"\nitem ::= [a-z0-9]+\nws ::= [ \\t]*\n'
REGEXES = (
    "a+",
    "[a-f]{2,5}",
    "(on|off)+",
    "(a|b)*a(a|b){9}",
    "\\d{3}-\\d{2}",
    "(?i)yes",
    "[^\\x00-\\x7f]+",
    "((a*)*)*b",
)


def grammar_examples() -> list[Any]:
    """[kind, source]: a source is JSON as a structure, or lines, or text."""
    leads = [KEYWORDS[k] for k in sorted(KEYWORDS)]
    schemas = [["json_schema", lead(Maker(i), 2)] for i, lead in enumerate(leads)]
    joined = [["json_schema", {"type": "integer", "allOf": [{"multipleOf": 9}, {"multipleOf": 7}]}]]
    return [
        *schemas, *joined, ["json_schema", SCHEMA], ["choice", ["yes", "no"]], ["tokens", [1, 2, 3]],
        ["lark", lines_of(LARK)], ["lark", lines_of(GBNF)], *(["regex", r] for r in REGEXES), ["json_object", ""],
    ]  # fmt: skip


def write_grammar(value: Any) -> bytes:
    kind, source = value
    if kind in ("lark", "regex"):
        written = write_lines(source).decode("utf-8", "replace")
    else:
        written = source if isinstance(source, str) else json.dumps(source)
    return f"{kind}\0".encode() + written.encode("utf-8", "replace")


def grammars(_: Path) -> Reader:
    tokenizer = PlainTokenizer()
    count = 0

    def read(data: bytes) -> None:
        nonlocal count
        kind, _, source = data.decode("utf-8", "replace").partition("\0")
        if kind not in ("json_object", "json_schema", "regex", "choice", "lark", "tokens"):
            return
        grammar = Grammar(kind, source[:MOST_SOURCE])  # type: ignore[arg-type]
        if grammar.problem():
            return
        count += 1
        if count % 500 == 1:
            made[0] = Grammars(tokenizer)
        made[0].compile(grammar)
        matcher = made[0].matcher(grammar)
        text: list[int] = []
        for step in range(12):
            mask = matcher.masks(text, [])[0]
            allowed = [i for i in range(257) if int(mask[i // 32]) >> (i % 32) & 1]
            must(allowed, "nothing may follow")
            text.append(allowed[(step * 7 + len(data)) % len(allowed)])

    made = [Grammars(tokenizer)]
    return read


MODELS = (
    FuzzTarget("gguf", gguf_examples, write_gguf, gguf_blobs, (ModelError,), count=200_000, quick=150),
    FuzzTarget(
        "tokenizers",
        tokenizer_examples,
        write_tokenizer,
        tokenizers,
        (ModelError, ConfigError),
        count=50_000,
        quick=150,
        slow_s=3.0,
        native=True,
        memory_mb=400,
    ),
    FuzzTarget(
        "templates",
        template_examples,
        write_template,
        templates,
        (RequestError,),
        count=50_000,
        quick=150,
        slow_s=4.0,
        native=True,
        memory_mb=400,
    ),
    FuzzTarget(
        "grammars",
        grammar_examples,
        write_grammar,
        grammars,
        (GrammarError,),
        count=50_000,
        quick=200,
        slow_s=8.0,
        native=True,
        torn=0.05,
        memory_mb=400,
    ),
)
