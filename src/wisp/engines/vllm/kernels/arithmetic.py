"""The rule number by number, and loading: what the kernels have in common."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from wisp.core.protocol import sampling as rule

GOLDEN = tl.constexpr(rule._GOLDEN)
OCTAVE = tl.constexpr(float(rule.OCTAVE))
FAR = tl.constexpr(float(rule.FAR))
END = tl.constexpr(rule.FAR)
_W0, _W1, _W2, _W3, _W4, _W5 = (tl.constexpr(term) for term in rule.WEIGHT)
PEAK = tl.constexpr(2.0**rule.PEAK_BITS)
UNIT = tl.constexpr(rule.PEAK_BITS - 30)
NAT = tl.constexpr(float(np.log(2.0)) / rule.OCTAVE)  # of a distance
LOG2E = tl.constexpr(float(np.log2(np.e)))
NOISE = tl.constexpr(rule._GUMBEL_MAX)
MARGIN = tl.constexpr(2e-4)  # ten times what float32 is off by, in two values whose difference is looked at
SUM = tl.constexpr(1e-4)  # a sum's float32 error, relative, and its weights' rounding down: ten times it
INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)
NO_ID = tl.constexpr(2147483647)  # an id beyond all

DRAW, TEMPERED, PLAIN = 1, 2, 4  # what scan computes of a view: noise, the sums at its temperature and at 1
DRAWS, TEMPERS, PLAINLY = tl.constexpr(DRAW), tl.constexpr(TEMPERED), tl.constexpr(PLAIN)


@triton.jit
def hash_of(key, ids):
    x = (ids.to(tl.uint64) + 1) * GOLDEN + key
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 32).to(tl.uint32)


@triton.jit
def noise64(bits):
    """float64, as in the rule."""
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) / 4294967296.0))


@triton.jit
def noise32(bits):
    """float32, off by 2e-5 at most: uniforms next to 1 are counted from there."""
    low = bits < 0x80000000
    v = (tl.where(low, bits, bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    series = v * (1.0 + v * (1.0 / 2 + v * (1.0 / 3 + v * (1.0 / 4 + v * (1.0 / 5 + v * (1.0 / 6))))))
    minus_log = -tl.log(tl.where(low, v, 1.0 - v))
    minus_log = tl.where(low | (v >= 0.03125), minus_log, series)
    return -tl.log(minus_log)


@triton.jit
def distance32(peak, logits, scale):
    """Distances as float32, before they are rounded down and cut."""
    return tl.where(logits == -INF, INF, (peak - logits) * scale)


@triton.jit
def distance_of(below):
    return tl.minimum(below, FAR).to(tl.int32)


@triton.jit
def weight_of(distance):
    part = (distance & 0xFFFFFF).to(tl.int64)
    power = _W4 - ((part * _W5) >> 24)
    power = _W3 - ((part * power) >> 24)
    power = _W2 - ((part * power) >> 24)
    power = _W1 - ((part * power) >> 24)
    power = _W0 - ((part * power) >> 24)
    return (power << UNIT) >> (distance >> 24).to(tl.int64)


@triton.jit
def order_of(x):
    """Whole numbers in the order of floats; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def float_of(order):
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def is_ahead(logits, ids, other, other_id):
    """Is it likelier than the other, or as likely with a lower id?"""
    return (logits > other) | ((logits == other) & (ids < other_id))


@triton.jit
def best_of(logits, ids, free, peak, scale, temperature, key, best, value):
    """The arg max of logit / T + noise over the ids that are `free`, [R, B], and `best` so far, [R], whose logit is
    `value` (-1 and minus infinity: none so far). Float64 decides where float32 is not clear. Returns (best, value)."""
    bits = hash_of(key[:, None], ids)
    z = noise32(bits) - distance32(peak[:, None], logits, scale[:, None]) * NAT
    z = tl.where(free, z, -INF)
    top = tl.max(z, axis=1)
    own = tl.where(value == -INF, -INF, noise32(hash_of(key, best)) - distance32(peak, value, scale) * NAT)
    floor = tl.maximum(top, own) - MARGIN
    close = (z >= floor[:, None]) & (z > -INF)
    rivals = tl.sum(close.to(tl.int32), axis=1)
    alone = (rivals == 1) & (own < floor)
    found = tl.where(alone, tl.min(tl.where(close, ids, NO_ID), axis=1), best)
    doubtful = (rivals > 0) & (rivals + (own >= floor).to(tl.int32) > 1)
    left = tl.max(tl.where(doubtful, rivals, 0), axis=0)
    if left > 0:
        most = tl.where(value == -INF, -INF, value.to(tl.float64) / temperature + noise64(hash_of(key, best)))
        rival = close & doubtful[:, None]
        for _ in range(left):  # one at a time: there are two as a rule, and float64 is slow
            one = tl.min(tl.where(rival, ids, NO_ID), axis=1)
            is_one = rival & (ids == one[:, None])
            exact = tl.max(tl.where(is_one, logits, -INF), axis=1).to(tl.float64) / temperature
            exact = tl.where(one < NO_ID, exact + noise64(hash_of(key, one)), -INF)
            beaten = (exact > most) | ((exact == most) & (one < found))
            most = tl.where(beaten, exact, most)
            found = tl.where(beaten, one, found)
            rival = rival & (ids != one[:, None])
    there = tl.max(tl.where(free & (ids == found[:, None]), logits, -INF), axis=1)
    return found, tl.where(found == best, value, there)


# -- loading


@triton.jit
def loaded(logits, stride, edited, size, row, edit, ids, there):
    """The logits of a view as they are, float32; minus infinity beyond their end."""
    own = there & (edit < 0)[:, None]
    plain = tl.load(logits + row[:, None] * stride + ids, mask=own, other=-INF).to(tl.float32)
    changed = edited + edit.to(tl.int64)[:, None] * size + ids
    return tl.load(changed, mask=there & (edit >= 0)[:, None], other=plain)


@triton.jit
def clean(x):
    """What is no number comes last; such rows are not used."""
    return tl.minimum(tl.where(x != x, -INF, x), LARGEST)


@triton.jit
def merged(peaks, sums, peak, scale):
    """Sums [R, S] relative to peaks of their own, relative to the largest; `scale`: octaves for each logit."""
    below = tl.where(peaks == -INF, INF, (peak[:, None] - peaks) * scale[:, None])
    return tl.sum(sums * tl.exp2(-below), axis=1)


@triton.jit
def peaks_of(peaks, peak_ids, v, live, S: tl.constexpr):
    """Of views [R]: (places of their stretches' entries, largest logit of each, both [R, S]; the largest, its id)."""
    parts = v.to(tl.int64)[:, None] * S + tl.arange(0, S)[None, :]
    heads = tl.load(peaks + parts, mask=live[:, None], other=-INF)
    peak = tl.max(heads, axis=1)
    first = tl.load(peak_ids + parts, mask=live[:, None], other=NO_ID)
    first = tl.min(tl.where(heads == peak[:, None], first, NO_ID), axis=1)
    return parts, heads, peak, first


@triton.jit
def halved(low, high, middle, enough):
    """One step of a bisection for the largest number that is small enough."""
    return tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
