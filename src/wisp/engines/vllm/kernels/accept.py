"""Along each draft, until the target says something else."""

from __future__ import annotations

import triton
import triton.language as tl

from wisp.engines.vllm.kernels.arithmetic import (
    DRAWS,
    INF,
    LOG2E,
    NO_ID,
    clean,
    hash_of,
    loaded,
    merged,
    noise64,
    peaks_of,
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
    draws = (tl.load(what_of + v, mask=live, other=0) & DRAWS) > 0
    parts, _heads, _peak, likeliest = peaks_of(peaks, peak_ids, v, live, S)

    ids = tl.load(drawn + parts, mask=live[:, None] & draws[:, None], other=-1)
    x = clean(loaded(logits, stride, edited, size, row, edit, tl.maximum(ids, 0), ids >= 0))
    value = tl.where(
        ids >= 0, x.to(tl.float64) / temperature[:, None] + noise64(hash_of(key[:, None], ids)), -INF
    )
    most = tl.max(value, axis=1)
    token = tl.min(tl.where((value == most[:, None]) & (ids >= 0), ids, NO_ID), axis=1)
    token = tl.where(token == NO_ID, likeliest, token)
    settled = tl.load(settled_of + v, mask=live, other=0) > 0
    token = tl.where(settled, tl.load(chosen + v, mask=live & settled, other=0), token)
    tl.store(tokens_out + v, token, mask=live)

    w = tl.load(plain_view_of + v, mask=live, other=-1)
    reported = live & (w >= 0)
    parts = w.to(tl.int64)[:, None] * S + tl.arange(0, S)[None, :]
    heads = tl.load(peaks + parts, mask=reported[:, None], other=-INF)
    top = tl.max(heads, axis=1)
    sums = tl.load(plain + parts, mask=reported[:, None], other=0.0)
    sums = merged(heads, sums, top, tl.full([P], LOG2E, tl.float32))
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
