"""The first pass over the logits: constraints written out, largest ids, sums, and the noisiest id of each stretch."""

from __future__ import annotations

import triton
import triton.language as tl

from wisp.engines.vllm.kernels.arithmetic import (
    DRAWS,
    INF,
    LOG2E,
    MARGIN,
    NAT,
    NO_ID,
    NOISE,
    OCTAVE,
    PLAINLY,
    TEMPERS,
    best_of,
    clean,
    distance32,
    hash_of,
    loaded,
    noise32,
)


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
    tl.store(out + at, tl.where(kept | (x != x), x, -INF), mask=at < size)
    tl.debug_barrier()  # the same places are written again
    begin, end = tl.load(first_of + e), tl.load(first_of + e + 1)
    for first in range(begin, end, B):
        i = first + tl.arange(0, B)
        token = tl.load(ids + i, mask=i < end, other=NO_ID)
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
        tl.store(out + token, tl.where(kept | (y != y), y, -INF), mask=here)


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
    draws = (what & DRAWS) > 0
    drawing = tl.max(what & DRAWS, axis=0)
    tempering = tl.max(what & TEMPERS, axis=0)
    plainly = tl.max(what & PLAINLY, axis=0)
    octaves = scale / OCTAVE

    peak = tl.full([R], -INF, tl.float32)
    peak_id = tl.zeros([R], tl.int32)
    sum_t = tl.zeros([R], tl.float32)
    sum_1 = tl.zeros([R], tl.float32)
    best = tl.full([R], -1, tl.int32)
    value = tl.full([R], -INF, tl.float32)
    lost = tl.zeros([R], tl.int32)
    for block in range(split * stretch, tl.minimum((split + 1) * stretch, tl.cdiv(size, B))):
        ids = (block * B + tl.arange(0, B))[None, :]
        there = live[:, None] & (ids < size)
        x = loaded(logits, stride, edited, size, row, edit, ids, there)
        wrong = there & ((x != x) | ((edit < 0)[:, None] & ((x - x) != 0.0)))
        lost = tl.maximum(lost, tl.max(wrong.to(tl.int32), axis=1))
        x = clean(x)
        part = block * (B // G) + tl.arange(0, B // G)
        heads = tl.max(tl.reshape(x, [R, B // G, G]), axis=2)
        tl.store(tops + v.to(tl.int64)[:, None] * groups + part[None, :], heads,
                 mask=live[:, None] & (part < groups)[None, :])  # fmt: skip
        head = tl.max(heads, axis=1)
        first = tl.min(tl.where(x == head[:, None], ids, NO_ID), axis=1)
        peak_id = tl.where(head > peak, first, peak_id)
        before = peak
        peak = tl.maximum(peak, head)
        fall = tl.where(before == peak, 0.0, peak - before)
        if plainly > 0:
            less = tl.where(x == -INF, INF, (peak[:, None] - x) * LOG2E)
            sum_1 = sum_1 * tl.exp2(-fall * LOG2E) + tl.sum(tl.exp2(-less), axis=1)
        if tempering > 0:
            less = distance32(peak[:, None], x, octaves[:, None])
            sum_t = sum_t * tl.exp2(-fall * octaves) + tl.sum(tl.exp2(-less), axis=1)
        if drawing > 0:
            own = noise32(hash_of(key, best)) - distance32(peak, value, scale) * NAT
            most = NOISE - distance32(peak, head, scale) * NAT
            hope = draws & (head > -INF) & ((value == -INF) | (most >= own - MARGIN))
            if tl.max(hope.to(tl.int32), axis=0) > 0:
                free = there & (x > -INF)
                best, value = best_of(x, ids + tl.zeros([R, B], tl.int32), free, peak, scale, temperature, key,
                                    best, value)  # fmt: skip
    at = v.to(tl.int64) * S + split
    tl.store(peaks + at, peak, mask=live)
    tl.store(peak_ids + at, peak_id, mask=live)
    tl.store(tempered + at, sum_t, mask=live)
    tl.store(plain + at, sum_1, mask=live)
    tl.store(drawn + at, best, mask=live)
    tl.store(bad + at, lost, mask=live)
    tl.store(counts + v, tl.zeros([R], tl.int32), mask=live)
