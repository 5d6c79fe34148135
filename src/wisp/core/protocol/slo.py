"""How service is counted: the one definition of met, violated and goodput.

TTFT runs from request received to first token out. Token speed is (tokens - 1) / (last token out - first
token out); TPOT is its inverse. Both are measured where the user sits. A request meets its SLO if TTFT and
TPOT are within target; an answer of one token has only a TTFT. Everything that arrived counts: a request that
failed, was refused, or is unfinished and behind has missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

LONGEST_MS = 1e9  # of a target: eleven days


class Slo(msgspec.Struct, frozen=True, array_like=True):
    """Targets in milliseconds; 0 means "none"."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0


class Served(msgspec.Struct, frozen=True):
    """What became of one request. Times in seconds on one clock; NaN-free: 0 tokens means "no token yet".

    `ended` is when it finished, or None while unfinished; `ok` is False if it failed or was refused.
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
    """Did (or, if unfinished, does so far) the request keep its SLO at time `now`?"""
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
    """Attainment and goodput of a window. Where nothing arrived, nothing was kept and nothing missed: rates are nan, of
    which no comparison is true."""

    arrived: int
    met: int
    violation_rate: float
    goodput: float  # output tokens of met requests per second of window

    @property
    def attainment(self) -> float:
        """Share of the arrived that met their SLO."""
        return 1.0 - self.violation_rate


def account(requests: Iterable[Served], start: float, end: float, now: float) -> Account:
    """Count the requests that arrived in [start, end), as they stand at `now` (after draining)."""
    window = [r for r in requests if start <= r.arrived < end]
    good = [r for r in window if met(r, now)]
    return Account(
        arrived=len(window),
        met=len(good),
        violation_rate=1.0 - len(good) / len(window) if window else math.nan,
        goodput=sum(r.tokens for r in good) / (end - start),
    )
