"""The cost model: predicts step times, and learns from measured ones.

The paper's model is linear in the load of a step:

    T = a * sum(new) + b * sum(new * total) + c * sum(cached) + d        (milliseconds; total = cached + new)

Two terms are added. Up to some number of tokens, the *knee*, arithmetic is hidden behind the reading of the weights;
beyond it is not: e * max(0, sum(new) - knee). And an engine may have work for each slice, up to a pass over the weights
for engines whose results must not depend on the rest of the step: f * slices. With e = f = 0 this is the paper's model.
It stays linear in the coefficients.

Coefficients come from a profile (`wisp profile`). Recursive least squares on relative errors keeps them current, with
forgetting, a bound on outliers, and a bound on the covariance. The safety margin is a quantile of recent errors.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from operator import gt

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.core.protocol.step import Slice

Vector = npt.NDArray[np.float64]
# Standard deviation of the coefficients at the start, as a fraction of each: of a profile, and of a guess.
TRUST, GUESS = 0.3, 3.0
# Weight of the past after one more step: half of it is gone after 69 steps, and after 10 where the machine has changed.
FORGET, FORGET_FAST = 0.99, 0.93
ENOUGH = 50  # steps after which a model without a profile is gone by
WINDOW = 200  # last steps whose errors make the margin,
LATELY = 64  # those that make the median error,
LATEST = 24  # and those that tell noise from a machine that has changed
# Steps: errors are summed up after each of the first, then now and then, as that takes a while.
AT_FIRST, EVERY = 20, 5
COVERED, MOST_MARGIN = 0.9, 2.0  # share of steps that take no longer than predicted x margin, and its most
LEAST_MS = 1e-3  # shortest step time: the least that can be measured, and never a division by 0
MOST_MS = 1e9  # longest step time that is learnt from, and the largest coefficient


class Load(msgspec.Struct, frozen=True, gc=False):
    """The load of a step, which decides its time. Loads of slices add up.

    new:       tokens fed
    attention: sum over slices of new * total, total being the slice's cached and new tokens
    cached:    KV tokens present before
    slices:    number of slices
    """

    new: int = 0
    attention: int = 0
    cached: int = 0
    slices: int = 0

    def plus(self, new: int, cached: int) -> Load:
        """This load and one more slice: `new` tokens behind `cached`."""
        return Load(
            self.new + new, self.attention + new * (cached + new), self.cached + cached, self.slices + 1
        )


def load_of(slices: Iterable[Slice]) -> Load:
    new = attention = cached = n_slices = 0
    for s in slices:
        n = len(s.tokens)
        new += n
        attention += n * (s.start + n)
        cached += s.start
        n_slices += 1
    return Load(new, attention, cached, n_slices)


class Coefficients(msgspec.Struct, frozen=True):
    """Coefficients in milliseconds.

    step:      fixed
    token:     per new token
    cached:    per cached token
    attention: per pair in `Load.attention`
    beyond:    per new token past `knee` (in tokens; 0: no knee), in addition to `token`
    slice:     per slice
    """

    step: float = 20.0
    token: float = 1.0
    cached: float = 0.0
    attention: float = 0.0
    beyond: float = 0.0
    knee: int = 0
    slice: float = 0.0

    def problem(self) -> str:
        """Why no engine can have these coefficients, which come from a file; "" if one can."""
        all_of_them = (self.step, self.token, self.cached, self.attention, self.beyond, self.knee, self.slice)
        if not all(0 <= value <= MOST_MS for value in all_of_them):  # nor is NaN
            return f"coefficients must not be negative, nor above {MOST_MS:g}"
        return "" if self.step + self.token > 0 else "a step must take time"

    def ms(self, load: Load) -> float:
        """Predicted step time in ms, at least LEAST_MS."""
        return self.ms_of(load.new, load.attention, load.cached, load.slices)

    def ms_of(self, new: int, attention: int, cached: int, slices: int) -> float:
        """The same without a Load, whose creation takes longer than the sum: for loops over thousands."""
        knee = self.knee
        beyond = new - knee if knee else 0
        ms = (
            self.step
            + self.token * new
            + self.cached * cached
            + self.attention * attention
            + self.slice * slices
            + (self.beyond * beyond if beyond > 0 else 0.0)
        )
        return ms if ms > LEAST_MS else LEAST_MS


def rows(loads: Sequence[Load], knee: int) -> Vector:
    """Regressors, shape [n, 6]: step, token, cached, attention, beyond, slice."""
    out = np.empty((len(loads), 6))
    for i, load in enumerate(loads):
        out[i] = _row(load, knee)
    return out


def _row(load: Load, knee: int) -> tuple[float, ...]:
    beyond = max(0, load.new - knee) if knee else 0
    return (1.0, load.new, load.cached, load.attention, beyond, load.slices)


class Fit(msgspec.Struct, frozen=True):
    """Coefficients and their errors. mae: milliseconds. mape: a fraction."""

    coefficients: Coefficients
    r2: float
    mae: float
    mape: float


def errors(coefficients: Coefficients, loads: Sequence[Load], ms: Sequence[float]) -> Fit:
    """R2, mean absolute error and mean absolute relative error of `coefficients` on measured `ms`."""
    y = np.asarray(ms, np.float64)
    predicted = np.array([coefficients.ms(load) for load in loads])
    off = np.abs(predicted - y)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - float((off**2).sum()) / spread if spread else 0.0
    return Fit(coefficients, r2, float(off.mean()), float((off / y).mean()))


def fit(loads: Sequence[Load], ms: Sequence[float], *, paper: bool = False) -> Coefficients:
    """Non-negative least squares on relative errors. `paper`: the paper's model, without the two added terms.

    The knee is chosen among the sizes seen, for the least error. It needs at least four loads on either side, and
    must be worth its two parameters (Bayesian information criterion); otherwise there is none.
    """
    y = np.asarray(ms, np.float64)
    if paper:
        return _fitted([msgspec.structs.replace(load, slices=0) for load in loads], y, 0)[0]
    best, least = _fitted(loads, y, 0)
    least *= len(y) ** (-2.0 / len(y))
    sizes = np.array([load.new for load in loads])
    for at in np.unique(sizes).tolist():
        if min(int((sizes <= at).sum()), int((sizes > at).sum())) < 4:
            continue
        found, error = _fitted(loads, y, at)
        if error < least * (1 - 1e-9):
            best, least = found, error
    return best


def _fitted(loads: Sequence[Load], ms: Vector, knee: int) -> tuple[Coefficients, float]:
    """Coefficients for this knee, and the mean square of their relative errors."""
    x = rows(loads, knee) / ms[:, None]
    theta = _non_negative(x)
    return _coefficients(theta, knee), float(((x @ theta - 1.0) ** 2).mean()) + 1e-15


def _non_negative(x: Vector) -> Vector:
    """The theta >= 0 that minimises |x theta - 1|.

    It is the best among the least-squares solutions on all subsets of columns that have no negative entry. That is
    exact, and quick for six columns.
    """
    scale = np.abs(x).max(axis=0)
    used = [i for i in range(x.shape[1]) if scale[i] > 0]
    part = x[:, used] / scale[used]
    gram, onto = part.T @ part, part.sum(axis=0)
    best, best_gain = np.zeros(x.shape[1]), 0.0
    for n in range(1, len(used) + 1):
        for chosen in itertools.combinations(range(len(used)), n):
            at = list(chosen)
            solved, *_ = np.linalg.lstsq(gram[np.ix_(at, at)], onto[at], rcond=None)
            gain = float(onto[at] @ solved)  # decrease of |x theta - 1|^2
            if solved.min() >= 0.0 and gain > best_gain * (1 + 1e-12):
                best_gain = gain
                best = np.zeros(x.shape[1])
                best[[used[i] for i in at]] = solved / scale[[used[i] for i in at]]
    return best


def _coefficients(theta: Sequence[float] | Vector, knee: int) -> Coefficients:
    step, token, cached, attention, beyond, each = theta.tolist() if isinstance(theta, np.ndarray) else theta
    return Coefficients(step, token, cached, attention, beyond, knee, each)


class CostModel:
    """Coefficients that follow the measured step times, from a profile's or a guess."""

    def __init__(self, coefficients: Coefficients | None = None) -> None:
        start = coefficients or Coefficients()
        trust = TRUST if coefficients is not None else GUESS
        self.now = start
        self.knee = start.knee
        self.steps = 0  # observed steps
        self._given = coefficients is not None
        self._theta = [start.step, start.token, start.cached, start.attention, start.beyond, start.slice]
        floor = [1.0, 1e-2, 1e-6, 1e-7, 1e-2 if start.knee else 0.0, 1e-2 if coefficients else 1.0]
        scales = [max(value, least) for value, least in zip(self._theta, floor, strict=True)]
        self._most = [(scale * max(trust, 1.0)) ** 2 for scale in scales]  # upper bounds of the variances
        # The covariance. Six coefficients are too few for numpy: its calls alone take longer than this.
        self._p = [
            [(scale * trust) ** 2 if i == j else 0.0 for j in range(len(scales))]
            for i, scale in enumerate(scales)
        ]
        self._errors: deque[float] = deque(maxlen=WINDOW)  # measured / predicted
        self._margin = 1.0
        self._median = 0.05  # of recent relative errors
        self._spread = 0.05  # of measured / predicted around its median
        self._bias = 0.0  # distance of that median from 1

    def ms(self, load: Load) -> float:
        """Predicted time of a step, without margin."""
        return self.now.ms(load)

    @property
    def margin(self) -> float:
        """Multiplier that makes a prediction a p90 upper bound."""
        return self._margin

    @property
    def informed(self) -> bool:
        """Is there a profile, or were enough steps observed?"""
        return self._given or self.steps >= ENOUGH

    @property
    def error(self) -> float:
        """Median relative error of recent predictions."""
        return self._median

    def token_ms(self, load: Load) -> float:
        """Milliseconds that one more token adds to a step of this load."""
        now = self.now
        return now.token + (now.beyond if now.knee and load.new >= now.knee else 0.0)

    def observe(self, load: Load, ms: float) -> None:
        """A step took `ms`: record the error of the prediction, then learn."""
        if not LEAST_MS <= ms < MOST_MS or load.new <= 0:
            return
        self.steps += 1
        ratio = ms / self.ms(load)
        self._errors.append(ratio)
        if self.steps < AT_FIRST or self.steps % EVERY == 0:
            self._summarise()
        self._learn(_row(load, self.knee), ms)

    def _summarise(self) -> None:
        ratios = list(self._errors)
        self._margin = min(max(sorted(ratios)[int(COVERED * len(ratios))], 1.0), MOST_MARGIN)
        self._median = _median([abs(r - 1.0) for r in ratios[-LATELY:]])
        latest = ratios[-LATEST:]
        middle = max(_median(latest), 1e-3)
        self._spread = _median([abs(r - middle) for r in latest]) / middle
        self._bias = abs(1.0 - 1.0 / middle)

    def _learn(self, x: Sequence[float], ms: float) -> None:
        """Recursive least squares on relative errors, x / ms.

        The noise is the spread of recent errors around their median. A median far from 0 is no noise: the machine has
        changed, and the past is forgotten faster.
        """
        row = [value / ms for value in x]
        theta = self._theta
        error = 1.0 - _dot(row, theta)
        noise = max(1.5 * self._spread, 0.02 + 0.5 / self.steps)
        # Larger errors count as three times the noise (Huber).
        most = 3.0 * max(noise, self._bias)
        error = max(-most, min(most, error))
        keep = 1.0 / (FORGET_FAST if self._bias > 2.0 * noise else FORGET)
        # No coefficient may become negative. One that would is fixed at 0, and the others share the error anew: their
        # corrections were meant for all of them together.
        p = self._p
        onto = [keep * _dot(line, row) for line in p]
        share = noise * noise + _dot(row, onto)
        step = error / share
        moved = [value + o * step for value, o in zip(theta, onto, strict=True)]
        if min(moved) < 0.0:
            p, moved, onto, share = self._held(row, keep, noise, error, moved)
        root = math.sqrt(share)
        o0, o1, o2, o3, o4, o5 = gains = [o / root for o in onto]  # so that rounding keeps it symmetric
        p = [
            [
                a * keep - o0 * gain, b * keep - o1 * gain, c * keep - o2 * gain,
                d * keep - o3 * gain, e * keep - o4 * gain, f * keep - o5 * gain,
            ]
            for (a, b, c, d, e, f), gain in zip(p, gains, strict=True)
        ]  # fmt: skip
        variances = [p[0][0], p[1][1], p[2][2], p[3][3], p[4][4], p[5][5]]
        if True in map(gt, variances, self._most):  # keep the correlations, bound the variances
            shrink = [
                math.sqrt(most / value) if value > most else 1.0
                for value, most in zip(variances, self._most, strict=True)
            ]
            p = [
                [value * (s * t) for value, t in zip(line, shrink, strict=True)]
                for line, s in zip(p, shrink, strict=True)
            ]
        self._theta, self._p = moved, p
        self.now = _coefficients(moved, self.knee)

    def _held(
        self, row: list[float], keep: float, noise: float, error: float, moved: list[float]
    ) -> tuple[list[list[float]], list[float], list[float], float]:
        """(covariance, theta, its product with the row, innovation variance) once those that would be negative are
        fixed at 0, without correlations to others."""
        theta, free = list(self._theta), [1.0] * len(row)
        while min(moved) < 0.0:
            for i, value in enumerate(moved):
                if value < 0.0:
                    error += row[i] * theta[i]
                    theta[i] = free[i] = 0.0
            own = [value * able for value, able in zip(row, free, strict=True)]
            onto = [keep * able * _dot(line, own) for line, able in zip(self._p, free, strict=True)]
            share = noise * noise + _dot(row, onto)
            moved = [value + o * error / share for value, o in zip(theta, onto, strict=True)]
        p = [
            [value * able * free[j] if i != j else value for j, value in enumerate(line)]
            for i, (line, able) in enumerate(zip(self._p, free, strict=True))
        ]
        return p, moved, onto, share


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Of six each. Written out: the same sum on every machine, and faster than any loop."""
    a0, a1, a2, a3, a4, a5 = a
    b0, b1, b2, b3, b4, b5 = b
    return a0 * b0 + a1 * b1 + a2 * b2 + a3 * b3 + a4 * b4 + a5 * b5


def _median(values: Sequence[float]) -> float:
    """As `statistics.median`, which takes twice as long."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
