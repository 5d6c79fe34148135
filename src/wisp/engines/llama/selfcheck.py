"""The engine's self-test at start-up: on the model that it has loaded, through the same `run` that serves.

A few dozen positions cannot prove a mode exact (`proof.prove_exact` does more), but what breaks exactness is a
kernel chosen by the *shape* of a batch, not by its values: one call of each shape is nearly as telling as many.
Not covered, for being too slow here: contexts beyond 256 tokens, where a single query row is split differently.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from wisp.core.errors import EngineError, ModelError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import NOT_FINITE, Copy, Slice, SliceResult
from wisp.engines.llama.context import Context, Logits, Tokens
from wisp.engines.slots import NONSENSE

_PROMPT, _NEW = 9, 11  # tokens; about 75 rows are evaluated in all
_SAMPLING = Sampling(temperature=1.0, seed=1)  # greedy text repeats itself, and repeats test little
_LENGTH, _POSITIONS, _TOP = 72, 15, 16  # beyond 64 rows flash attention is tiled
_FLOOR = 1e-3  # float32 sums of another order


class Checked(Protocol):
    """The part of LlamaTarget that is used here."""

    @property
    def slots(self) -> int: ...
    @property
    def context(self) -> Context: ...
    def copy(self, copy: Copy) -> None: ...
    def observe(self, slices: list[Slice]) -> tuple[list[SliceResult], dict[tuple[int, int], Logits]]: ...


def _some_tokens(n: int, n_vocab: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(7).integers(0, n_vocab, n)]


def check(engine: Checked) -> str:
    """Why this engine is not exact, in words, or "" if two ways of evaluating the same text agree in every bit.

    Raises ModelError for a model that computes what is not finite.
    """
    try:
        return _check(engine)
    except EngineError as error:
        return f"the check at start-up failed ({error})"


def _check(engine: Checked) -> str:
    prompt = _some_tokens(_PROMPT, engine.context.n_vocab)
    last, n = engine.slots - 1, len(prompt)
    # Slot 0: the prompt, then token by token.
    seen: dict[int, Logits] = {}
    text, start = list(prompt), 0
    for position in range(_NEW + 1):
        [result], logits = engine.observe([Slice(0, 0, start, text[start:], 0, True, position, _SAMPLING)])
        _require(result)
        seen |= {place: row for (_, place), row in logits.items()}
        start = len(text)
        text += result.tokens
    draft = text[n : n + _NEW]
    wrong = [*draft[:4], (draft[4] + 1) % engine.context.n_vocab, *draft[5:7]]
    # Last slot: the prompt in other pieces with a draft that is wrong in the middle, then the right one; and beside
    # it slot 0 once more, cut back into the prompt. Then the last slot from a copied prefix of slot 0.
    steps = [
        [Slice(1, last, 0, prompt[:4], sample=False)],
        [Slice(1, last, 4, prompt[4:] + wrong, len(wrong), True, 0, _SAMPLING)],
        [Slice(1, last, n + 4, draft[4:], _NEW - 5, True, 5, _SAMPLING)],
    ]
    if last > 0:
        steps[1].append(Slice(0, 0, n - 2, text[n - 2 : n + 4], 4, True, 0, _SAMPLING))
        steps.append([Slice(1, last, n, draft[:3], 2, True, 1, _SAMPLING)])
    for number, step in enumerate(steps):
        if number == 3:
            engine.copy(Copy(0, last, n))
        results, logits = engine.observe(step)
        for work, result in zip(step, results, strict=True):
            _require(result)
            if result.tokens != text[n + work.position :][: len(result.tokens)]:
                return "another batch shape chose other tokens"
        differing = sum(not np.array_equal(row, seen[place]) for (_, place), row in logits.items())
        if differing:
            return f"{differing} of {len(logits)} positions differ between batch shapes"
    return ""


def _require(result: SliceResult) -> None:
    if result.code == NOT_FINITE:
        raise ModelError(NONSENSE)
    if result.error:
        raise EngineError(result.error)


def measure_flip_gap(context: Context) -> float:
    """How close two logits must be to change places between batch shapes: a measured figure, not a bound.

    The same tokens are evaluated in as few calls as there can be, and in narrow calls ending in single rows. At each of
    the last positions take the `_TOP` ids of largest logit; the result is the largest change, over positions, of the
    distance between any two of them, times 1.5 for positions not looked at. Never below `_FLOOR`. Raises ModelError
    for a model that computes what is not finite.
    """
    tokens: Tokens = np.array(_some_tokens(_LENGTH, context.n_vocab), np.int32)
    full, rest = divmod(_LENGTH, context.rows)
    wide = _evaluate(context, tokens, [context.rows] * full + [rest] * (rest > 0))
    narrow = _evaluate(context, tokens, [3] * ((_LENGTH - _POSITIONS) // 3) + [1] * _POSITIONS)
    if not (np.isfinite(wide).all() and np.isfinite(narrow).all()):
        raise ModelError(NONSENSE)
    top = np.argpartition(wide, -_TOP, axis=1)[:, -_TOP:] if context.n_vocab > _TOP else np.argsort(wide)
    change = np.take_along_axis(wide - narrow, top, axis=1)
    return max(_FLOOR, 1.5 * float((change.max(axis=1) - change.min(axis=1)).max()))


def _evaluate(context: Context, tokens: Tokens, calls: list[int]) -> Logits:
    """Logits of the last `_POSITIONS` of `tokens`, evaluated in slot 0 in calls of so many rows."""
    context.drop(0)
    rows: list[Logits] = []
    first = 0
    for count in calls:
        wanted = min(count, max(0, first + count - (len(tokens) - _POSITIONS)))
        context.add(0, first, tokens[first : first + count], wanted)
        rows.extend(context.decode().copy())
        first += count
    context.drop(0)
    return np.array(rows)
