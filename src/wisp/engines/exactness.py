"""Do a position's logits keep every bit, whatever shares its step? A self-test of a loaded model, on any engine.

Logits of single rows, one a step and alone, are held against those of the same rows along drafts, alone and beside
others, with the prompt read in chunks of other sizes. One bit that differs is enough to refuse exact mode: rounding
that moves a bit here decides between two close scores elsewhere.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from wisp.core.errors import EngineError
from wisp.core.protocol.step import Slice, SliceResult
from wisp.engines.base import EngineInfo

DRAFTS = (1, 2, 4, 8)  # tokens
PROMPT, FIRST = 40, 9  # tokens, and in the first chunk of it beside others
CROWDS = (0, 1, 2, 6, 30, 126)  # others in the step, as far as there are slots


class Observed(Protocol):
    """An engine whose logits can be looked at."""

    @property
    def info(self) -> EngineInfo: ...
    def observe(self, batch: list[Slice]) -> list[tuple[SliceResult, Any]]:
        """A step: each result, with the logits of its sampled rows (float32 [rows, vocabulary])."""

    def clear(self) -> None: ...


def difference(engine: Observed) -> str:
    """Where bits first differ, in words; "" if every one is kept. Raises EngineError if a step fails."""
    info = engine.info
    longest = min(DRAFTS[-1], info.slot_tokens - PROMPT - 1, info.step_tokens - 2)
    prompt = [int(t) for t in np.random.default_rng(11).integers(0, info.n_vocab, PROMPT)]
    engine.clear()
    tokens, alone = _alone(engine, prompt, longest + 1)
    for crowd in (n for n in CROWDS if n < info.slots):
        for k in (0, *(k for k in DRAFTS if k <= longest)):
            if (crowd + 1) * (k + 1) > info.step_tokens:
                continue
            engine.clear()
            rows = _along(engine, prompt, tokens[:k], crowd)
            for i, row in enumerate(rows):
                if not np.array_equal(row, alone[i]):
                    gap = float(np.max(np.abs(np.asarray(row, np.float64) - alone[i])))
                    return _said(k, crowd, gap)
    engine.clear()
    return ""


def _alone(engine: Observed, prompt: list[int], n: int) -> tuple[list[int], list[Any]]:
    """The likeliest tokens after the prompt, and their logits: one row a step, nobody else in it."""
    tokens: list[int] = []
    logits = []
    start, feed = 0, prompt
    for position in range(n):
        [(result, rows)] = _observed(engine, [Slice(-1, 0, start, feed, 0, True, position)])
        tokens.append(result.tokens[0])
        logits.append(np.array(rows[0]))
        start, feed = start + len(feed), result.tokens
    return tokens, logits


def _along(engine: Observed, prompt: list[int], draft: list[int], crowd: int) -> Any:
    """Logits [draft and one more, vocabulary] of the same positions in one step, in the last slot that takes part.

    Others hold the prompt's first tokens, so many or so many, are read in the same steps, and verify the same draft.
    """
    texts = [*(prompt[: 3 + (7 * i) % (PROMPT - 4)] for i in range(crowd)), prompt]
    room = max(1, engine.info.step_tokens // len(texts))
    ends = [min(FIRST, room)]
    while ends[-1] < PROMPT - 1:
        ends.append(min(ends[-1] + room, PROMPT - 1))
    for start, end in zip((0, *ends), ends, strict=False):
        _observed(
            engine,
            [_chunk(slot, text, start, end) for slot, text in enumerate(texts) if len(text) - 1 > start],
        )
    work = [
        Slice(-1 - slot, slot, len(text) - 1, [text[-1], *draft], len(draft), True)
        for slot, text in enumerate(texts)
    ]
    return _observed(engine, work)[-1][1]


def _chunk(slot: int, text: list[int], start: int, end: int) -> Slice:
    """Of a text to be read, all but its last token."""
    return Slice(-1 - slot, slot, start, text[start : min(end, len(text) - 1)], sample=False)


def _observed(engine: Observed, batch: list[Slice]) -> list[tuple[SliceResult, Any]]:
    done = engine.observe(batch)
    for result, _ in done:
        if result.error:
            raise EngineError(f"the self-test of exact mode failed: {result.error}")
    return done


def _said(k: int, crowd: int, gap: float) -> str:
    rows = f"a row along {k} draft token{'s' if k > 1 else ''}" if k else "a single row"
    where = f"beside {crowd} other{'s' if crowd > 1 else ''}" if crowd else "alone in its step"
    return f"{rows} {where} has other logits than it has by itself (by up to {gap:.2g})"
