"""The sampling rule in four Triton kernels, for all sampled rows of a step at once.

    scan    reads each row's logits once: the largest, the sums of exponentials, and the arg max of logit / T + noise
            over the whole vocabulary. Noise is float32 first; where that leaves more than one id, float64 decides
    gather  for rows with top-k, top-p or min-p, and for alternatives that are reported: the few ids near the top that
            can matter, from those blocks of the logits that have any
    select  settles these rows. The arg max over all ids is the answer if it is among the kept ids; if not, all that is
            kept is likelier than it, so the arg max over those ids is the next to be tried. Nothing is sorted
    accept  along each draft, until the target says something else

Rows with constraints are written out first, by one more kernel (`edit_kernel`). Results travel back in one copy.

Bytes read, in units of the logits' size: scan reads 1. gather reads the blocks that have a candidate, so at most 1
and usually less; without top-k, top-p, min-p and alternatives it does not run. The rest reads a few ids a row. So at
most 2, unless more than `MOST` ids of a row are candidates. Then select reads that row itself: twice for each try, and
for top-k with top-p 33 times before. That is the worst case, a flat row whose bound prunes nothing: by one try for
each factor e that the kept part of its probability is below 1, plus one. A sum of float32 numbers bounds the mass
that top-p is a part of; one row in some ten thousand is so close to an edge that select sums it up exactly, one read
more.

A row of kernels' arguments that is named `..._of` has an entry for each view. A view is a row as a choice sees it:
each row, and once more without its constraints where log probabilities are asked for.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from wisp.core.protocol import sampling as rule

_GOLDEN = tl.constexpr(rule._GOLDEN)
_OCTAVE = tl.constexpr(float(rule.OCTAVE))
_FAR = tl.constexpr(float(rule.FAR))
_END = tl.constexpr(rule.FAR)
_W0, _W1, _W2, _W3, _W4, _W5 = (tl.constexpr(term) for term in rule.WEIGHT)
_PEAK = tl.constexpr(2.0**rule.PEAK_BITS)
_UNIT = tl.constexpr(rule.PEAK_BITS - 30)
_NAT = tl.constexpr(float(np.log(2.0)) / rule.OCTAVE)  # of a distance
_LOG2E = tl.constexpr(float(np.log2(np.e)))
_NOISE = tl.constexpr(rule._GUMBEL_MAX)
_MARGIN = tl.constexpr(2e-4)  # ten times what float32 is off by, in two values whose difference is looked at
_SUM = tl.constexpr(1e-4)  # a sum's float32 error, relative, and its weights' rounding down: ten times it
_INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(3.4028234663852886e38)
_NONE = tl.constexpr(2147483647)  # an id beyond all

DRAW, TEMPERED, PLAIN = 1, 2, 4  # what scan computes of a view: noise, the sums at its temperature and at 1
_DRAW, _TEMPERED, _PLAIN = tl.constexpr(DRAW), tl.constexpr(TEMPERED), tl.constexpr(PLAIN)


# -- the rule, number by number


@triton.jit
def _hash(key, ids):
    x = (ids.to(tl.uint64) + 1) * _GOLDEN + key
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 32).to(tl.uint32)


@triton.jit
def _noise(bits):
    """float64, as in the rule."""
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) / 4294967296.0))


@triton.jit
def _near_noise(bits):
    """float32, off by 2e-5 at most: uniforms next to 1 are counted from there."""
    low = bits < 0x80000000
    v = (tl.where(low, bits, bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    series = v * (1.0 + v * (1.0 / 2 + v * (1.0 / 3 + v * (1.0 / 4 + v * (1.0 / 5 + v * (1.0 / 6))))))
    minus_log = -tl.log(tl.where(low, v, 1.0 - v))
    minus_log = tl.where(low | (v >= 0.03125), minus_log, series)
    return -tl.log(minus_log)


@triton.jit
def _below(peak, logits, scale):
    """Distances as float32, before they are rounded down and cut."""
    return tl.where(logits == -_INF, _INF, (peak - logits) * scale)


@triton.jit
def _distance(below):
    return tl.minimum(below, _FAR).to(tl.int32)


@triton.jit
def _weight(distance):
    part = (distance & 0xFFFFFF).to(tl.int64)
    power = _W4 - ((part * _W5) >> 24)
    power = _W3 - ((part * power) >> 24)
    power = _W2 - ((part * power) >> 24)
    power = _W1 - ((part * power) >> 24)
    power = _W0 - ((part * power) >> 24)
    return (power << _UNIT) >> (distance >> 24).to(tl.int64)


@triton.jit
def _order(x):
    """Whole numbers in the order of floats; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _unordered(order):
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _ahead(logits, ids, other, other_id):
    """Is it likelier than the other, or as likely with a lower id?"""
    return (logits > other) | ((logits == other) & (ids < other_id))


@triton.jit
def _best(logits, ids, free, peak, scale, temperature, key, best, value):
    """The arg max of logit / T + noise over the ids that are `free`, [R, B], and `best` so far, [R], whose logit is
    `value` (-1 and minus infinity: none so far). Float64 decides where float32 is not clear. Returns (best, value)."""
    bits = _hash(key[:, None], ids)
    z = _near_noise(bits) - _below(peak[:, None], logits, scale[:, None]) * _NAT
    z = tl.where(free, z, -_INF)
    top = tl.max(z, axis=1)
    own = tl.where(value == -_INF, -_INF, _near_noise(_hash(key, best)) - _below(peak, value, scale) * _NAT)
    floor = tl.maximum(top, own) - _MARGIN
    close = (z >= floor[:, None]) & (z > -_INF)
    rivals = tl.sum(close.to(tl.int32), axis=1)
    alone = (rivals == 1) & (own < floor)
    found = tl.where(alone, tl.min(tl.where(close, ids, _NONE), axis=1), best)
    doubtful = (rivals > 0) & (rivals + (own >= floor).to(tl.int32) > 1)
    left = tl.max(tl.where(doubtful, rivals, 0), axis=0)
    if left > 0:
        most = tl.where(value == -_INF, -_INF, value.to(tl.float64) / temperature + _noise(_hash(key, best)))
        rival = close & doubtful[:, None]
        for _ in range(left):  # one at a time: there are two as a rule, and float64 is slow
            one = tl.min(tl.where(rival, ids, _NONE), axis=1)
            is_one = rival & (ids == one[:, None])
            exact = tl.max(tl.where(is_one, logits, -_INF), axis=1).to(tl.float64) / temperature
            exact = tl.where(one < _NONE, exact + _noise(_hash(key, one)), -_INF)
            beaten = (exact > most) | ((exact == most) & (one < found))
            most = tl.where(beaten, exact, most)
            found = tl.where(beaten, one, found)
            rival = rival & (ids != one[:, None])
    there = tl.max(tl.where(free & (ids == found[:, None]), logits, -_INF), axis=1)
    return found, tl.where(found == best, value, there)


# -- loading


@triton.jit
def _load(logits, stride, edited, size, row, edit, ids, there):
    """The logits of a view as they are, float32; minus infinity beyond their end."""
    own = there & (edit < 0)[:, None]
    plain = tl.load(logits + row[:, None] * stride + ids, mask=own, other=-_INF).to(tl.float32)
    changed = edited + edit.to(tl.int64)[:, None] * size + ids
    return tl.load(changed, mask=there & (edit >= 0)[:, None], other=plain)


@triton.jit
def _clean(x):
    """What is no number comes last; such rows are not used."""
    return tl.minimum(tl.where(x != x, -_INF, x), _LARGEST)


@triton.jit
def _merged(peaks, sums, peak, scale):
    """Sums [R, S] relative to peaks of their own, relative to the largest; `scale`: octaves for each logit."""
    below = tl.where(peaks == -_INF, _INF, (peak[:, None] - peaks) * scale[:, None])
    return tl.sum(sums * tl.exp2(-below), axis=1)


# -- the kernels. What differs from step to step is no reason to compile them anew.


@triton.jit
def edit_kernel(logits, stride, size, edited, row_of, mask_of, masks, words, first_of, ids, biases, factors, penalties,
          B: tl.constexpr):  # fmt: skip
    """Constraints carried out on a block of a row: `edited` [rows with constraints, size] is what the choice sees.

    masks:  [.., words] packed bits; mask_of: which one
    ids:    from first_of[i] on those of row i with a bias, repeated or counted, with what is done to each
    """
    e = tl.program_id(0)
    row = tl.load(row_of + e).to(tl.int64)
    mask = tl.load(mask_of + e).to(tl.int64)
    low = tl.program_id(1) * B
    at = low + tl.arange(0, B)
    x = tl.load(logits + row * stride + at, mask=at < size, other=0.0).to(tl.float32)
    x = tl.where((x - x) == 0.0, x, float("nan"))  # an infinity of the model's is told from one of a mask
    free = tl.load(masks + mask * words + at // 32, mask=at < size, other=0)
    kept = ((free >> (at % 32)) & 1) == 1
    out = edited + e.to(tl.int64) * size
    tl.store(out + at, tl.where(kept | (x != x), x, -_INF), mask=at < size)
    tl.debug_barrier()  # the same places are written again
    begin, end = tl.load(first_of + e), tl.load(first_of + e + 1)
    for first in range(begin, end, B):
        i = first + tl.arange(0, B)
        token = tl.load(ids + i, mask=i < end, other=_NONE)
        here = (token >= low) & (token < low + B)
        y = tl.load(logits + row * stride + token, mask=here, other=0.0).to(tl.float32)
        y = tl.where((y - y) == 0.0, y, float("nan"))
        bits = tl.load(masks + mask * words + token // 32, mask=here, other=0)
        y = (y.to(tl.float64) + tl.load(biases + i, mask=here, other=0.0)).to(tl.float32)
        factor = tl.load(factors + i, mask=here, other=1.0)
        wide = y.to(tl.float64)
        y = tl.where(y > 0.0, wide / factor, wide * factor).to(tl.float32)
        y = (y.to(tl.float64) - tl.load(penalties + i, mask=here, other=0.0)).to(tl.float32)
        kept = ((bits >> (token % 32)) & 1) == 1
        tl.store(out + token, tl.where(kept | (y != y), y, -_INF), mask=here)


@triton.jit(do_not_specialize=["views"])
def scan_kernel(logits, stride, edited, size, views, row_of, edit_of, key_of, temperature_of, scale_of, what_of,
          peaks, peak_ids, tempered, plain, drawn, bad, tops, groups, counts, stretch,
          R: tl.constexpr, B: tl.constexpr, G: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """One of S stretches of `stretch` blocks of each of R views. Writes, [views, S]: the largest logit and its id, the
    sums of exponentials below it, the arg max with noise, whether anything is not finite; and `tops` [views, groups],
    the largest logit of each G ids."""
    v = tl.program_id(0) * R + tl.arange(0, R)
    split = tl.program_id(1)
    live = v < views
    row = tl.load(row_of + v, mask=live, other=0).to(tl.int64)
    edit = tl.load(edit_of + v, mask=live, other=-1)
    key = tl.load(key_of + v, mask=live, other=0).to(tl.uint64, bitcast=True)
    temperature = tl.load(temperature_of + v, mask=live, other=1.0)
    scale = tl.load(scale_of + v, mask=live, other=1.0)
    what = tl.load(what_of + v, mask=live, other=0)
    draws = (what & _DRAW) > 0
    drawing = tl.max(what & _DRAW, axis=0)
    tempering = tl.max(what & _TEMPERED, axis=0)
    plainly = tl.max(what & _PLAIN, axis=0)
    octaves = scale / _OCTAVE

    peak = tl.full([R], -_INF, tl.float32)
    peak_id = tl.zeros([R], tl.int32)
    sum_t = tl.zeros([R], tl.float32)
    sum_1 = tl.zeros([R], tl.float32)
    best = tl.full([R], -1, tl.int32)
    value = tl.full([R], -_INF, tl.float32)
    lost = tl.zeros([R], tl.int32)
    for block in range(split * stretch, tl.minimum((split + 1) * stretch, tl.cdiv(size, B))):
        ids = (block * B + tl.arange(0, B))[None, :]
        there = live[:, None] & (ids < size)
        x = _load(logits, stride, edited, size, row, edit, ids, there)
        wrong = there & ((x != x) | ((edit < 0)[:, None] & ((x - x) != 0.0)))
        lost = tl.maximum(lost, tl.max(wrong.to(tl.int32), axis=1))
        x = _clean(x)
        part = block * (B // G) + tl.arange(0, B // G)
        heads = tl.max(tl.reshape(x, [R, B // G, G]), axis=2)
        tl.store(tops + v.to(tl.int64)[:, None] * groups + part[None, :], heads,
                 mask=live[:, None] & (part < groups)[None, :])  # fmt: skip
        head = tl.max(heads, axis=1)
        first = tl.min(tl.where(x == head[:, None], ids, _NONE), axis=1)
        peak_id = tl.where(head > peak, first, peak_id)
        before = peak
        peak = tl.maximum(peak, head)
        fall = tl.where(before == peak, 0.0, peak - before)
        if plainly > 0:
            less = tl.where(x == -_INF, _INF, (peak[:, None] - x) * _LOG2E)
            sum_1 = sum_1 * tl.exp2(-fall * _LOG2E) + tl.sum(tl.exp2(-less), axis=1)
        if tempering > 0:
            less = _below(peak[:, None], x, octaves[:, None])
            sum_t = sum_t * tl.exp2(-fall * octaves) + tl.sum(tl.exp2(-less), axis=1)
        if drawing > 0:
            own = _near_noise(_hash(key, best)) - _below(peak, value, scale) * _NAT
            most = _NOISE - _below(peak, head, scale) * _NAT
            hope = draws & (head > -_INF) & ((value == -_INF) | (most >= own - _MARGIN))
            if tl.max(hope.to(tl.int32), axis=0) > 0:
                free = there & (x > -_INF)
                best, value = _best(x, ids + tl.zeros([R, B], tl.int32), free, peak, scale, temperature, key,
                                    best, value)  # fmt: skip
    at = v.to(tl.int64) * S + split
    tl.store(peaks + at, peak, mask=live)
    tl.store(peak_ids + at, peak_id, mask=live)
    tl.store(tempered + at, sum_t, mask=live)
    tl.store(plain + at, sum_1, mask=live)
    tl.store(drawn + at, best, mask=live)
    tl.store(bad + at, lost, mask=live)
    tl.store(counts + v, tl.zeros([R], tl.int32), mask=live)


@triton.jit
def _kth(values, k):
    """The k-th largest of [R, N], by bisection over all floats."""
    order = _order(values)
    low = tl.zeros_like(k).to(tl.int64) - 2147483648
    high = tl.zeros_like(k).to(tl.int64) + 2147483647
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = tl.sum((order >= middle[:, None]).to(tl.int32), axis=1) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return _unordered(low)


@triton.jit(do_not_specialize=["tasks"])
def gather_kernel(logits, stride, edited, size, tasks, view_of, chooses_of, k_of, p_of, reach_of, wanted_of,
            row_of, edit_of, key_of, scale_of, peaks, peak_ids, tempered, tops, groups,
            counts, values, ids_out, stretch,
            R: tl.constexpr, B: tl.constexpr, G: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
            MOST: tl.constexpr):  # fmt: skip
    """The candidates of R tasks in one stretch: `values` and `ids_out` [tasks, MOST], in any order. More than MOST are
    counted and not kept. A task is a view's: chooses_of: is a token to be chosen? wanted_of: how many alternatives are
    to be told, from 0 on."""
    t = tl.program_id(0) * R + tl.arange(0, R)
    split = tl.program_id(1)
    live = t < tasks
    v = tl.load(view_of + t, mask=live, other=0)
    chooses = tl.load(chooses_of + t, mask=live, other=0) > 0
    wanted = tl.load(wanted_of + t, mask=live, other=0)
    k = tl.load(k_of + t, mask=live, other=0)
    p = tl.load(p_of + t, mask=live, other=1.0)
    reach = tl.load(reach_of + t, mask=live, other=0)
    row = tl.load(row_of + v, mask=live, other=0).to(tl.int64)
    edit = tl.load(edit_of + v, mask=live, other=-1)
    key = tl.load(key_of + v, mask=live, other=0).to(tl.uint64, bitcast=True)
    scale = tl.load(scale_of + v, mask=live, other=1.0)
    parts = v.to(tl.int64)[:, None] * S + tl.arange(0, S)[None, :]
    heads = tl.load(peaks + parts, mask=live[:, None], other=-_INF)
    peak = tl.max(heads, axis=1)
    first = tl.load(peak_ids + parts, mask=live[:, None], other=_NONE)
    first = tl.min(tl.where(heads == peak[:, None], first, _NONE), axis=1)
    total = _merged(heads, tl.load(tempered + parts, mask=live[:, None], other=0.0), peak, scale / _OCTAVE)

    # The likeliest id is kept whatever else is: where even the most noise does not reach it, nobody wins.
    noisy = (_NOISE - _near_noise(_hash(key, first)) + 1e-3) * (1.0 / _NAT)
    # If all ids beyond a distance weigh less than 1 - p of the whole, the others reach p without them.
    rest = tl.maximum((1.0 - p) * (1.0 - 1e-6), 2e-13).to(
        tl.float32
    )  # where even the last weight is a part of p
    light = (tl.log2(size / (rest * total * (1.0 - _SUM))) + 1e-3) * _OCTAVE
    most = tl.where(p < 1.0, tl.where(k > 0, _FAR, tl.minimum(noisy, light)), noisy)
    reach = tl.where((p < 1.0) & (k > 0), _END, reach)
    floor = tl.full([R], -_INF, tl.float32)
    floor_told = tl.full([R], -_INF, tl.float32)
    bounded = chooses & (k > 0) & (k <= groups)
    bounded_told = (wanted > 0) & (wanted <= groups)
    if tl.max((bounded | bounded_told).to(tl.int32), axis=0) > 0:
        part = tl.arange(0, N)[None, :]
        all_tops = tl.load(tops + v.to(tl.int64)[:, None] * groups + part,
                           mask=live[:, None] & (part < groups), other=-_INF)  # fmt: skip
        floor = tl.where(bounded, _kth(all_tops, k), floor)
        floor_told = tl.where(bounded_told, _kth(all_tops, wanted), floor_told)
    # Both what can be chosen and what is told are the largest: so are all that are either.
    floor = tl.where(chooses, floor, _INF)
    floor_told = tl.where(wanted > 0, floor_told, _INF)

    for block in range(split * stretch, tl.minimum((split + 1) * stretch, tl.cdiv(size, B))):
        part = block * (B // G) + tl.arange(0, B // G)
        head = tl.max(tl.load(tops + v.to(tl.int64)[:, None] * groups + part[None, :],
                              mask=live[:, None] & (part < groups)[None, :], other=-_INF), axis=1)  # fmt: skip
        hope = live & (((head >= floor) & (_below(peak, head, scale) <= most)) | (head >= floor_told))
        if tl.max(hope.to(tl.int32), axis=0) > 0:
            ids = (block * B + tl.arange(0, B))[None, :]
            there = hope[:, None] & (ids < size)
            x = _clean(_load(logits, stride, edited, size, row, edit, ids, there))
            below = _below(peak[:, None], x, scale[:, None])
            kept = (x >= floor[:, None]) & (below <= most[:, None]) & (_distance(below) <= reach[:, None])
            kept = there & (kept | (x >= floor_told[:, None]))
            number = kept.to(tl.int32)
            base = tl.atomic_add(counts + v, tl.sum(number, axis=1), mask=hope)
            place = base[:, None] + tl.cumsum(number, axis=1) - 1
            at = t.to(tl.int64)[:, None] * MOST + place
            tl.store(values + at, x, mask=kept & (place < MOST))
            tl.store(ids_out + at, ids + tl.zeros([R, B], tl.int32), mask=kept & (place < MOST))


@triton.jit
def _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few, length, crowded,
                R: tl.constexpr, B: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """(logits, ids, are they any?) of a block of what a task has to look at: its candidates, or the whole row."""
    i = (block * B + tl.arange(0, B))[None, :]
    there = i < length[:, None]
    at = t.to(tl.int64)[:, None] * MOST + i
    own = there & few[:, None]
    ids = tl.load(ids_in + at, mask=own, other=_NONE)
    x = tl.load(values + at, mask=own, other=-_INF)
    if crowded > 0:
        whole = there & (length == size)[:, None] & ~few[:, None]
        x = tl.where(whole, _clean(_load(logits, stride, edited, size, row, edit, i, whole)), x)
        ids = tl.where(whole, i, ids)
    return x, ids, there


@triton.jit(do_not_specialize=["tasks", "width"])
def select_kernel(logits, stride, edited, size, tasks, view_of, chooses_of, k_of, p_of, reach_of, wanted_of,
            row_of, edit_of, key_of, temperature_of, scale_of, peaks, peak_ids, tempered, plain,
            counts, values, ids_in, chosen, other_ids, other_values, width, blocks_of_row,
            R: tl.constexpr, B: tl.constexpr, S: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """R tasks. Writes `chosen` [views], and `other_ids` and `other_values` [tasks, width]: alternatives and their log
    probabilities, the likeliest first."""
    t = tl.program_id(0) * R + tl.arange(0, R)
    live = t < tasks
    v = tl.load(view_of + t, mask=live, other=0)
    chooses = tl.load(chooses_of + t, mask=live, other=0) > 0
    wanted = tl.load(wanted_of + t, mask=live, other=0)
    k = tl.load(k_of + t, mask=live, other=0)
    p = tl.load(p_of + t, mask=live, other=1.0)
    reach = tl.load(reach_of + t, mask=live, other=0)
    row = tl.load(row_of + v, mask=live, other=0).to(tl.int64)
    edit = tl.load(edit_of + v, mask=live, other=-1)
    key = tl.load(key_of + v, mask=live, other=0).to(tl.uint64, bitcast=True)
    temperature = tl.load(temperature_of + v, mask=live, other=1.0)
    scale = tl.load(scale_of + v, mask=live, other=1.0)
    parts = v.to(tl.int64)[:, None] * S + tl.arange(0, S)[None, :]
    heads = tl.load(peaks + parts, mask=live[:, None], other=-_INF)
    peak = tl.max(heads, axis=1)
    count = tl.load(counts + v, mask=live, other=0)
    few = count <= MOST
    length = tl.where(few, count, size)
    blocks = tl.cdiv(tl.max(tl.where(live, length, 0), axis=0), B)
    crowded = tl.max((live & ~few).to(tl.int32), axis=0)

    choosing = live & chooses
    nucleus = choosing & (p < 1.0)
    total = _merged(heads, tl.load(tempered + parts, mask=live[:, None], other=0.0), peak, scale / _OCTAVE)
    least = total.to(tl.float64) * _PEAK * (1.0 - _SUM)
    most = total.to(tl.float64) * _PEAK * (1.0 + _SUM)
    both = nucleus & (k > 0)
    if tl.max(both.to(tl.int32), axis=0) > 0:  # the weight of the k largest, which top-p is a part of
        low = tl.zeros([R], tl.int64) - 2147483648
        high = tl.zeros([R], tl.int64) + 2147483647
        for _ in range(32):
            middle = (low + high + 1) >> 1
            n = tl.zeros([R], tl.int32)
            for block in range(blocks):
                x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                            length, crowded, R, B, MOST)  # fmt: skip
                n += tl.sum((there & (_order(x) >= middle[:, None])).to(tl.int32), axis=1)
            low = tl.where(n >= k, middle, low)
            high = tl.where(n >= k, high, middle - 1)
        above = tl.zeros([R], tl.int64)
        tied = tl.zeros([R], tl.int64)
        n_above = tl.zeros([R], tl.int32)
        n_tied = tl.zeros([R], tl.int32)
        for block in range(blocks):
            x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                        length, crowded, R, B, MOST)  # fmt: skip
            weight = _weight(_distance(_below(peak[:, None], x, scale[:, None])))
            over = there & (_order(x) > low[:, None])
            same = there & (_order(x) == low[:, None])
            above += tl.sum(tl.where(over, weight, 0), axis=1)
            tied += tl.sum(tl.where(same, weight, 0), axis=1)
            n_above += tl.sum(over.to(tl.int32), axis=1)
            n_tied += tl.sum(same.to(tl.int32), axis=1)
        each = tied // tl.maximum(n_tied, 1).to(tl.int64)
        whole = (above + each * tl.minimum(k - n_above, n_tied).to(tl.int64)).to(tl.float64)
        least = tl.where(both, whole, least)
        most = tl.where(both, whole, most)

    best = tl.zeros([R], tl.int32)
    limit = tl.full([R], -_INF, tl.float32)
    limit_id = tl.full([R], _NONE, tl.int32)
    todo = choosing
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        tried = tl.full([R], -1, tl.int32)
        value = tl.full([R], -_INF, tl.float32)
        for block in range(blocks):
            x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                        length, crowded, R, B, MOST)  # fmt: skip
            near = _distance(_below(peak[:, None], x, scale[:, None])) <= reach[:, None]
            free = there & near & (x > -_INF) & _ahead(x, ids, limit[:, None], limit_id[:, None])
            tried, value = _best(x, ids, free, peak, scale, temperature, key, tried, value)
        rank = tl.zeros([R], tl.int32)
        mass = tl.zeros([R], tl.int64)
        for block in range(blocks):
            x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                        length, crowded, R, B, MOST)  # fmt: skip
            likelier = there & _ahead(x, ids, value[:, None], tried[:, None])
            weight = _weight(_distance(_below(peak[:, None], x, scale[:, None])))
            rank += tl.sum(likelier.to(tl.int32), axis=1)
            mass += tl.sum(tl.where(likelier, weight, 0), axis=1)
        before = mass.to(tl.float64)
        counted = (k == 0) | (rank < k)
        open_ = todo & nucleus & counted & (before >= p * least) & (before < p * most)
        if tl.max(open_.to(tl.int32), axis=0) > 0:
            exact = tl.zeros([R], tl.int64)
            for block in range(blocks_of_row):
                i = (block * B + tl.arange(0, B))[None, :]
                there = open_[:, None] & (i < size)
                x = _clean(_load(logits, stride, edited, size, row, edit, i, there))
                weight = _weight(_distance(_below(peak[:, None], x, scale[:, None])))
                exact += tl.sum(tl.where(there, weight, 0), axis=1)
            least = tl.where(open_, exact.to(tl.float64), least)
            most = tl.where(open_, exact.to(tl.float64), most)
        kept = counted & (~nucleus | (before < p * least))
        best = tl.where(todo, tried, best)
        todo = todo & ~kept & (value > -_INF)
        limit = tl.where(todo, value, limit)
        limit_id = tl.where(todo, tried, limit_id)
    tl.store(chosen + v, tl.maximum(best, 0), mask=choosing)

    many = tl.max(wanted, axis=0)
    if many > 0:
        log_z = peak + tl.log(_merged(heads, tl.load(plain + parts, mask=live[:, None], other=0.0), peak,
                                      tl.full([R], _LOG2E, tl.float32)))  # fmt: skip
        last = tl.full([R], _INF, tl.float32)
        last_id = tl.full([R], -1, tl.int32)
        for i in range(many):
            next_ = tl.full([R], -_INF, tl.float32)
            next_id = tl.full([R], _NONE, tl.int32)
            for block in range(blocks):
                x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                            length, crowded, R, B, MOST)  # fmt: skip
                behind = there & ((x < last[:, None]) | ((x == last[:, None]) & (ids > last_id[:, None])))
                top = tl.max(tl.where(behind, x, -_INF), axis=1)
                first = tl.min(tl.where(behind & (x == top[:, None]), ids, _NONE), axis=1)
                better = _ahead(top, first, next_, next_id)
                next_ = tl.where(better, top, next_)
                next_id = tl.where(better, first, next_id)
            last = next_
            last_id = next_id
            asked = live & (i < wanted)
            at = t.to(tl.int64) * width + i
            tl.store(other_ids + at, next_id, mask=asked)
            tl.store(
                other_values + at, ((next_ - peak).to(tl.float64) - (log_z - peak)).to(tl.float32), mask=asked
            )


@triton.jit
def accept_kernel(logits, stride, edited, size, first_of, rows_of, settled_of, plain_view_of, draft_of,
            row_of, edit_of, key_of, temperature_of, what_of, peaks, peak_ids, plain, drawn, bad, chosen,
            tokens_out, own_out, said_out, sound_out,
            P: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """One part: the token of each of its rows, P at most, and how many of them are said."""
    part = tl.program_id(0)
    first, n = tl.load(first_of + part), tl.load(rows_of + part)
    i = tl.arange(0, P)
    live = i < n
    v = first + i
    row = tl.load(row_of + v, mask=live, other=0).to(tl.int64)
    edit = tl.load(edit_of + v, mask=live, other=-1)
    key = tl.load(key_of + v, mask=live, other=0).to(tl.uint64, bitcast=True)
    temperature = tl.load(temperature_of + v, mask=live, other=1.0)
    draws = (tl.load(what_of + v, mask=live, other=0) & _DRAW) > 0
    parts = v.to(tl.int64)[:, None] * S + tl.arange(0, S)[None, :]
    heads = tl.load(peaks + parts, mask=live[:, None], other=-_INF)
    peak = tl.max(heads, axis=1)
    likeliest = tl.load(peak_ids + parts, mask=live[:, None], other=_NONE)
    likeliest = tl.min(tl.where(heads == peak[:, None], likeliest, _NONE), axis=1)

    ids = tl.load(drawn + parts, mask=live[:, None] & draws[:, None], other=-1)
    x = _clean(_load(logits, stride, edited, size, row, edit, tl.maximum(ids, 0), ids >= 0))
    value = tl.where(
        ids >= 0, x.to(tl.float64) / temperature[:, None] + _noise(_hash(key[:, None], ids)), -_INF
    )
    most = tl.max(value, axis=1)
    token = tl.min(tl.where((value == most[:, None]) & (ids >= 0), ids, _NONE), axis=1)
    token = tl.where(token == _NONE, likeliest, token)
    settled = tl.load(settled_of + v, mask=live, other=0) > 0
    token = tl.where(settled, tl.load(chosen + v, mask=live & settled, other=0), token)
    tl.store(tokens_out + v, token, mask=live)

    w = tl.load(plain_view_of + v, mask=live, other=-1)
    reported = live & (w >= 0)
    parts = w.to(tl.int64)[:, None] * S + tl.arange(0, S)[None, :]
    heads = tl.load(peaks + parts, mask=reported[:, None], other=-_INF)
    top = tl.max(heads, axis=1)
    sums = tl.load(plain + parts, mask=reported[:, None], other=0.0)
    sums = _merged(heads, sums, top, tl.full([P], _LOG2E, tl.float32))
    own = tl.load(logits + row * stride + token, mask=reported, other=0.0).to(tl.float64)
    own = own - top.to(tl.float64) - tl.log(tl.where(reported, sums, 1.0)).to(tl.float64)
    tl.store(own_out + v, own.to(tl.float32), mask=reported)

    lost = tl.max(tl.load(bad + v.to(tl.int64)[:, None] * S + tl.arange(0, S)[None, :], mask=live[:, None], other=0),
                  axis=1)  # fmt: skip
    ends = live & ((token != tl.load(draft_of + v, mask=live, other=-1)) | (lost > 0))
    last = tl.min(tl.where(ends, i, P), axis=0)
    sound = 1 - tl.max(tl.where(i == last, lost, 0), axis=0)
    tl.store(said_out + part, tl.minimum(last + sound, n))
    tl.store(sound_out + part, sound)
