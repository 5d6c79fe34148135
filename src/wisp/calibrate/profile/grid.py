"""The steps that `wisp profile` times: sequences x new tokens x cached tokens, pieces of prompts, and mixtures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from wisp.core.verify.cost import Load

SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
NEW = (1, 2, 3, 5, 8, 16)  # a decode step, and drafts with the token before them
CHUNKS = (64, 128, 256, 512, 1024)
CACHED = (0, 64, 256, 1024, 4096)
QUICK = ((1, 2, 4, 16, 64), (1, 3, 8), (128, 512), (0, 256, 1024))


class EngineSize(NamedTuple):
    """An engine's limits: tokens in a step, slots, tokens in all slots and in each."""

    step_tokens: int
    slots: int
    kv_tokens: int
    slot_tokens: int


class Cell(NamedTuple):
    """One step: `sequences` slices of `new` tokens each behind `cached`, and a piece of a prompt of `chunk` tokens
    beside them, behind as many cached ones (0: none)."""

    sequences: int
    new: int
    cached: int
    chunk: int = 0

    @property
    def slices(self) -> int:
        return self.sequences + (self.chunk > 0)

    @property
    def load(self) -> Load:
        n, new, cached, chunk = self
        load = Load(n * new, n * new * (cached + new), n * cached, n)
        return load.plus(chunk, cached) if chunk else load

    def fits(self, size: EngineSize) -> bool:
        return (
            self.slices <= size.slots
            and self.load.new <= size.step_tokens
            and self.load.new + self.slices * self.cached <= size.kv_tokens
            and self.cached + max(self.new, self.chunk) < size.slot_tokens
        )


def cells(size: EngineSize, *, quick: bool = False) -> list[Cell]:
    """The steps to time, by cached tokens. All sizes are cut to the engine's limits."""
    chosen: Sequence[tuple[int, ...]] = QUICK if quick else (SEQUENCES, NEW, CHUNKS, CACHED)
    sequences, new, chunks, cached = chosen
    if size.slots not in sequences and size.slots < sequences[-1]:
        sequences = (*(n for n in sequences if n < size.slots), size.slots)
    whole = tuple(c for c in chunks if c <= size.step_tokens)
    if not whole:  # an engine whose steps are short takes prompts in pieces of that length
        whole = tuple(c for c in (16, 32, 64, size.step_tokens) if c <= size.step_tokens)
    found = [Cell(*c) for c in itertools.product(sequences, new, cached)]
    found += [Cell(*c) for c in itertools.product(sequences[:3], whole, cached)]
    mixed = itertools.product(sequences[1:], (1, 5), cached, whole[:2])
    found += [Cell(*c) for c in mixed]
    return sorted({c for c in found if c.fits(size)}, key=lambda c: (c.cached, c))
