"""The host's side of the kernels in `engines.vllm.kernels`: their arguments and their results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton

from wisp.engines.vllm.kernels import (
    DRAW,
    PLAIN,
    TEMPERED,
    accept_kernel,
    edit_kernel,
    gather_kernel,
    scan_kernel,
    select_kernel,
)
from wisp.engines.vllm.rows import Rows, Said, packed

MOST = 4096  # candidates of a row that are kept apart
# Ids whose largest logit is remembered: the k-th largest of these bounds what is among the k largest
GROUP = 128
ALIGNED = 16  # bytes, at multiples of which kernels' arguments begin: others would be compiled for anew
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, for tests


class Tile(NamedTuple):
    """How kernels go through logits: `rows` of them at a time, `block` ids of each (a power of 2), each row in
    `stretches` pieces side by side (a power of 2)."""

    rows: int
    block: int
    stretches: int


# For devices: one row at a time, so that its conditions are one program's; enough pieces for a few rows to be quick.
TILE = Tile(1, 1024, 16)


def answers(logits: torch.Tensor, rows: Rows, tile: Tile = TILE) -> Said:
    """What the target says at each row of `logits` [rows or more, vocabulary], waited for."""
    _, said = begin(logits, rows, tile)
    if logits.device.type == "cuda":
        torch.cuda.current_stream(logits.device).synchronize()
    return said()


def begin(logits: torch.Tensor, rows: Rows, tile: Tile = TILE) -> tuple[torch.Tensor, Callable[[], Said]]:
    """The tokens on the device, and a function that tells what the target says at each row of `logits` [rows or more,
    vocabulary], once the device is done. The logits stay as they are. One upload, and one copy back."""
    size = logits.shape[1]
    asked = rows.logprobs >= 0
    views = _views(rows, asked)
    tasks, task_of = _tasks(rows)
    n, many, width = rows.key.size, views.row.size, max(1, int(rows.logprobs.max(initial=0)))
    group = min(GROUP, tile.block)
    blocks = triton.cdiv(size, tile.block)
    groups = triton.cdiv(size, group)
    stretch = triton.cdiv(blocks, tile.stretches)
    there = _uploaded([*views, *tasks, rows.first, rows.length, rows.draft], logits.device)
    row, edit, key, temperature, scale, what, plain_view, settled = there[:8]
    todo, (first, length, draft) = there[8:14], there[14:]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    per = many * tile.stretches
    floats, whole = new(3, per), new(3, per, dtype=torch.int32)
    peaks, tempered, plain = floats[0], floats[1], floats[2]
    peak_ids, drawn, bad = whole[0], whole[1], whole[2]
    tops, counts = new(many, groups), new(many, dtype=torch.int32)
    alternatives = tasks.view.size * width
    parts = rows.first.size
    sizes = [
        -(-4 * some // ALIGNED) * ALIGNED // 4 for some in (n, n, parts, parts, alternatives, alternatives)
    ]
    out = new(sum(sizes), dtype=torch.int32)
    tokens, own, said, sound, other_ids, others = out.split(sizes)
    own, others = own.view(torch.float32), others.view(torch.float32)
    edited = _edited(logits, rows, size) if rows.edits else new(1)
    source = (logits, logits.stride(0), edited, size)
    wide = triton.cdiv(many, tile.rows)
    shape = {"R": tile.rows, "B": tile.block, "S": tile.stretches}
    scan_kernel[(wide, tile.stretches)](
        *source, many, row, edit, key, temperature, scale, what,
        peaks, peak_ids, tempered, plain, drawn, bad, tops, groups, counts, stretch, G=group, **shape,
    )  # fmt: skip
    chosen = new(max(1, n), dtype=torch.int32)
    if tasks.view.size:
        values, ids = new(tasks.view.size, MOST), new(tasks.view.size, MOST, dtype=torch.int32)
        programs = triton.cdiv(tasks.view.size, tile.rows)
        gather_kernel[(programs, tile.stretches)](
            *source, tasks.view.size, *todo, row, edit, key, scale,
            peaks, peak_ids, tempered, tops, groups, counts, values, ids, stretch,
            G=group, N=triton.next_power_of_2(groups), MOST=MOST, **shape,
        )  # fmt: skip
        select_kernel[(programs,)](
            *source, tasks.view.size, *todo, row, edit, key, temperature, scale,
            peaks, peak_ids, tempered, plain, counts, values, ids, chosen, other_ids, others, width, blocks,
            MOST=MOST, **shape,
        )  # fmt: skip
    accept_kernel[(parts,)](
        *source, first, length, settled, plain_view, draft, row, edit, key, temperature, what,
        peaks, peak_ids, plain, drawn, bad, chosen, tokens, own, said, sound,
        P=triton.next_power_of_2(int(rows.length.max(initial=1))), S=tile.stretches,
    )  # fmt: skip
    back = _back(out)
    return tokens, lambda: _said(back.split(sizes), rows, task_of, n, parts, width)


class _Views(NamedTuple):
    """See the top of this file. `plain_view`: [rows] the view that log probabilities are of, -1: none are asked for.
    `settled`: [rows] is the token chosen by select?"""

    row: npt.NDArray[np.int32]
    edit: npt.NDArray[np.int32]
    key: npt.NDArray[np.int64]
    temperature: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float32]
    what: npt.NDArray[np.int32]
    plain_view: npt.NDArray[np.int32]
    settled: npt.NDArray[np.int32]


class _Tasks(NamedTuple):
    """Of gather and select: of a view a token is chosen, or so many alternatives are told, or both."""

    view: npt.NDArray[np.int32]
    chooses: npt.NDArray[np.int32]
    k: npt.NDArray[np.int32]
    p: npt.NDArray[np.float64]
    reach: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.int32]


def _plain_views(rows: Rows) -> npt.NDArray[np.int32]:
    n = rows.key.size
    view = np.arange(n, dtype=np.int32)
    with_edits = np.array([row for row, _ in rows.edits if rows.logprobs[row] >= 0], np.int32)
    view[with_edits] = n + np.arange(with_edits.size, dtype=np.int32)
    return np.where(rows.logprobs >= 0, view, -1).astype(np.int32)


def _views(rows: Rows, asked: npt.NDArray[np.bool_]) -> _Views:
    n = rows.key.size
    plain_view = _plain_views(rows)
    again = np.flatnonzero(plain_view >= n)
    edit = np.full(n, -1, np.int32)
    edit[[row for row, _ in rows.edits]] = np.arange(len(rows.edits), dtype=np.int32)
    restricted = rows.restricted
    what = (
        DRAW * ~rows.greedy
        + TEMPERED * (restricted & (rows.top_p < 1.0) & (rows.top_k == 0))
        + PLAIN * (asked & (plain_view < n))
    )

    def more(column: npt.NDArray[Any], value: float) -> npt.NDArray[Any]:
        return np.concatenate([column, np.full(again.size, value, column.dtype)])

    return _Views(
        np.concatenate([np.arange(n), again]).astype(np.int32),
        more(edit, -1),
        more(rows.key.view(np.int64), 0),
        more(rows.temperature, 1.0),
        more(rows.scale, 1.0),
        more(what.astype(np.int32), PLAIN),
        plain_view,
        restricted.astype(np.int32),
    )


def _tasks(rows: Rows) -> tuple[_Tasks, npt.NDArray[np.int64]]:
    """And which of them tells a row's alternatives."""
    view, plain_view = np.arange(rows.key.size), _plain_views(rows)
    chosen, told = rows.restricted, rows.logprobs > 0
    both = chosen & told & (plain_view == view)
    some, more = np.flatnonzero(chosen), np.flatnonzero(told & ~both)
    task_of = np.zeros(rows.key.size, np.int64)
    task_of[some] = np.arange(some.size)
    task_of[more] = some.size + np.arange(more.size)

    def joined(column: npt.NDArray[Any], value: float) -> npt.NDArray[Any]:
        return np.concatenate([column[some], np.full(more.size, value, column.dtype)])

    tasks = _Tasks(
        np.concatenate([some, plain_view[more]]).astype(np.int32),
        np.concatenate([np.ones(some.size), np.zeros(more.size)]).astype(np.int32),
        joined(rows.top_k, 0),
        joined(rows.top_p, 1.0),
        joined(rows.reach, 0),
        np.concatenate([np.where(both, rows.logprobs, 0)[some], rows.logprobs[more]]).astype(np.int32),
    )
    return tasks, task_of


def _uploaded(arrays: list[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, by one copy."""
    padded = [-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays]
    pinned = device.type == "cuda"
    staged = torch.empty(max(ALIGNED, sum(padded)), dtype=torch.uint8, pin_memory=pinned)
    begin, memory = 0, staged.numpy()
    for array, room in zip(arrays, padded, strict=True):
        memory[begin : begin + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
        begin += room
    there, begin, tensors = staged.to(device, non_blocking=True), 0, []
    for array, room in zip(arrays, padded, strict=True):
        kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors.append(there[begin : begin + array.nbytes].view(kind))
        begin += room
    return tensors


def _edited(logits: torch.Tensor, rows: Rows, size: int) -> torch.Tensor:
    edits = packed(rows.edits, size)
    flat = edits._replace(masks=edits.masks.reshape(-1).view(np.int32))
    row, mask, first, masks, ids, biases, factors, penalties = _uploaded(list(flat), logits.device)
    edited = torch.empty((len(rows.edits), size), dtype=torch.float32, device=logits.device)
    block = min(1024, triton.next_power_of_2(size)) if logits.device.type == "cuda" else 1 << 18
    edit_kernel[(len(rows.edits), triton.cdiv(size, block))](
        logits, logits.stride(0), size, edited, row, mask, masks, edits.masks.shape[1], first, ids,
        biases, factors, penalties, B=block, enable_fp_fusion=False,
    )  # fmt: skip
    return edited


def _back(out: torch.Tensor) -> torch.Tensor:
    """On the CPU, by one copy, which the device may still have to make."""
    if out.device.type != "cuda":
        return out.cpu()
    near = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
    return near.copy_(out, non_blocking=True)


def _said(
    out: Sequence[torch.Tensor], rows: Rows, task_of: npt.NDArray[np.int64], n: int, parts: int, width: int
) -> Said:
    tokens, own, said, sound, ids, others = (some.numpy() for some in out)
    told = np.flatnonzero(rows.logprobs > 0)
    by_row = {}
    for row, task, wanted in zip(
        told.tolist(), task_of[told].tolist(), rows.logprobs[told].tolist(), strict=True
    ):
        some = slice(task * width, task * width + wanted)
        by_row[row] = (ids[some].tolist(), others.view(np.float32)[some].tolist())
    return Said(
        tokens[:n].tolist(),
        said[:parts].tolist(),
        (sound[:parts] != 0).tolist(),
        own.view(np.float32)[:n].tolist(),
        by_row,
    )
