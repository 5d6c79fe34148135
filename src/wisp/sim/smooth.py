"""How smoothly an answer came: gaps, stalls and late tokens, from the times at which its tokens were there.

Token i of an answer is *due* at first token + i x TPOT target, i from 0. A *stall* is the lateness of a token against
that. The first token is never late by this measure: TTFT is another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

ROUNDING_S = 1e-9  # of times that should be equal


class Pace(NamedTuple):
    """Of one answer. late: of `tokens`, the first one left out, those that came after they were due."""

    longest_gap_ms: float
    longest_stall_ms: float
    late: int
    tokens: int


def pace(heard: Sequence[tuple[float, int]], tpot_ms: float, waiting_until: float | None = None) -> Pace:
    """Of an answer with at least one token.

    heard:         (second, tokens by then) for each message that brought tokens, in order of time
    tpot_ms:       the target (0: none; then nothing is late)
    waiting_until: the present second if more is to come: a token that is missing is as late as it is by now
    """
    first = heard[0][0]
    gap = stall = 0.0
    late = 0
    for (before, known), (at, tokens) in pairwise(heard):
        if at - before > gap:
            gap = at - before
        if tpot_ms:
            passed = (at - first - ROUNDING_S) * 1e3 / tpot_ms  # tokens that were due by then
            if passed > known:
                late += min(math.ceil(passed) - known, tokens - known)
                stall = max(stall, (passed - known) * tpot_ms)
    if waiting_until is not None:
        last, known = heard[-1]
        gap = max(gap, waiting_until - last)
        if tpot_ms:
            stall = max(stall, (waiting_until - first) * 1e3 - known * tpot_ms)
    return Pace(gap * 1e3, stall, late, heard[-1][1] - 1)
