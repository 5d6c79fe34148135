"""`core.protocol.edits.Edit.apply` for many rows at once, on the device where their logits are.

The same operations in the same order, so the same scores bit for bit; held against it by tests. Masks
travel packed, a bit an id; everything else as pairs of (row, id).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from wisp.core.protocol.edits import Edit, Ids


def edited(logits: torch.Tensor, edits: Sequence[Edit]) -> torch.Tensor:
    """The scores [rows, vocabulary] that choices are made by, float32; `edits`: one for each row of `logits`."""
    scores = logits.float().masked_fill(~_keeps(edits, logits.shape[1], logits.device), -torch.inf)
    _each(edits, scores, lambda e: (e.biased, e.biases), _add)
    _each(edits, scores, lambda e: (e.repeated, _factors(e)), _repeat)
    _each(edits, scores, lambda e: (e.counted, e.penalties), _subtract)
    return scores


def _keeps(edits: Sequence[Edit], size: int, device: torch.device) -> torch.Tensor:
    """[rows, vocabulary]: may it be chosen? A restriction that would leave none in a row is passed over there."""
    keep = torch.ones((len(edits), size), dtype=torch.bool, device=device)
    if any(e.mask is not None for e in edits):
        keep = _unless_empty(keep, _unpacked(edits, size, device))
    if any(e.allowed is not None for e in edits):
        allowed = _marked([e.allowed for e in edits], size, device)
        free = torch.tensor([e.allowed is None for e in edits], device=device)
        keep = _unless_empty(keep, allowed | free.unsqueeze(1))
    for out in ([e.banned for e in edits], [e.early for e in edits]):
        if any(ids is not None for ids in out):
            keep = _unless_empty(keep, ~_marked(out, size, device))
    return keep


def _unless_empty(keep: torch.Tensor, restriction: torch.Tensor) -> torch.Tensor:
    left = keep & restriction
    return torch.where(left.any(dim=1, keepdim=True), left, keep)


def _unpacked(edits: Sequence[Edit], size: int, device: torch.device) -> torch.Tensor:
    words = (size + 31) // 32
    packed = np.zeros((len(edits), words), np.uint32)
    for row, edit in enumerate(edits):
        if edit.mask is None:
            packed[row] = 0xFFFFFFFF
        else:
            n = min(words, edit.mask.size)
            packed[row, :n] = edit.mask[:n]
    bits = torch.from_numpy(packed.view(np.int32)).to(device)
    each = torch.arange(32, dtype=torch.int32, device=device)
    return ((bits.unsqueeze(-1) >> each) & 1).bool().view(len(edits), 32 * words)[:, :size]


def _marked(ids: Sequence[Ids | None], size: int, device: torch.device) -> torch.Tensor:
    marks = torch.zeros((len(ids), size), dtype=torch.bool, device=device)
    rows, columns, _ = _pairs([(some, None) for some in ids], size)
    marks[_there(rows, device), _there(columns, device)] = True
    return marks


Pair = tuple[Ids | None, "npt.NDArray[np.float64] | None"]


def _each(
    edits: Sequence[Edit],
    scores: torch.Tensor,
    of: Callable[[Edit], Pair],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Replace the scores of some ids in some rows by what `change` makes of them and of the edits' values."""
    rows, columns, values = _pairs([of(e) for e in edits], scores.shape[1])
    if len(rows):
        at = (_there(rows, scores.device), _there(columns, scores.device))
        scores[at] = change(scores[at].double(), _there(values, scores.device)).float()


def _pairs(some: Sequence[Pair], size: int) -> tuple[Ids, Ids, npt.NDArray[np.float64]]:
    """Rows, ids and values, one each, without ids that the logits do not have."""
    rows, columns, values = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float64)]
    for row, (ids, value) in enumerate(some):
        if ids is not None:
            known = ids < size
            columns.append(ids[known])
            rows.append(np.full(len(columns[-1]), row, np.int64))
            values.append(value[known] if value is not None else np.zeros(len(columns[-1])))
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)


def _there(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def _factors(edit: Edit) -> npt.NDArray[np.float64] | None:
    return None if edit.repeated is None else np.full(len(edit.repeated), edit.factor)


def _add(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scores + values


def _repeat(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(scores > 0.0, scores / values, scores * values)


def _subtract(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scores - values
