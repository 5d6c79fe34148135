"""SLOs, and the one definition of attainment and goodput.

TTFT runs from the request to the first token out, TPOT is (last token out - first token out) / (tokens - 1). Both are
measured at the user's end. A request meets its SLO if both are within target; an answer of one token has only a TTFT.
Every request counts: one that failed, was refused, or is unfinished and behind has missed its SLO.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

LONGEST_MS = 1e9  # longest target: eleven days


class Slo(msgspec.Struct, frozen=True, array_like=True):
    """Targets in milliseconds; 0 means "none"."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0


class Served(msgspec.Struct, frozen=True):
    """The outcome of one request. Times in seconds on one clock. With 0 tokens, `first` and `last` mean nothing.

    `ended`: time of its end, None while unfinished. `ok`: False if it failed or was refused.
    """

    arrived: float
    first: float
    last: float
    tokens: int
    slo: Slo
    ended: float | None
    ok: bool = True

    @property
    def ttft_ms(self) -> float:
        """Time to first token, ms."""
        return (self.first - self.arrived) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first, ms; 0.0 for fewer than two tokens."""
        return (self.last - self.first) * 1e3 / (self.tokens - 1) if self.tokens > 1 else 0.0


def met(request: Served, now: float) -> bool:
    """Has the request met its SLO, or does it so far (if unfinished), at time `now`?"""
    if not request.ok:
        return False
    slo = request.slo
    if request.tokens == 0:
        waited_ms = (now - request.arrived) * 1e3
        return request.ended is None and not (slo.ttft_ms and waited_ms > slo.ttft_ms)
    if slo.ttft_ms and request.ttft_ms > slo.ttft_ms:
        return False
    if not slo.tpot_ms:
        return True
    if request.ended is not None:
        return request.tpot_ms <= slo.tpot_ms
    return (now - request.first) * 1e3 <= request.tokens * slo.tpot_ms  # the next token is not overdue


class Account(msgspec.Struct, frozen=True):
    """Attainment and goodput of a window. Rates of an empty window are nan, for which no comparison is true."""

    arrived: int
    met: int
    violation_rate: float
    goodput: float  # output tokens of met requests per second of window

    @property
    def attainment(self) -> float:
        """Share of the requests that met their SLO."""
        return 1.0 - self.violation_rate


def account(requests: Iterable[Served], start: float, end: float, now: float) -> Account:
    """Count the requests that arrived in [start, end), in their state at `now` (after draining)."""
    window = [r for r in requests if start <= r.arrived < end]
    good = [r for r in window if met(r, now)]
    return Account(
        arrived=len(window),
        met=len(good),
        violation_rate=1.0 - len(good) / len(window) if window else math.nan,
        goodput=sum(r.tokens for r in good) / (end - start),
    )
