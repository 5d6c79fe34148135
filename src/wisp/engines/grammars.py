"""Grammars by llguidance: compiled once, remembered for each key, and followed token by token.

A *matcher* says which ids may come next after any tokens (`core.protocol.edits.Matcher`). It keeps its place in the
grammar: tokens that are there no longer are rolled back, new ones are taken in, and the masks along a draft come from
one call. It is used from one thread at a time, `Grammars` from any.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from wisp.core.errors import GrammarBusyError, GrammarError
from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.edits import Bits, Matcher
from wisp.core.protocol.reasoning import ReasoningEnd
from wisp.engines import grammar_library
from wisp.engines.base import Tokenizer
from wisp.engines.forced_tokens import ForcedTokens
from wisp.engines.grammar_library import MISSING, NO_TEXT, short
from wisp.engines.grammar_trial import TRIALS, Words, words

QUICK_S = 0.25  # of a core: a grammar that compiles faster may be compiled anew in the engine's thread
# So many are kept, or more where more are those of living sessions:
KEPT = 64  # compiled grammars of a key
KEPT_BYTES = 256 << 20  # that these take, as far as compiling shows
KEYS = 64  # keys with their grammars
MOST_BYTES = 2 << 30  # of all. Those of one key's living sessions may take as much as those of all leave free
MOST_ENDS = 16  # of reasoning that are remembered; models have one or two
NO_END = "this model has no end of sequence, so that no text of a grammar could come to an end"
_Name = tuple[str, str]  # kind and source
K = TypeVar("K")
V = TypeVar("V")
_BY_NUMBER = re.compile(r"<\[([^\]\n]*)\]>")


class _Compiled:
    """A grammar at its beginning: `matcher`, the `number`th of its kind. `over`: why it is of no use any more. `asked`:
    for whom it was compiled, those of them that are still alive; by identity, as equal ones may come and go.

    Matchers share what llguidance finds out about a grammar: that grows with all of their texts, up to a limit, and one
    that exceeds a limit leaves wrong entries there. So then the grammar is compiled anew, and all matchers go on with
    that. Where this would hold up the engine for long, all end instead: no text is better than another text.
    """

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        """size: the bytes that it takes. Raises GrammarError."""
        self.size = size
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
        self._ends: dict[tuple[int, ...], ReasoningEnd] = {}
        self._by_key: OrderedDict[str, OrderedDict[_Name, _Compiled]] = OrderedDict()

    def compile(self, grammar: Grammar, key: str = "") -> None:
        """See that `matcher` will find it compiled, at least as long as this very object lives: its session may have to
        wait for its turn, or lose it. `key`: whose it is, so that nobody can tell by the time what others ask for.
        Takes up to seconds, and lets other threads run meanwhile.

        Raises GrammarError, which names the keyword or the place that cannot be compiled; GrammarBusyError where that
        is not the grammar's fault.
        """
        if grammar.after:
            self.end(grammar.after)
        if grammar.kind == "tokens":
            self._forced(grammar)
            return
        if (known := self._kept(grammar, key)) is not None:
            known.check()
            return
        self._check_held(key)
        compiled = self._compiled(grammar)
        with self._lock:
            kept = self._by_key.setdefault(key, OrderedDict())
            self._by_key.move_to_end(key)
            compiled = kept.setdefault(_name(grammar), compiled)  # another thread may have been faster
            compiled.asked[id(grammar)] = grammar
            _forget(
                kept, lambda: len(kept) > KEPT or _size(kept.values()) > KEPT_BYTES, lambda c: not c.asked
            )
            keys = self._by_key
            _forget(keys, lambda: len(keys) > KEYS, lambda k: not any(c.asked for c in k.values()))
            self._forget_unused(sum(_size(k.values()) for k in keys.values()) - MOST_BYTES)

    def ready(self, grammar: Grammar, key: str) -> bool:
        """Has it been compiled for this key, and its `after` looked up? If so it stays, as after `compile`."""
        if grammar.after and grammar.after not in self._ends:
            return False
        return grammar.kind == "tokens" or self._kept(grammar, key) is not None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of the grammar. Raises GrammarError."""
        if grammar.kind == "tokens":
            return self._forced(grammar)
        name = _name(grammar)
        with self._lock:
            all_ = [kept[name] for kept in self._by_key.values() if name in kept]
        known = next((c for c in all_ if not c.over), all_[0] if all_ else None)
        found = known if known is not None else self._compiled(grammar)
        vocabulary, ends, _ = self._vocabulary
        return GrammarMatcher(found, vocabulary.vocab_size, ends)

    def end(self, after: tuple[int, ...]) -> ReasoningEnd:
        """See `core.protocol.edits.Matchers`. A new one takes 0.1 to 0.2 s with 152,000 ids. Raises GrammarError."""
        with self._making:
            found = self._ends.pop(after, None) or ReasoningEnd(after, self._pieces)
            self._ends[after] = found  # the last that was used is the last to be forgotten
            if len(self._ends) > MOST_ENDS:
                del self._ends[next(iter(self._ends))]
            return found

    def _kept(self, grammar: Grammar, key: str) -> _Compiled | None:
        with self._lock:
            kept = self._by_key.get(key, OrderedDict())
            compiled = kept.get(_name(grammar))
            if compiled is not None:
                compiled.asked[id(grammar)] = grammar
                kept.move_to_end(_name(grammar))
            return compiled

    def _forget_unused(self, too_much: int) -> None:
        """Of so many bytes, if there are any: of the key that compiled longest ago first."""
        for kept in self._by_key.values():
            for name in list(kept):
                if too_much <= 0:
                    return
                if not kept[name].asked:
                    too_much -= kept.pop(name).size

    def _check_held(self, key: str) -> None:
        """Raises GrammarBusyError where sessions of this key hold as much memory as all leave free.

        So one key alone may have half of it, two a third each, and some is always left for one that has none.
        """
        with self._lock:
            held = {k: [c for c in kept.values() if c.asked] for k, kept in self._by_key.items()}
        own = held.get(key, [])
        if _size(own) > MOST_BYTES - sum(map(_size, held.values())):
            raise GrammarBusyError(
                f"the open sessions of this key have {len(own)} different grammars, of {_size(own) >> 20} MiB, "
                "and no more than that is free; try again when some have ended"
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
        if grammar_library.library() is None:
            raise GrammarError(MISSING)
        with self._making:
            vocabulary, _, short_form = self._vocabulary
        own = Grammar(grammar.kind, grammar.source)  # a copy: `asked` watches the life of the session's
        size = TRIALS.run(short_form, own) if own.kind != "json_object" else 0
        return _Compiled(lambda: grammar_library.compiled(vocabulary, own), size + len(own.source))

    @cached_property
    def _pieces(self) -> list[bytes]:
        """What each id says; b"" for tokens that are no text."""
        return [self._tokenizer.piece(i) for i in range(self._tokenizer.n_vocab)]

    @cached_property
    def _vocabulary(self) -> tuple[Any, frozenset[int], Words]:
        """llguidance's form of the tokenizer, made once in 0.8 s for 152,000 ids; the ids that end a text; and the
        form in which grammars are tried."""
        tokenizer = self._tokenizer
        names = {}
        for text in tokenizer.controls:
            ids = tokenizer.encode(text, add_bos=False, parse_special=True)
            if len(ids) == 1:
                names[ids[0]] = text.encode()
        tokens = [p or NO_TEXT + names.get(i, b"<|%d|>" % i) for i, p in enumerate(self._pieces)]
        ends = frozenset(end for end in tokenizer.eos if end < tokenizer.n_vocab)
        if not ends:
            raise GrammarError(NO_END)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_bos=False, parse_special=False)

        return grammar_library.vocabulary(tokens, sorted(ends), encode), ends, words(tokens, ends)


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
            raise _TooMuchError(short(self._matcher.get_error()))


def _name(grammar: Grammar) -> _Name:
    """What is compiled of it; where it begins is another matter."""
    return grammar.kind, grammar.source


def _size(grammars: Iterable[_Compiled]) -> int:
    return sum(c.size for c in grammars)


def _forget(kept: OrderedDict[K, V], full: Callable[[], bool], unused: Callable[[V], bool]) -> None:
    """While it is full drop the oldest, if they are unused, but never the newest."""
    for name in list(kept)[:-1]:
        if not full():
            return
        if unused(kept[name]):
            del kept[name]


@cache
def _executor() -> Any:
    return grammar_library.library().LLExecutor(num_threads=1)


def _has(mask: Bits, token: int) -> bool:
    return token // 32 < len(mask) and bool(int(mask[token // 32]) >> (token % 32) & 1)


def _too_much(why: str) -> str:
    return f"the grammar takes too much work: {why}"
