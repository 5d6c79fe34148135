"""The vLLM engine's self-test at every start: it checks that our hooks still work.

Tokens at positions are chosen once one by one, and once along drafts: a right one, a wrong one, with another
sequence beside them, across a rollback, and after blocks were given up. Logits must be the same but for rounding,
and tokens what the rule makes of them; how close scores must be for rounding to decide is measured along the way.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from wisp.core.errors import ConfigError, ModelError
from wisp.core.protocol.sampling import Sampling, target_token
from wisp.core.protocol.step import NOT_FINITE, Slice, SliceResult
from wisp.engines.base import EngineInfo
from wisp.engines.slots import NONSENSE

_PROMPT, _NEW = 40, 12  # tokens
_TOP = 16  # likeliest ids of a row, whose distances are compared
_FLOOR = 1e-3  # least gap, in logits: what was measured on so few rows may be none
_SAMPLINGS = (Sampling(), Sampling(temperature=1.0, seed=1))


class Tested(Protocol):
    """The part of VllmTarget that is used here."""

    @property
    def info(self) -> EngineInfo: ...
    def observe(self, batch: list[Slice]) -> list[tuple[SliceResult, Any]]: ...
    def clear(self) -> None: ...


def check(engine: Tested) -> float:
    """How close two scores must be to change places between batch shapes, measured.

    Raises ConfigError if drafts change what is said by more than such ties, ModelError for a model that computes what
    is not finite.
    """
    info = engine.info
    size = min(_PROMPT, info.slot_tokens - _NEW - 4)
    prompt = [int(t) for t in np.random.default_rng(7).integers(0, info.n_vocab, size)]
    gap = _FLOOR
    for sampling in _SAMPLINGS:
        plain = _plain(engine, prompt, sampling)
        gap = max(gap, _drafted(engine, prompt, plain, sampling))
    engine.clear()
    return gap


def _plain(engine: Tested, prompt: list[int], sampling: Sampling) -> list[tuple[int, Any]]:
    """(token, logits) at each position, one token a step in slot 0."""
    said: list[tuple[int, Any]] = []
    start, feed = 0, prompt
    for position in range(_NEW):
        [(result, rows)] = engine.observe([Slice(-1, 0, start, feed, 0, True, position, sampling)])
        _require(result)
        said.append((result.tokens[0], rows[0]))
        start, feed = start + len(feed), result.tokens
    return said


def _drafted(engine: Tested, prompt: list[int], plain: list[tuple[int, Any]], sampling: Sampling) -> float:
    """The same along drafts in the last slot, beside slot 0 where there are two."""
    engine.clear()
    n, last = len(prompt), engine.info.slots - 1
    right = [token for token, _ in plain]
    wrong = [*right[:3], (right[3] + 1) % engine.info.n_vocab, *right[4:6]]
    steps = [
        Slice(-2, last, 0, prompt[:9], sample=False),
        Slice(-2, last, 9, prompt[9:] + wrong, len(wrong), True, 0, sampling),
        Slice(-2, last, n + 3, right[3:-1], len(right) - 5, True, 4, sampling),
        Slice(-2, last, 5, prompt[5:] + right[:4], 4, True, 0, sampling),
    ]
    gap = _FLOOR
    for work in steps:
        beside = [Slice(-3, 0, 0, prompt[: 7 + work.start % 5], sampling=sampling)] if last else []
        (result, rows), *_ = engine.observe([work, *beside])
        _require(result)
        for i, token in enumerate(result.tokens):
            there, logits = plain[work.position + i]
            gap = max(gap, _parted(rows[i], logits))
            if _unlike(rows[i], logits) or token != target_token(rows[i], sampling, work.position + i):
                raise ConfigError(
                    "the self-test of --engine vllm failed: a draft changed what the model says. Do not serve with "
                    "this combination of model, vLLM and device, and please report it"
                )
            if token != there:  # scores so close that rounding decided
                return gap
    return gap


def _parted(a: Any, b: Any) -> float:
    """The largest change of distance between any two of the likeliest ids, with a margin for rows not seen."""
    top = np.argsort(b)[-_TOP:]
    change = a[top] - b[top]
    return 1.5 * float(change.max() - change.min())


def _unlike(a: Any, b: Any) -> bool:
    """Are these the logits of different texts? Rounding, even of bfloat16, moves them by a few per cent at most."""
    return float(np.std(a - b)) > 0.2 * float(np.std(b))


def _require(result: SliceResult) -> None:
    if result.code == NOT_FINITE:
        raise ModelError(NONSENSE)
    if result.error:
        raise ConfigError(f"the self-test of --engine vllm failed: {result.error}")
