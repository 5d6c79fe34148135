"""Grammars by llguidance: compiled once, remembered for each key, and followed token by token.

A *matcher* says which ids may come next after any tokens (`core.protocol.edits.Matcher`). It keeps its place in the
grammar: tokens that are there no longer are rolled back, new ones are taken in, and the masks along a draft come from
one call. It is used from one thread at a time, `Grammars` from any.

llguidance is imported when the first grammar comes. A device that does not have it drafts without masks.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from importlib import import_module
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from wisp.core.errors import GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.edits import Bits, Matcher
from wisp.engines.base import Tokenizer
from wisp.engines.forced_tokens import ForcedTokens
from wisp.engines.grammar_limits import check_lark, check_schema

# What a grammar may cost: the largest that fits its 64 KiB takes 2 to 4 s of a core to compile and 40 MB, a mask 15 ms.
LIMITS = {"step_lexer_fuel": 100_000, "step_max_items": 30_000, "max_lexer_states": 20_000}
QUICK_S = 0.25  # of a core: who compiles faster may compile anew in the engine's thread
# So many are kept, or more where more are those of living sessions:
KEPT = 64  # compiled grammars of a key
KEPT_BYTES = 1 << 20  # of their sources: a compiled one takes 600 times as much, at worst
KEYS = 64  # keys with their grammars
MOST_HELD = 4 << 20  # bytes of the sources of all different grammars that living sessions of a key have
# White space in JSON is what Python writes. With more freedom models may write blanks for ever, and fewer tokens are
# certain; a schema can ask for other forms in "x-guidance".
SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
MISSING = (
    "grammars need llguidance 1.7.6 or later, which is not installed here: pip install 'llguidance>=1.7.6'"
)
NO_END = "this model has no end of sequence, so that no text of a grammar could come to an end"
_Name = tuple[str, str]  # kind and source
K = TypeVar("K")
V = TypeVar("V")
_BY_NUMBER = re.compile(r"<\[([^\]\n]*)\]>")


def available() -> bool:
    """Is llguidance here?"""
    return _library() is not None


@cache
def _library() -> Any:
    try:
        library = import_module("llguidance")
    except ImportError:
        return None
    return (
        library if hasattr(library, "LLMatcher") else None
    )  # where it has no wheel, pip finds a placeholder


class _Compiled:
    """A grammar at its beginning: `matcher`, the `number`th of its kind. `over`: why it is of no use any more. `asked`:
    for whom it was compiled, those of them that are still alive; by identity, as equal ones may come and go.

    Matchers share what llguidance finds out about a grammar: that grows with all of their texts, up to a limit, and one
    that exceeds a limit leaves wrong entries there. So then the grammar is compiled anew, and all matchers go on with
    that. Where this would hold up the engine for long, all end instead: no text is better than another text.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        """Raises GrammarError."""
        self._make = make
        self._lock = threading.Lock()
        started = time.thread_time()
        self.matcher = make()
        self._quick = time.thread_time() - started <= QUICK_S
        self.number = 0
        self.over = ""
        self.asked: WeakValueDictionary[int, Grammar] = WeakValueDictionary()

    def renew(self, number: int, why: str) -> None:
        """The `number`th cannot be used any more. Raises GrammarError if none follows it."""
        with self._lock:
            if number == self.number and self._quick:
                self.matcher = self._make()
                self.number += 1
            elif number == self.number:
                self.over = why
        self.check()

    def check(self) -> None:
        """Raises GrammarError."""
        if self.over:
            raise GrammarError(_too_much(self.over))


class _TooMuchError(Exception):
    """A limit is exceeded, and with it what matchers share is spoilt."""


class Grammars:
    """Grammars over one vocabulary (`core.protocol.edits.Matchers`)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._by_key: OrderedDict[str, OrderedDict[_Name, _Compiled]] = OrderedDict()

    def compile(self, grammar: Grammar, key: str = "") -> None:
        """See that `matcher` will find it compiled, at least as long as this very object lives: its session may have to
        wait for its turn, or lose it. `key`: whose it is, so that nobody can tell by the time what others ask for.
        Takes up to seconds, and lets other threads run meanwhile.

        Raises GrammarError, which names the keyword or the place that cannot be compiled.
        """
        if grammar.kind == "tokens":
            self._forced(grammar)
            return
        if (known := self._kept(grammar, key)) is not None:
            known.check()
            return
        self._check_held(grammar, key)
        compiled = self._compiled(grammar)
        with self._lock:
            kept = self._by_key.setdefault(key, OrderedDict())
            self._by_key.move_to_end(key)
            compiled = kept.setdefault(_name(grammar), compiled)  # another thread may have been faster
            compiled.asked[id(grammar)] = grammar
            _forget(kept, lambda: len(kept) > KEPT or _size(kept) > KEPT_BYTES, lambda c: not c.asked)
            keys = self._by_key
            _forget(keys, lambda: len(keys) > KEYS, lambda k: not any(c.asked for c in k.values()))

    def ready(self, grammar: Grammar, key: str) -> bool:
        """Has it been compiled for this key? If so it stays, as after `compile`."""
        return grammar.kind == "tokens" or self._kept(grammar, key) is not None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of the grammar. Raises GrammarError."""
        if grammar.kind == "tokens":
            return self._forced(grammar)
        name = _name(grammar)
        with self._lock:
            all_ = [kept[name] for kept in self._by_key.values() if name in kept]
        known = next((c for c in all_ if not c.over), all_[0] if all_ else None)
        compiled = known if known is not None else self._compiled(grammar)
        vocabulary, ends = self._vocabulary
        return GrammarMatcher(compiled, vocabulary.vocab_size, ends)

    def _kept(self, grammar: Grammar, key: str) -> _Compiled | None:
        with self._lock:
            kept = self._by_key.get(key, OrderedDict())
            compiled = kept.get(_name(grammar))
            if compiled is not None:
                compiled.asked[id(grammar)] = grammar
                kept.move_to_end(_name(grammar))
            return compiled

    def _check_held(self, grammar: Grammar, key: str) -> None:
        """Raises GrammarError for one too many of a key: its sessions would fill the memory."""
        with self._lock:
            held = [name for name, c in self._by_key.get(key, OrderedDict()).items() if c.asked]
        if _size(held) + len(grammar.source) > MOST_HELD:
            raise GrammarError(
                f"the open sessions of this key have {len(held)} different grammars, and with this one they would have "
                f"more than {MOST_HELD} bytes; try again when some have ended"
            )

    def _check_named(self, source: str) -> None:
        """Raises GrammarError for tokens of text by number: llguidance loses its place among them on its way back from
        a draft. Control tokens may be named so."""
        for inner in _BY_NUMBER.findall(source):
            n = int(inner) if inner.isdecimal() and len(inner) < 10 else -1
            if not 0 <= n < self._tokenizer.n_vocab or self._tokenizer.piece(n):
                raise GrammarError(f"<[{inner[:40]}]>: only a control token can be named by its number")

    def _forced(self, grammar: Grammar) -> ForcedTokens:
        """Not by llguidance: see `_check_named`."""
        return ForcedTokens(grammar.source, self._tokenizer.n_vocab, self._tokenizer.eos)

    def _compiled(self, grammar: Grammar) -> _Compiled:
        if grammar.kind == "lark":
            self._check_named(grammar.source)
        library = _library()
        if library is None:
            raise GrammarError(MISSING)
        with self._making:
            vocabulary, _ = self._vocabulary
        own = Grammar(grammar.kind, grammar.source)  # a copy: `asked` watches the life of the session's
        return _Compiled(lambda: self._made(library, vocabulary, own))

    def _made(self, library: Any, vocabulary: Any, grammar: Grammar) -> Any:
        """An LLMatcher. Raises GrammarError."""
        try:
            source = _source(library, grammar)
            limits = library.LLParserLimits(**LIMITS, verbose_errors=False)
            matcher = library.LLMatcher(vocabulary, source, log_level=0, limits=limits)
        except (ValueError, RecursionError) as error:
            raise GrammarError(_short(str(error))) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, and no Exception
                raise
            raise GrammarError("llguidance cannot compile this grammar") from None
        if matcher.is_error():
            raise GrammarError(_short(matcher.get_error()))
        return matcher

    @cached_property
    def _vocabulary(self) -> tuple[Any, frozenset[int]]:
        """llguidance's form of the tokenizer, made once in 0.8 s for 152,000 ids; and the ids that end a text."""
        tokenizer = self._tokenizer
        names = {}
        for text in tokenizer.controls:
            ids = tokenizer.encode(text, add_bos=False, parse_special=True)
            if len(ids) == 1:
                names[ids[0]] = text.encode()
        # 0xFF, which no text has, marks tokens that are no text.
        tokens = [
            tokenizer.piece(i) or b"\xff" + names.get(i, b"<|%d|>" % i) for i in range(tokenizer.n_vocab)
        ]
        ends = frozenset(end for end in tokenizer.eos if end < tokenizer.n_vocab)
        if not ends:
            raise GrammarError(NO_END)
        wrapper = _Wrapper(tokenizer, tokens, min(ends))
        return _library().LLTokenizer(wrapper, eos_token=sorted(ends)), ends


class _Wrapper:
    """What llguidance wants of a tokenizer."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], end: int) -> None:
        self._tokenizer = tokenizer
        self.tokens, self.eos_token_id = tokens, end
        self.special_token_ids = [i for i, token in enumerate(tokens) if token[:1] == b"\xff"]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_bos=False, parse_special=False)


class GrammarMatcher:
    """A place in a grammar (`core.protocol.edits.Matcher`)."""

    def __init__(self, compiled: _Compiled, size: int, ends: frozenset[int]) -> None:
        """Raises GrammarError for a grammar that is over."""
        self._compiled = compiled
        self._begin()
        self._ends = ends
        self._size = size
        self._words = (size + 31) // 32
        self._only_ends = np.zeros(self._words, np.uint32)
        for end in ends:
            self._only_ends[end // 32] |= np.uint32(1 << (end % 32))

    def masks(self, before: Sequence[int], draft: Sequence[int]) -> list[Bits]:
        """See `core.protocol.edits.Matcher`. Behind an end, and behind tokens that the grammar does not have, only
        ends can be chosen.

        Raises GrammarError where a grammar that nobody else has used exceeds a limit, too.
        """
        if self._number != self._compiled.number:
            self._begin()
        try:
            return self._masks(before, draft)
        except _TooMuchError as error:
            self._compiled.renew(self._number, str(error))
        self._begin()
        try:
            return self._masks(before, draft)
        except _TooMuchError as error:
            self._compiled.renew(self._number, str(error))
            raise GrammarError(_too_much(str(error))) from None

    def _begin(self) -> None:
        """At the beginning of the text."""
        self._compiled.check()
        self._number = self._compiled.number
        self._matcher = self._compiled.matcher.deep_copy()
        self._taken: list[int] = []  # by the grammar

    def _masks(self, before: Sequence[int], draft: Sequence[int]) -> list[Bits]:
        self._compiled.check()
        text = self._text(before)
        if len(text) < len(before) or not self._go_to(text):
            return self._ending(draft)
        inner = self._text(draft)
        masks = self._along(inner)
        for i, token in enumerate(inner):
            if not _has(masks[i], token):
                return masks[: i + 1]
        last = masks[-1]
        if len(inner) < len(draft) and _has(last, draft[len(inner)]):
            return masks + self._ending(draft[len(inner) + 1 :])
        return masks

    def _text(self, tokens: Sequence[int]) -> list[int]:
        """Those before the first end, and before what llguidance takes for an error: ids that it does not know."""
        size, ends = self._size, self._ends
        stop = next((i for i, token in enumerate(tokens) if token in ends or token >= size), len(tokens))
        return list(tokens[:stop])

    def _ending(self, draft: Sequence[int]) -> list[Bits]:
        """Masks once the text is over."""
        n = next((i for i, token in enumerate(draft) if token not in self._ends), len(draft))
        return [self._only_ends] * (n + 1)

    def _go_to(self, text: list[int]) -> bool:
        """Take the grammar to the place after `text`. False if that leaves it."""
        taken = self._taken
        keep = min(len(taken), len(text))
        if taken[:keep] != text[:keep]:
            keep = next(i for i in range(keep) if taken[i] != text[i])
        if keep < len(taken):
            self._matcher.rollback(len(taken) - keep)
        new = text[keep:]
        n = self._matcher.try_consume_tokens(new) if new else 0
        self._taken = text[: keep + n]
        self._check()
        return n == len(new)

    def _along(self, draft: list[int]) -> list[Bits]:
        rows = np.zeros((len(draft) + 1, self._words), np.uint32)
        if draft:
            asked = [(self._matcher, 0, draft)]
            _executor().unsafe_compute_mask_ptr_with_draft_token(
                asked, rows.ctypes.data, 4 * self._words, len(rows)
            )
        else:
            self._matcher.unsafe_compute_mask_ptr(rows.ctypes.data, 4 * self._words)
        self._check()
        return [row if row.any() else self._only_ends for row in rows]

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _TooMuchError(_short(self._matcher.get_error()))


def _name(grammar: Grammar) -> _Name:
    """What is compiled of it; where it begins is another matter."""
    return grammar.kind, grammar.source


def _size(names: Iterable[_Name]) -> int:
    """Bytes of these sources, or nearly."""
    return sum(len(source) for _, source in names)


def _forget(kept: OrderedDict[K, V], full: Callable[[], bool], unused: Callable[[V], bool]) -> None:
    """While it is full drop the oldest, if they are unused, but never the newest."""
    for name in list(kept)[:-1]:
        if not full():
            return
        if unused(kept[name]):
            del kept[name]


@cache
def _executor() -> Any:
    return _library().LLExecutor(num_threads=1)


def _has(mask: Bits, token: int) -> bool:
    return token // 32 < len(mask) and bool(int(mask[token // 32]) >> (token % 32) & 1)


def _source(library: Any, grammar: Grammar) -> str:
    """In llguidance's own form. Raises GrammarError or ValueError."""
    kind, source = grammar.kind, grammar.source
    if kind == "json_object":
        return _json(library, {"type": "object"})
    if kind == "json_schema":
        schema = _read(source, "the schema")
        check_schema(schema)
        return _json(library, schema)
    if kind == "choice":
        choices = _read(source, "the choices")
        if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
            raise GrammarError("choices must be a list of strings that are not empty")
        return str(library.grammar_from("choice", source))
    if kind == "regex":
        return str(library.LLMatcher.grammar_from_regex(source))
    check_lark(source)
    try:
        return str(library.grammar_from("grammar", source))  # takes GBNF, too
    except ValueError:
        raise
    except Exception as error:  # the converter's own
        raise GrammarError(f"neither a Lark grammar nor GBNF: {_short(str(error))}") from None


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


def _too_much(why: str) -> str:
    return f"the grammar takes too much work: {why}"


def _short(message: str) -> str:
    return " ".join(message.split())[:400]
