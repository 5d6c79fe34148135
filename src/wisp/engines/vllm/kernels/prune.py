"""Rows with top-k, top-p or min-p, and alternatives: candidates are gathered, and chosen from."""

from __future__ import annotations

import triton
import triton.language as tl

from wisp.engines.vllm.kernels.arithmetic import (
    END,
    FAR,
    INF,
    LOG2E,
    NAT,
    NO_ID,
    NOISE,
    OCTAVE,
    PEAK,
    SUM,
    best_of,
    clean,
    distance32,
    distance_of,
    float_of,
    halved,
    hash_of,
    is_ahead,
    loaded,
    merged,
    noise32,
    order_of,
    peaks_of,
    weight_of,
)


@triton.jit
def _kth(values, k):
    """The k-th largest of [R, N], by bisection over all floats."""
    order = order_of(values)
    low = tl.zeros_like(k).to(tl.int64) - 2147483648
    high = tl.zeros_like(k).to(tl.int64) + 2147483647
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = tl.sum((order >= middle[:, None]).to(tl.int32), axis=1) >= k
        low, high = halved(low, high, middle, enough)
    return float_of(low)


@triton.jit
def _asked(t, live, view_of, chooses_of, k_of, p_of, reach_of, wanted_of, row_of, edit_of, key_of, scale_of):
    """Of the tasks `t`: (view, is a token to be chosen?, alternatives wanted, k, p, reach, row, edit, key, scale)."""
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
    return v, chooses, wanted, k, p, reach, row, edit, key, scale


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
    v, chooses, wanted, k, p, reach, row, edit, key, scale = _asked(
        t, live, view_of, chooses_of, k_of, p_of, reach_of, wanted_of, row_of, edit_of, key_of, scale_of
    )
    parts, heads, peak, first = peaks_of(peaks, peak_ids, v, live, S)
    total = merged(heads, tl.load(tempered + parts, mask=live[:, None], other=0.0), peak, scale / OCTAVE)

    # The likeliest id is kept whatever else is: where even the most noise does not reach it, nobody wins.
    noisy = (NOISE - noise32(hash_of(key, first)) + 1e-3) * (1.0 / NAT)
    # If all ids beyond a distance weigh less than 1 - p of the whole, the others reach p without them.
    rest = tl.maximum((1.0 - p) * (1.0 - 1e-6), 2e-13).to(
        tl.float32
    )  # where even the last weight is a part of p
    light = (tl.log2(size / (rest * total * (1.0 - SUM))) + 1e-3) * OCTAVE
    most = tl.where(p < 1.0, tl.where(k > 0, FAR, tl.minimum(noisy, light)), noisy)
    reach = tl.where((p < 1.0) & (k > 0), END, reach)
    floor = tl.full([R], -INF, tl.float32)
    floor_told = tl.full([R], -INF, tl.float32)
    bounded = chooses & (k > 0) & (k <= groups)
    bounded_told = (wanted > 0) & (wanted <= groups)
    if tl.max((bounded | bounded_told).to(tl.int32), axis=0) > 0:
        part = tl.arange(0, N)[None, :]
        all_tops = tl.load(tops + v.to(tl.int64)[:, None] * groups + part,
                           mask=live[:, None] & (part < groups), other=-INF)  # fmt: skip
        floor = tl.where(bounded, _kth(all_tops, k), floor)
        floor_told = tl.where(bounded_told, _kth(all_tops, wanted), floor_told)
    # Both what can be chosen and what is told are the largest: so are all that are either.
    floor = tl.where(chooses, floor, INF)
    floor_told = tl.where(wanted > 0, floor_told, INF)

    for block in range(split * stretch, tl.minimum((split + 1) * stretch, tl.cdiv(size, B))):
        part = block * (B // G) + tl.arange(0, B // G)
        head = tl.max(tl.load(tops + v.to(tl.int64)[:, None] * groups + part[None, :],
                              mask=live[:, None] & (part < groups)[None, :], other=-INF), axis=1)  # fmt: skip
        hope = live & (((head >= floor) & (distance32(peak, head, scale) <= most)) | (head >= floor_told))
        if tl.max(hope.to(tl.int32), axis=0) > 0:
            ids = (block * B + tl.arange(0, B))[None, :]
            there = hope[:, None] & (ids < size)
            x = clean(loaded(logits, stride, edited, size, row, edit, ids, there))
            below = distance32(peak[:, None], x, scale[:, None])
            kept = (x >= floor[:, None]) & (below <= most[:, None]) & (distance_of(below) <= reach[:, None])
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
    ids = tl.load(ids_in + at, mask=own, other=NO_ID)
    x = tl.load(values + at, mask=own, other=-INF)
    if crowded > 0:
        whole = there & (length == size)[:, None] & ~few[:, None]
        x = tl.where(whole, clean(loaded(logits, stride, edited, size, row, edit, i, whole)), x)
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
    v, chooses, wanted, k, p, reach, row, edit, key, scale = _asked(
        t, live, view_of, chooses_of, k_of, p_of, reach_of, wanted_of, row_of, edit_of, key_of, scale_of
    )
    temperature = tl.load(temperature_of + v, mask=live, other=1.0)
    parts, heads, peak, _first = peaks_of(peaks, peak_ids, v, live, S)
    count = tl.load(counts + v, mask=live, other=0)
    few = count <= MOST
    length = tl.where(few, count, size)
    blocks = tl.cdiv(tl.max(tl.where(live, length, 0), axis=0), B)
    crowded = tl.max((live & ~few).to(tl.int32), axis=0)

    choosing = live & chooses
    nucleus = choosing & (p < 1.0)
    total = merged(heads, tl.load(tempered + parts, mask=live[:, None], other=0.0), peak, scale / OCTAVE)
    least = total.to(tl.float64) * PEAK * (1.0 - SUM)
    most = total.to(tl.float64) * PEAK * (1.0 + SUM)
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
                n += tl.sum((there & (order_of(x) >= middle[:, None])).to(tl.int32), axis=1)
            low, high = halved(low, high, middle, n >= k)
        above = tl.zeros([R], tl.int64)
        tied = tl.zeros([R], tl.int64)
        n_above = tl.zeros([R], tl.int32)
        n_tied = tl.zeros([R], tl.int32)
        for block in range(blocks):
            x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                        length, crowded, R, B, MOST)  # fmt: skip
            weight = weight_of(distance_of(distance32(peak[:, None], x, scale[:, None])))
            over = there & (order_of(x) > low[:, None])
            same = there & (order_of(x) == low[:, None])
            above += tl.sum(tl.where(over, weight, 0), axis=1)
            tied += tl.sum(tl.where(same, weight, 0), axis=1)
            n_above += tl.sum(over.to(tl.int32), axis=1)
            n_tied += tl.sum(same.to(tl.int32), axis=1)
        each = tied // tl.maximum(n_tied, 1).to(tl.int64)
        whole = (above + each * tl.minimum(k - n_above, n_tied).to(tl.int64)).to(tl.float64)
        least = tl.where(both, whole, least)
        most = tl.where(both, whole, most)

    best = tl.zeros([R], tl.int32)
    limit = tl.full([R], -INF, tl.float32)
    limit_id = tl.full([R], NO_ID, tl.int32)
    todo = choosing
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        tried = tl.full([R], -1, tl.int32)
        value = tl.full([R], -INF, tl.float32)
        for block in range(blocks):
            x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                        length, crowded, R, B, MOST)  # fmt: skip
            near = distance_of(distance32(peak[:, None], x, scale[:, None])) <= reach[:, None]
            free = there & near & (x > -INF) & is_ahead(x, ids, limit[:, None], limit_id[:, None])
            tried, value = best_of(x, ids, free, peak, scale, temperature, key, tried, value)
        rank = tl.zeros([R], tl.int32)
        mass = tl.zeros([R], tl.int64)
        for block in range(blocks):
            x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                        length, crowded, R, B, MOST)  # fmt: skip
            likelier = there & is_ahead(x, ids, value[:, None], tried[:, None])
            weight = weight_of(distance_of(distance32(peak[:, None], x, scale[:, None])))
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
                x = clean(loaded(logits, stride, edited, size, row, edit, i, there))
                weight = weight_of(distance_of(distance32(peak[:, None], x, scale[:, None])))
                exact += tl.sum(tl.where(there, weight, 0), axis=1)
            least = tl.where(open_, exact.to(tl.float64), least)
            most = tl.where(open_, exact.to(tl.float64), most)
        kept = counted & (~nucleus | (before < p * least))
        best = tl.where(todo, tried, best)
        todo = todo & ~kept & (value > -INF)
        limit = tl.where(todo, value, limit)
        limit_id = tl.where(todo, tried, limit_id)
    tl.store(chosen + v, tl.maximum(best, 0), mask=choosing)

    many = tl.max(wanted, axis=0)
    if many > 0:
        log_z = peak + tl.log(merged(heads, tl.load(plain + parts, mask=live[:, None], other=0.0), peak,
                                      tl.full([R], LOG2E, tl.float32)))  # fmt: skip
        last = tl.full([R], INF, tl.float32)
        last_id = tl.full([R], -1, tl.int32)
        for i in range(many):
            next_ = tl.full([R], -INF, tl.float32)
            next_id = tl.full([R], NO_ID, tl.int32)
            for block in range(blocks):
                x, ids, there = _candidates(block, logits, stride, edited, size, row, edit, values, ids_in, t, few,
                                            length, crowded, R, B, MOST)  # fmt: skip
                behind = there & ((x < last[:, None]) | ((x == last[:, None]) & (ids > last_id[:, None])))
                top = tl.max(tl.where(behind, x, -INF), axis=1)
                first = tl.min(tl.where(behind & (x == top[:, None]), ids, NO_ID), axis=1)
                better = is_ahead(top, first, next_, next_id)
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
