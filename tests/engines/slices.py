"""Slices of one session, for the tests of what engines do with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice, SliceResult
from wisp.engines.base import TargetEngine

PROMPT = [11, 12, 13, 14, 15]
SAMPLING = Sampling(temperature=1.0, seed=4)


class Target(TargetEngine, Protocol):
    """An engine that tells what it holds."""

    def held(self, slot: int) -> int: ...
    def clear(self) -> None: ...
    def run(self, batch: Sequence[Slice]) -> list[SliceResult]: ...


def other(token: int) -> int:
    return token - 1 if token else 1


def verify(slot: int, draft: list[int], *, start: int = 0, **more: Any) -> Slice:
    return Slice(1, slot, start, PROMPT[start:] + draft, len(draft), sampling=SAMPLING, **more)
