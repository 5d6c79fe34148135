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
largest); noise. Ties go to the lower id. float64.

The hash is SplitMix64's output function (Steele et al. 2014; constants by Stafford, "Mix13"). Its top 32 bits k
become the uniform (k + 1/2) / 2^32, so |g| is bounded and an id whose logit/T is more than 26.0 below the
maximum can never win: that bound, and a tighter one once a good candidate is known, is what makes it fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.core.protocol.constraints import Constraints

if TYPE_CHECKING:
    from wisp.core.protocol.edits import Edit

RULE = 1  # increase it if the same logits, parameters and seed may give another token than before

FloatArray = npt.NDArray[np.floating]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_GUMBEL_MAX = 22.88  # -log(-log(u)) at the largest uniform, 1 - 2^-33, rounded up
# Below this temperature sampling is greedy: noise would only settle ties, and logits / T may overflow.
COLDEST = 1e-5
_NEAR = 10.0  # ids this close to the maximum are looked at first; any value is exact, this one is fast


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


def target_token(logits: FloatArray, sampling: Sampling, position: int, edit: Edit | None = None) -> int:
    """The token that the model with these `logits` (shape [vocabulary]) says at generated `position`.

    edit: of the constraints, where there are any (`edits.Tracker`)
    """
    if edit is not None:
        logits = edit.apply(logits)
    elif barred := sampling.barred(position):
        logits = logits.copy()
        logits[[token for token in barred if token < logits.size]] = -np.inf  # a drafter may have fewer ids
    if sampling.greedy:
        return int(np.argmax(logits))
    scores = logits.astype(np.float64) / sampling.temperature
    ids = _kept(scores, sampling)
    if ids is None:
        return _gumbel_max(scores, sampling.seed, position)
    return int(ids[np.argmax(scores[ids] + gumbels(sampling.seed, position, ids))])


def _gumbel_max(scores: npt.NDArray[np.float64], seed: int, position: int) -> int:
    """Arg max of scores + noise over a whole vocabulary, without computing the noise of most ids.

    Ids near the top give a value to beat. Another id beats it only with a uniform very close to 1. Hashing, which is
    cheap, rules out nearly all of them; only the rest need logarithms.
    """
    top = float(scores.max())
    near = np.flatnonzero(scores >= top - _NEAR)
    values = scores[near] + gumbels(seed, position, near)
    best = int(np.argmax(values))
    token, value = int(near[best]), float(values[best])
    gap = value - (top - _NEAR)  # an id below needs at least this much noise
    if gap < _GUMBEL_MAX:
        far = np.flatnonzero((scores < top - _NEAR) & (scores > value - _GUMBEL_MAX))
        u = uniforms(seed, position, far)
        far = far[u >= np.exp(-np.exp(-gap)) * (1.0 - 1e-12)]
        if far.size:
            values = scores[far] + gumbels(seed, position, far)
            best = int(np.argmax(values))
            if (values[best], -far[best]) > (value, -token):
                token = int(far[best])
    return token


def _kept(scores: npt.NDArray[np.float64], s: Sampling) -> npt.NDArray[np.intp] | None:
    """Ids that top-k, top-p and min-p leave, ascending; None if all three are off."""
    if not (0 < s.top_k < scores.size or s.top_p < 1.0 or s.min_p > 0.0):
        return None
    top = float(scores.max())
    ids = np.arange(scores.size)
    if 0 < s.top_k < scores.size:
        ids = _largest(scores, s.top_k)
    if s.top_p < 1.0:
        ids = _nucleus(scores, ids, s.top_p)
    if s.min_p > 0.0:
        ids = ids[scores[ids] >= top + np.log(s.min_p)]
    return np.sort(ids)


def _largest(scores: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.intp]:
    """The k ids of largest score, ties by lower id, in ascending order of id."""
    kth = np.partition(scores, scores.size - k)[scores.size - k]
    above = np.flatnonzero(scores > kth)
    ties = np.flatnonzero(scores == kth)[: k - above.size]
    return np.sort(np.concatenate([above, ties]))


def _nucleus(scores: npt.NDArray[np.float64], ids: npt.NDArray[np.intp], p: float) -> npt.NDArray[np.intp]:
    """The smallest set of the largest of `ids` whose renormalised probability reaches p."""
    kept = scores[ids]
    weights = np.exp(kept - kept.max())
    goal = p * float(weights.sum())
    for floor in (np.exp(-_NEAR), 0.0):  # the head nearly always reaches p; only otherwise is the tail sorted
        head = np.flatnonzero(weights >= floor)
        order = head[np.lexsort((ids[head], -kept[head]))]
        reached = np.cumsum(weights[order]) >= goal
        if reached.any():
            return ids[order[: int(np.argmax(reached)) + 1]]
    return ids  # p is so close to 1 that the rounded sum stays below it


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
    """log p(token) and the `top` likeliest (id, log p), of the plain softmax at T = 1. Ties by lower id."""
    scores = logits.astype(np.float64)
    peak = scores.max()
    log_z = peak + np.log(np.exp(scores - peak).sum())
    best: list[tuple[int, float]] = []
    if top > 0:
        ids = _largest(scores, min(top, scores.size))
        order = ids[np.lexsort((ids, -scores[ids]))]
        best = [(int(i), float(scores[i] - log_z)) for i in order]
    return float(scores[token] - log_z), best
