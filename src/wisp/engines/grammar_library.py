"""llguidance: the form it wants of a vocabulary, and of a grammar's source.

It is imported when the first grammar comes. A device that does not have it drafts without masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from wisp.core.errors import GrammarError
from wisp.core.protocol.constraints import Grammar

# What a grammar may cost when it is used: a mask 15 ms. What compiling may cost: see `grammar_trial`.
LIMITS = {"step_lexer_fuel": 100_000, "step_max_items": 30_000, "max_lexer_states": 20_000}
# White space in JSON is what Python writes. With more freedom models may write blanks for ever, and fewer tokens are
# certain; a schema can ask for other forms in "x-guidance".
SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
MISSING = (
    "grammars need llguidance 1.7.6 or later, which is not installed here: pip install 'llguidance>=1.7.6'"
)
NO_TEXT = b"\xff"  # which no text has; tokens that are no text begin with it


def available() -> bool:
    """Is llguidance here?"""
    return library() is not None


@cache
def library() -> Any:
    try:
        found = import_module("llguidance")
    except ImportError:
        return None
    return found if hasattr(found, "LLMatcher") else None  # where it has no wheel, pip finds a placeholder


def vocabulary(tokens: list[bytes], ends: Sequence[int], encode: Callable[[str], list[int]]) -> Any:
    """llguidance's own form. tokens: what each id says; ends: ids that end a text. Raises GrammarError."""
    if (found := library()) is None:
        raise GrammarError(MISSING)
    return found.LLTokenizer(_Wrapper(tokens, min(ends), encode), eos_token=sorted(ends))


def compiled(vocabulary: Any, grammar: Grammar) -> Any:
    """An LLMatcher at the grammar's beginning. Raises GrammarError."""
    found = library()
    try:
        source = _source(found, grammar)
        limits = found.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = found.LLMatcher(vocabulary, source, log_level=0, limits=limits)
    except (ValueError, RecursionError) as error:
        raise GrammarError(short(str(error))) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, and no Exception
            raise
        raise GrammarError("llguidance cannot compile this grammar") from None
    if matcher.is_error():
        raise GrammarError(short(matcher.get_error()))
    return matcher


def _source(library: Any, grammar: Grammar) -> str:
    """In llguidance's own form. Raises GrammarError or ValueError."""
    kind, source = grammar.kind, grammar.source
    if kind == "json_object":
        return _json(library, {"type": "object"})
    if kind == "json_schema":
        schema = _read(source, "the schema")
        return _json(library, schema)
    if kind == "choice":
        choices = _read(source, "the choices")
        if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
            raise GrammarError("choices must be a list of strings that are not empty")
        return str(library.grammar_from("choice", source))
    if kind == "regex":
        return str(library.LLMatcher.grammar_from_regex(source))
    try:
        return str(library.grammar_from("grammar", source))  # takes GBNF, too
    except ValueError:
        raise
    except Exception as error:  # the converter's own
        raise GrammarError(f"neither a Lark grammar nor GBNF: {short(str(error))}") from None


def _json(library: Any, schema: Any) -> str:
    if not isinstance(schema, dict | bool):
        raise GrammarError("a JSON schema is an object or a boolean")
    if schema is False:
        raise GrammarError("unsatisfiable: the schema is false")
    text = json.dumps(strictly({} if schema is True else schema))
    return str(library.LLMatcher.grammar_from_json_schema(text))


def strictly(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as `%json` takes it: with `SEPARATORS`, unless it asks for others, and no keyword passed over."""
    own = schema.get("x-guidance", {})
    options = {**SEPARATORS, **own, "lenient": False} if isinstance(own, dict) else own
    return {**schema, "x-guidance": options}


def _read(source: str, what: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{what} cannot be read as JSON: {error}") from None


class _Wrapper:
    """What llguidance wants of a tokenizer."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokens: list[bytes], end: int, encode: Callable[[str], list[int]]) -> None:
        self.tokens, self.eos_token_id, self._encode = tokens, end, encode
        self.special_token_ids = [i for i, token in enumerate(tokens) if token[:1] == NO_TEXT]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def short(message: str) -> str:
    """An error of llguidance in one line."""
    return " ".join(message.split())[:400]
