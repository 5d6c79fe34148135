"""The sampled rows of a step and their answers as NumPy arrays, for all implementations of the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wisp.core.protocol.edits import Bits, Edit, Ids, Values
from wisp.core.protocol.sampling import Sampling, keys, reach, scale
from wisp.engines.vllm.parts import Part

_MASK = (1 << 64) - 1
Ints = npt.NDArray[np.int32]


class Rows(NamedTuple):
    """The rows of all parts in order, n of them.

    first, length: [parts] a part's first row, and how many it has (0: a prefill)
    draft:        [n] the draft token that each row is compared with, -1 behind the last of a part
    key:          [n] uint64, of the rule's hash
    greedy:       [n] the likeliest id is chosen, and the next four are off
    temperature, scale: [n] 1.0 where greedy; the rule's distance per logit
    top_k, top_p, reach: [n] 0, 1.0 and the rule's FAR are off
    logprobs:     [n] how many alternatives to report, -1: no log probabilities at all
    edits:        (row, what constraints make of its logits), in order
    """

    first: Ints
    length: Ints
    draft: Ints
    key: npt.NDArray[np.uint64]
    greedy: npt.NDArray[np.bool_]
    temperature: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float32]
    top_k: Ints
    top_p: npt.NDArray[np.float64]
    reach: Ints
    logprobs: Ints
    edits: list[tuple[int, Edit]]

    @property
    def restricted(self) -> npt.NDArray[np.bool_]:
        """[n] is top-k, top-p or min-p on?"""
        off = (self.top_k == 0) & (self.top_p == 1.0) & (self.reach == _OFF)
        on: npt.NDArray[np.bool_] = ~self.greedy & ~off
        return on


class Said(NamedTuple):
    """Answers.

    tokens: [n] the target's token at each row
    said:   [parts] how many of a part's rows are said: up to the first that is not its draft token, or the last before
            one that is not finite
    sound:  [parts] is there no such row?
    own:    [n] log probabilities of `tokens`, where asked for
    others: by row, where alternatives are asked for: their ids and log probabilities, the likeliest first
    """

    tokens: list[int]
    said: list[int]
    sound: list[bool]
    own: list[float]
    others: dict[int, tuple[list[int], list[float]]]


_OFF = reach(0.0)


def rows_of(parts: Sequence[Part], size: int) -> Rows:
    """Of parts whose logits have `size` ids."""
    length = np.array([part.rows for part in parts], np.int32)
    first = np.cumsum(length, dtype=np.int32) - length
    draft: list[int] = []
    seeds, positions, kinds, logprobs = [], [], [], []
    known: dict[tuple[float, int, float, float], int] = {}  # most sessions ask for the same
    distinct: list[Sampling] = []
    for part in parts:
        if not part.sample:
            continue
        draft += part.draft
        draft.append(-1)
        how = part.sampling
        kind = known.setdefault((how.temperature, how.top_k, how.top_p, how.min_p), len(distinct))
        if kind == len(distinct):
            distinct.append(how)
        kinds.append(kind)
        seeds.append(how.seed & _MASK)
        positions.append(part.position)
        logprobs.append(-1 if part.logprobs is None else min(part.logprobs, size))
    per = length[length > 0]
    of = np.repeat(np.arange(per.size), per)
    begun = first[length > 0][of]
    kind_of = np.array(kinds, np.int64)[of]

    def each(values: list[Any], kind: Any) -> npt.NDArray[Any]:
        return np.array(values, kind)[kind_of]

    return Rows(
        first,
        length,
        np.array(draft, np.int32),
        keys(np.array(seeds, np.uint64)[of], np.array(positions, np.int64)[of] + np.arange(of.size) - begun),
        each([how.greedy for how in distinct], np.bool_),
        each([1.0 if how.greedy else how.temperature for how in distinct], np.float64),
        each([1.0 if how.greedy else scale(how.temperature) for how in distinct], np.float32),
        each([how.top_k if how.top_k < size else 0 for how in distinct], np.int32),
        each([how.top_p for how in distinct], np.float64),
        each([reach(how.min_p) for how in distinct], np.int32),
        np.array(logprobs, np.int32)[of],
        list(_edits(parts, first)),
    )


def _edits(parts: Sequence[Part], first: Ints) -> Any:
    for part, row in zip(parts, first.tolist(), strict=True):
        if part.sample and (part.edits or part.sampling.min_tokens > part.position):
            for i in range(part.rows):
                edit = part.edit(i)
                if edit is None and (barred := part.sampling.barred(part.position + i)):
                    edit = Edit(early=np.array(barred, np.int64))
                if edit is not None:
                    yield row + i, edit


class Packed(NamedTuple):
    """Edits, as they travel: [edits] their rows, which of the masks each has (the first lets all through) and where its
    changes begin (one entry more at the end); [masks, words]; and of each changed id what is added, what its score is
    divided or multiplied by, and what is subtracted."""

    row: Ints
    mask: Ints
    first: Ints
    masks: npt.NDArray[np.uint32]
    ids: Ints
    biases: Values
    factors: Values
    penalties: Values


def packed(edits: Sequence[tuple[int, Edit]], size: int) -> Packed:
    """Of edits of logits with `size` ids."""
    masks: list[Bits] = [np.full((size + 31) // 32, 0xFFFFFFFF, np.uint32)]
    mask_of, changes = [], []
    for _, edit in edits:
        bits = edit.packed(size)
        mask_of.append(0 if bits is None else len(masks))
        if bits is not None:
            masks.append(bits)
        changes.append(_changes(edit, size))
    ids, biases, factors, penalties = (np.concatenate(column) for column in zip(*changes, strict=True))
    return Packed(
        np.array([row for row, _ in edits], np.int32),
        np.array(mask_of, np.int32),
        np.cumsum([0, *(len(some[0]) for some in changes)], dtype=np.int32),
        np.stack(masks),
        ids.astype(np.int32),
        biases,
        factors,
        penalties,
    )


def _changes(edit: Edit, size: int) -> tuple[Ids, Values, Values, Values]:
    """Of one edit, for each id that is changed."""
    some = [ids for ids in (edit.biased, edit.repeated, edit.counted) if ids is not None]
    ids = np.unique(np.concatenate(some)) if some else np.empty(0, np.int64)
    ids = ids[ids < size]
    biases, factors, penalties = np.zeros(ids.size), np.ones(ids.size), np.zeros(ids.size)
    for named, values, into in (
        (edit.biased, edit.biases, biases),
        (edit.repeated, None, factors),
        (edit.counted, edit.penalties, penalties),
    ):
        if named is not None:
            known = named < size
            into[np.searchsorted(ids, named[known])] = edit.factor if values is None else values[known]
    return ids, biases, factors, penalties


def accepted(
    rows: Rows, tokens: npt.NDArray[np.integer], finite: npt.NDArray[np.bool_]
) -> tuple[list[int], list[bool]]:
    """`Said.said` and `Said.sound`, of tokens and of whether a row's logits are finite, [n] each."""
    n = tokens.size
    ends = np.where((tokens != rows.draft) | ~finite, np.arange(n), n)
    some = np.flatnonzero(rows.length)
    last = np.minimum.reduceat(ends, rows.first[some])
    said, sound = np.zeros(rows.length.size, np.int64), np.ones(rows.length.size, np.bool_)
    sound[some] = finite[last]
    said[some] = last - rows.first[some] + sound[some]
    return said.tolist(), sound.tolist()
