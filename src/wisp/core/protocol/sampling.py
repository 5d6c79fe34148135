"""Lossless sampling: the target's token at a position is a function of (logits, parameters, seed, position).

Greedy is the arg max, ties to the lowest id. Otherwise *coupled Gumbel-max*: of the ids that temperature,
top-k, top-p and min-p leave, the token is

    arg max over kept ids of  logit / T + g(seed, position, id)

with g standard Gumbel noise from a counter-based hash. Arg max over Gumbel-perturbed scores is a draw from
the softmax (Gumbel 1954; Maddison et al. 2014), so this is ordinary seeded sampling. But nothing in it depends
on a draft: a verifier computes this token at every position of a draft and accepts while the draft agrees.
Output therefore equals plain decoding token for token, no probabilities cross the network, and a drafter that
adds the *same* noise to its own logits agrees with the target nearly as often as any coupling can.

Order of operations, everywhere: constraints on the raw logits (`constraints`; ids that end the text, before
`min_tokens`); logits / T; top-k; top-p (the smallest set that reaches p, after renormalisation); min-p (relative to the
largest); noise. Ties go to the lower id. Logits are float32, scores with noise float64.

Top-p and min-p compare whole numbers, so that no order of a sum and no library's exponential decides an edge: an id's
`distances` below the largest logit, in 2^-24 of an octave, and the `weights` made of them, of which the largest is
2^40. Both are the same bits on every device.

The hash is SplitMix64's output function (Steele et al. 2014; constants by Stafford, "Mix13"). Its top 32 bits k
become the uniform (k + 1/2) / 2^32, so |g| is bounded and an id whose logit/T is more than 26.0 below the
maximum can never win: that bound, and a tighter one once a good candidate is known, is what makes it fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.core.protocol.constraints import Constraints

if TYPE_CHECKING:
    from wisp.core.protocol.edits import Edit

RULE = 2  # increase it if the same logits, parameters and seed may give another token than before

FloatArray = npt.NDArray[np.floating]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_GUMBEL_MAX = 22.88  # -log(-log(u)) at the largest uniform, 1 - 2^-33, rounded up
# Below this temperature sampling is greedy: noise would only settle ties, and logits / T may overflow.
COLDEST = 1e-5
_NEAR = 10.0  # ids this close to the maximum are looked at first; any value is exact, this one is fast
_BLOCK = 16384  # ids whose weights are computed at a time, within the processor's cache
_GROUP = 128  # ids whose largest logit bounds what can be among the largest of all
_FEW = 64  # ids among which a second choice is guessed

OCTAVE = 1 << 24  # distances from the largest logit are counted in parts of a factor of two
FAR = 41 * OCTAVE  # and end here, where weights are 0
_NEAR_OCTAVES = int(_NEAR / math.log(2.0) * OCTAVE)
PEAK_BITS = 40  # the weight of the largest logit is 2^PEAK_BITS: sums of 2^22 ids fit 63 bits
# 2^-f for f in [0, 1) as a polynomial of alternating signs, in 2^-30; off by 9e-8 of its value at most.
WEIGHT = (1073741824, 744257403, 257891465, 59375086, 9884650, 1014582)


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the target's token is chosen. A `temperature` below `COLDEST` is greedy and ignores top_k to seed.

    top_k 0, top_p 1 and min_p 0 mean "off". `seed` is any integer, used modulo 2^64. None of the first `min_tokens`
    tokens is one of `ends`, the ids that end a generation, or of the constraints' `stop_token_ids`. Each side fills in
    `ends` for its target. `constraints` None costs nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    ends: tuple[int, ...] = ()
    constraints: Constraints | None = None

    @property
    def greedy(self) -> bool:
        """Is the likeliest token always chosen?"""
        return self.temperature < COLDEST

    def ending(self, ends: Iterable[int]) -> Sampling:
        """The same, for a target that ends with `ends`."""
        known = tuple(sorted(ends)) if self.min_tokens else ()
        return self if known == self.ends else msgspec.structs.replace(self, ends=known)

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end the generation besides the model's own."""
        return self.constraints.stop_token_ids if self.constraints is not None else ()

    def barred(self, position: int) -> tuple[int, ...]:
        """Ids that end the generation and may not be chosen yet at generated `position`."""
        return self.ends + self.stops if position < self.min_tokens else ()

    def problem(self) -> tuple[str, str] | None:
        """(parameter, what is wrong with it), or None if all is in range."""
        if not 0.0 <= self.temperature <= 100.0:
            return "temperature", "must be between 0 and 100"
        if self.top_k < 0:
            return "top_k", "must be 0 (off) or a positive count"
        if not 0.0 < self.top_p <= 1.0:
            return "top_p", "must be above 0 and at most 1"
        if not 0.0 <= self.min_p <= 1.0:
            return "min_p", "must be between 0 and 1"
        if self.min_tokens < 0:
            return "min_tokens", "must not be negative"
        return self.constraints.problem() if self.constraints is not None else None


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash32(seed: int, position: int, token: int) -> int:
    """The 32 bits behind the uniform of one id."""
    return _mix((token + 1) * _GOLDEN + _key(seed, position)) >> 32


def _key(seed: int, position: int) -> int:
    return _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)


def uniforms(seed: int, position: int, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Uniforms in (0, 1), one for each id: a pure function of (seed, position, id), each id alone."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(_key(seed, position))
    high = (_mix_array(x) >> np.uint64(32)).astype(np.float64)
    return (high + 0.5) / 4294967296.0


def gumbels(seed: int, position: int, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise, one for each id."""
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniforms(seed, position, ids)))
    return noise


def keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """What is hashed with each id, one key for each pair of seed (modulo 2^64) and position."""
    places = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return _mix_array(_mix_array(seeds + np.uint64(_GOLDEN)) + places)


def scale(temperature: float) -> float:
    """Distance per logit, a float32."""
    return float(np.float32(OCTAVE / (temperature * math.log(2.0))))


def reach(min_p: float) -> int:
    """The largest distance that min-p leaves."""
    return min(FAR, math.floor(-OCTAVE * math.log2(min_p))) if min_p > 0.0 else FAR


def distances(logits: npt.NDArray[np.float32], peak: np.float32, temperature: float) -> npt.NDArray[np.int32]:
    """How far each of `logits` is below `peak` at this temperature: whole numbers from 0 to FAR, OCTAVE of which halve
    the probability. One subtraction and one product in float32, rounded down: the same bits everywhere."""
    with np.errstate(over="ignore"):
        below = peak - logits
        below *= np.float32(scale(temperature))
    np.minimum(below, np.float32(FAR), out=below)
    return below.astype(np.int32)


def weights(distances: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """2^PEAK_BITS at distance 0, half of it an octave further, rounded down; 0 at FAR. Whole numbers all the way."""
    weight = np.empty(distances.size, np.int64)
    for first in range(0, distances.size, _BLOCK):
        away = distances[first : first + _BLOCK].astype(np.int64)
        part = away & (OCTAVE - 1)
        power = np.full_like(part, WEIGHT[-1])
        for term in WEIGHT[-2::-1]:
            power *= part
            power >>= 24
            np.subtract(term, power, out=power)
        power <<= PEAK_BITS - 30
        power >>= away >> 24
        weight[first : first + _BLOCK] = power
    return weight


def target_token(logits: FloatArray, sampling: Sampling, position: int, edit: Edit | None = None) -> int:
    """The token that the model with these `logits` (shape [vocabulary], taken as float32) says at generated `position`.

    edit: of the constraints, where there are any (`edits.Tracker`)
    """
    single = logits.astype(np.float32, copy=False)
    if edit is not None:
        single = edit.apply(single)
    elif barred := sampling.barred(position):
        single = single.copy()
        single[[token for token in barred if token < single.size]] = -np.inf  # a drafter may have fewer ids
    if sampling.greedy:
        return int(np.argmax(single))
    ids = _kept(single, sampling)
    if ids is None:
        return _gumbel_max(single, sampling, position)
    scores = single[ids] / np.float64(sampling.temperature)
    return int(ids[np.argmax(scores + gumbels(sampling.seed, position, ids))])


def second_choice(logits: FloatArray, token: int, sampling: Sampling, position: int) -> int:
    """A guess at what `target_token` would say if it could not say `token`: over the _FEW likeliest ids, all of them
    kept. The exact answer takes as long as `target_token` itself."""
    single = logits.astype(np.float32, copy=False)
    ids = _largest(single, min(_FEW, single.size))
    ids = ids[ids != token]
    scores = single[ids].astype(np.float64)
    if not sampling.greedy:
        scores = scores / sampling.temperature + gumbels(sampling.seed, position, ids)
    return int(ids[np.argmax(scores)])


def _gumbel_max(logits: npt.NDArray[np.float32], s: Sampling, position: int) -> int:
    """Arg max of logits / T + noise over a whole vocabulary, without computing the noise of most ids.

    Ids near the top give a value to beat. Another id beats it only with a uniform very close to 1. Hashing, which is
    cheap, rules out nearly all of them; only the rest need logarithms.
    """
    floor = np.float32(float(logits.max()) - _NEAR * s.temperature)
    near = np.flatnonzero(logits >= floor)
    values = logits[near] / np.float64(s.temperature) + gumbels(s.seed, position, near)
    best = int(np.argmax(values))
    token, value = int(near[best]), float(values[best])
    gap = value - float(floor) / s.temperature  # an id below needs at least this much noise
    if gap < _GUMBEL_MAX:
        least = np.nextafter(np.float32((value - _GUMBEL_MAX) * s.temperature), np.float32(-np.inf))
        far = np.flatnonzero((logits < floor) & (logits > least))
        u = uniforms(s.seed, position, far)
        far = far[u >= np.exp(-np.exp(-gap)) * (1.0 - 1e-12)]
        if far.size:
            values = logits[far] / np.float64(s.temperature) + gumbels(s.seed, position, far)
            best = int(np.argmax(values))
            if (values[best], -far[best]) > (value, -token):
                token = int(far[best])
    return token


def _kept(logits: npt.NDArray[np.float32], s: Sampling) -> npt.NDArray[np.intp] | None:
    """Ids that top-k, top-p and min-p leave, ascending; None if all three are off."""
    few = 0 < s.top_k < logits.size
    if not (few or s.top_p < 1.0 or s.min_p > 0.0):
        return None
    peak = logits.max()
    ids = _largest(logits, s.top_k) if few else np.arange(logits.size)
    away = distances(logits[ids] if few else logits, peak, s.temperature)
    if s.min_p > 0.0:
        kept = away <= reach(s.min_p)
        # The likelier ones are all kept, so top-p over the others as well gives the same.
        ids = ids[kept] if s.top_p == 1.0 else ids[kept & _nucleus(logits[ids], away, s.top_p)]
    elif s.top_p < 1.0:
        ids = ids[_nucleus(logits[ids], away, s.top_p)]
    return ids


def _largest(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """The k ids of largest logits, ties by lower id, in ascending order of id."""
    near = np.arange(logits.size)
    whole = logits.size // _GROUP
    if 0 < k <= whole:  # so many groups have a member above the k-th largest of the groups' maxima
        tops = logits[: whole * _GROUP].reshape(whole, _GROUP).max(axis=1)
        near = np.flatnonzero(logits >= np.partition(tops, whole - k)[whole - k])
    some = logits[near]
    kth = np.partition(some, some.size - k)[some.size - k]
    above = near[some > kth]
    ties = near[some == kth][: k - above.size]
    return np.sort(np.concatenate([above, ties]))


def _nucleus(logits: npt.NDArray[np.float32], away: npt.NDArray[np.int32], p: float) -> npt.NDArray[np.bool_]:
    """For each of `logits`, in order of their ids: is it in the smallest set of the largest whose weight reaches p of
    all? That is, do those before it not reach p yet?"""
    weight = weights(away)
    goal = p * float(weight.sum())
    kept = np.zeros(logits.size, np.bool_)
    for most in (_NEAR_OCTAVES, FAR):  # the head nearly always reaches p; only otherwise is the tail sorted
        head = np.flatnonzero(away <= most)
        order = head[np.argsort(-logits[head], kind="stable")]
        reached = np.cumsum(weight[order])
        n = int(np.searchsorted(reached.astype(np.float64), goal)) + 1
        if n <= order.size:
            break
    kept[order[:n]] = True
    return kept


def verify(
    rows: Iterable[FloatArray],
    draft: Sequence[int],
    sampling: Sampling,
    position: int,
    edits: Iterable[Edit] | None = None,
) -> tuple[int, list[int]]:
    """(accepted, tokens): the target's tokens along a draft, up to and including the first that disagrees.

    `rows` yields logits for len(draft) + 1 places in order, `edits` those of the constraints. Both are read no further
    than needed.
    """
    tokens: list[int] = []
    edit = iter(edits) if edits is not None else repeat(None)
    for i, row in enumerate(rows):
        token = target_token(row, sampling, position + i, next(edit))
        tokens.append(token)
        if i >= len(draft) or token != draft[i]:
            return i, tokens
    raise ValueError(f"{len(draft)} draft tokens need {len(draft) + 1} rows of logits, got {len(tokens)}")


def log_probability(logits: FloatArray, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """log p(token) and the `top` likeliest (id, log p), of the plain softmax at T = 1. Ties by lower id.

    Exponentials are float32, so that a large vocabulary takes little time: right to 1e-6.
    """
    single = logits.astype(np.float32, copy=False)
    peak = single.max()
    log_z = float(peak) + math.log(np.exp(single - peak).sum(dtype=np.float64))
    best: list[tuple[int, float]] = []
    if top > 0:
        ids = _largest(single, min(top, single.size))
        order = ids[np.argsort(-single[ids], kind="stable")]
        best = [(int(i), float(single[i]) - log_z) for i in order]
    return float(single[token]) - log_z, best
