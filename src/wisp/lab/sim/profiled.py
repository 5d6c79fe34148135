"""What `wisp profile` finds for a hardware profile: the grid of configurations, and the fit."""

from __future__ import annotations

import functools
import itertools

from wisp.core.cost import Coefficients, Load, fit
from wisp.engines.emulated import Hardware


def grid(limit_tokens: int, slots: int, kv_tokens: int) -> list[tuple[int, int, int]]:
    """(sequences, new tokens each, cached tokens each) that fit."""
    cells = itertools.product((1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 3, 5, 8, 16), (0, 64, 256, 1024, 4096))
    chunks = itertools.product((1, 2, 4), (64, 128, 256, 512, 1024), (0, 256, 1024))
    return [
        (n, new, cached)
        for n, new, cached in (*cells, *chunks)
        if n <= slots and n * new <= limit_tokens and n * (new + cached) <= kv_tokens
    ]


@functools.lru_cache(maxsize=16)
def profiled(profile: Hardware) -> Coefficients:
    """Coefficients fitted to the profile's own times."""
    cells = grid(profile.step_tokens, profile.slots, profile.kv_tokens)
    loads = [Load(n * new, n * new * (cached + new), n * cached) for n, new, cached in cells]
    return fit(loads, [profile.step_ms(c[0], *load) for c, load in zip(cells, loads, strict=True)])
