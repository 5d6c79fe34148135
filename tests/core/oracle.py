"""The optimal plan for strict due times: exact, slow, for small instances.

A step costs a fixed time plus what each piece in it costs. Every piece has forms (seconds, tokens); one that is
delivered by its due time is worth the tokens of the form that was run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wisp.core.verify.batching import Candidate, Kind
from wisp.core.verify.batching.deadlines import curve
from wisp.core.verify.cost import Coefficients, Load


class Form(NamedTuple):
    """One way to run a piece: seconds added to a step, and tokens delivered."""

    seconds: float
    tokens: float


class Piece(NamedTuple):
    """A piece: its due time and its forms."""

    due: float
    forms: tuple[Form, ...]


class Best(NamedTuple):
    """Most tokens delivered in time, and most pieces with that many tokens."""

    tokens: float
    pieces: int


EPS = 1e-9


def piece(w: Candidate, cost: Coefficients) -> Piece:
    """All forms of a candidate: a draft may be cut to any length, a prompt runs whole."""

    def seconds(new: int) -> float:
        return (cost.ms(Load().plus(new, w.cached)) - cost.step) / 1e3

    if w.kind is not Kind.VERIFY:
        return Piece(w.due, (Form(seconds(w.new), w.expected_tokens),))
    return Piece(
        w.due, tuple(Form(seconds(w.new - w.n_draft + k), value(w, k)) for k in range(w.n_draft + 1))
    )


def value(w: Candidate, kept: int) -> float:
    """Expected tokens of a candidate with `kept` draft tokens."""
    return w.expected_tokens if kept == w.n_draft else curve(w.n_draft, round(w.expected_tokens, 2))[kept]


def best(now: float, fixed: float, pieces: Sequence[Piece]) -> Best:
    """By dynamic programming over pieces in due order: each is left out, joins the open step, or opens the next one.

    That due order suffices is checked against `enumerate_all`. A state is (end of the open step, the due time that
    binds it, tokens, pieces); one that another beats in everything is dropped.
    """
    states = {(now, -math.inf): [(0.0, 0)]}
    for p in sorted(pieces, key=lambda p: p.due):
        grown: dict[tuple[float, float], list[tuple[float, int]]] = {k: list(v) for k, v in states.items()}
        for (end, bound), worth in states.items():
            for form in p.forms:
                reached = []
                if end + form.seconds <= bound + EPS:
                    reached.append((end + form.seconds, bound))
                if end + fixed + form.seconds <= p.due + EPS:
                    reached.append((end + fixed + form.seconds, p.due))
                for key in reached:
                    grown.setdefault(key, []).extend((t + form.tokens, n + 1) for t, n in worth)
        states = _undominated(grown)
    return max(Best(round(t, 9), n) for worth in states.values() for t, n in worth)


def _undominated(
    states: dict[tuple[float, float], list[tuple[float, int]]],
) -> dict[tuple[float, float], list[tuple[float, int]]]:
    flat = sorted({(end, -bound, -t, -n) for (end, bound), worth in states.items() for t, n in worth})
    kept: list[tuple[float, float, float, int]] = []
    for s in flat:
        if not any(k[1] <= s[1] and k[2] <= s[2] and k[3] <= s[3] for k in kept):
            kept.append(s)
    out: dict[tuple[float, float], list[tuple[float, int]]] = {}
    for end, bound, t, n in kept:
        out.setdefault((end, -bound), []).append((-t, -n))
    return out


def enumerate_all(now: float, fixed: float, pieces: Sequence[Piece]) -> Best:
    """By trying every sequence of steps: for tiny instances, to check `best`."""
    found = Best(0.0, 0)
    for chosen in _choices(len(pieces)):
        if not chosen:
            continue
        tokens = seconds = 0.0
        delivered = 0
        for i, f in chosen:
            tokens += pieces[i].forms[f].tokens
            seconds += pieces[i].forms[f].seconds
        end = now + fixed + seconds
        rest = [p for i, p in enumerate(pieces) if i not in {i for i, _ in chosen}]
        if all(end <= pieces[i].due + EPS for i, _ in chosen):
            delivered = len(chosen)
            later = enumerate_all(end, fixed, rest)
            found = max(found, Best(round(tokens + later.tokens, 9), delivered + later.pieces))
    return found


def _choices(n: int, forms: int = 2) -> Iterator[list[tuple[int, int]]]:
    """Every non-empty or empty subset of n pieces, each in each of its first `forms` forms."""
    if n == 0:
        yield []
        return
    for rest in _choices(n - 1, forms):
        yield rest
        for f in range(forms):
            yield [*rest, (n - 1, f)]
