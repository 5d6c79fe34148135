"""Do sampled tokens have the target's distribution? Pearson's chi-square, over many seeds of one prompt.

Each seed is a session of its own through the speculative path, drafted by the model with the same noise. The
expected probabilities come from the reference decoder's logits by the textbook: softmax at a temperature, cut to
the nucleus. Position 0 is tested as it is, position 1 together with the token before it. This covers the sampling
rule, the hash behind it and acceptance; that verification agrees with plain decoding is what the cases are for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.core.protocol.sampling import FloatArray, Sampling

T = TypeVar("T")
LEAST_EXPECTED = 5.0  # rarer outcomes share a bin
ALARM = 1e-4  # a p-value below this is no accident; seeds are fixed, so it is the same on every run


class Fit(msgspec.Struct, frozen=True):
    """One test. `p`: how likely a statistic this large is if the distributions are equal."""

    what: str
    samples: int
    bins: int
    statistic: float
    p: float


def distribution(logits: FloatArray, sampling: Sampling) -> npt.NDArray[np.float64]:
    """Probabilities of all ids after temperature and top-p (the smallest set of likeliest ids to reach it)."""
    z = logits.astype(np.float64) / sampling.temperature
    p: npt.NDArray[np.float64] = np.exp(z - z.max())
    p /= p.sum()
    if sampling.top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        n = int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1
        p[order[n:]] = 0.0
        p /= p.sum()
    return p


def fit(what: str, outcomes: Iterable[T], probabilities: Mapping[T, float]) -> Fit:
    """Compare outcomes with their probabilities. Outcomes without a listed probability share one bin."""
    seen = Counter(outcomes)
    n = seen.total()
    bins = {o: n * float(p) for o, p in probabilities.items() if n * p >= LEAST_EXPECTED}
    statistic = sum((seen[o] - e) ** 2 / e for o, e in bins.items())
    rest, rest_seen = n - sum(bins.values()), n - sum(seen[o] for o in bins)
    count = len(bins)
    if rest >= LEAST_EXPECTED:
        statistic += (rest_seen - rest) ** 2 / rest
        count += 1
    elif rest <= 1e-6 * n < rest_seen:  # something came up that cannot
        return Fit(what, n, count, math.inf, 0.0)
    return Fit(what, n, count, round(statistic, 3), survival(statistic, count - 1))


def survival(x: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees > x), by the finite sums for whole and half numbers."""
    if freedom < 1 or x <= 0.0:
        return 1.0
    half = x / 2
    odd = freedom % 2
    total = math.erfc(math.sqrt(half)) if odd else 0.0
    for i in range((freedom - odd) // 2):
        a = i + odd / 2
        total += math.exp(a * math.log(half) - half - math.lgamma(a + 1))
    return min(1.0, total)
