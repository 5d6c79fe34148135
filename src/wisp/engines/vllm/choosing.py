"""The target's tokens along the parts of a step, chosen from the logits of their sampled rows.

The rule is `core.protocol.sampling`; tests compare every implementation with it.

    on the CPU                  the rule itself, row by row, no further than a draft is accepted
    on a device with Triton     `fused`: four kernels for all rows
    on a device without Triton  here, by torch: the few ids near the top of each row that can matter are picked, and
                                only these are sorted
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import (
    _GOLDEN,
    _GUMBEL_MAX,
    _MASK,
    FAR,
    OCTAVE,
    PEAK_BITS,
    WEIGHT,
    Sampling,
    log_probability,
    target_token,
)
from wisp.core.protocol.step import TokenLogprob, TopLogprob
from wisp.engines.vllm.editing import edited
from wisp.engines.vllm.parts import Chosen, Part
from wisp.engines.vllm.rows import Rows, Said, accepted, rows_of

log = logging.getLogger("wisp.vllm")

Begin = Callable[[torch.Tensor, Rows], tuple[torch.Tensor, Callable[[], Said]]]
ROWS = 32  # at a time: 4 to 8 bytes * vocabulary * a dozen temporaries each
# Whatever the noise, an id so far below the largest cannot win: the likeliest one's own is at least -log(log(2^33)).
_HOPELESS = int((_GUMBEL_MAX + 3.2) * np.log2(np.e) * OCTAVE)
_LARGEST = float(np.finfo(np.float32).max)


class Choice(NamedTuple):
    """Choices of a step that a device may still have to make.

    tokens: [rows] the target's token at each row, where the logits are; on the CPU 0 behind the last one said of a part
    chosen: tells all, once the device is done
    """

    tokens: torch.Tensor
    chosen: Callable[[], list[Chosen]]


def choose(logits: torch.Tensor, parts: Sequence[Part], *, here: bool) -> Choice:
    """The target's tokens along each part; `logits` [rows of all parts in order, vocabulary].

    here: by the rule itself, on the CPU; otherwise by its counterpart for devices, all rows at once
    """
    if here:
        chosen = list(_by_rule(logits, parts))
        padded = [c.tokens + [0] * (p.rows - len(c.tokens)) for c, p in zip(chosen, parts, strict=True)]
        return Choice(torch.tensor([token for tokens in padded for token in tokens]), lambda: chosen)
    rows = rows_of(parts, logits.shape[1])
    if not rows.key.size:
        return Choice(logits.new_zeros(0), lambda: [Chosen([], []) for _ in parts])
    begin = _way(str(logits.device), logits.dtype, logits.shape[1])
    tokens, said = begin(logits[: rows.key.size], rows)
    seen = [
        logits[first : first + part.rows].float().cpu().numpy().copy() if part.observed else None
        for part, first in zip(parts, rows.first.tolist(), strict=True)
    ]
    return Choice(tokens, lambda: list(_chosen(parts, rows, said(), seen)))


@functools.cache
def _way(device: str, dtype: torch.dtype, size: int) -> Begin:
    """How logits of `size` ids are chosen from on a device: by the kernels, if they can be built there. They are
    built now, so that no step has to wait for that."""
    if device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return begin
    try:
        from wisp.engines.vllm import fused

        for n in (1, 2, 4, 8, 16):
            how = Sampling(1.0, 9, 0.9, min_tokens=1, ends=(0,))
            part = Part([1] * (n - 1), True, 0, how, 2)
            fused.answers(torch.zeros((n, size), dtype=dtype, device=device), rows_of([part], size))
    except Exception as error:  # whatever a compiler has against a device
        log.warning(
            "tokens are chosen by torch, which is slower: Triton does not work on %s (%s)", device, error
        )
        return begin
    return fused.begin


def _by_rule(logits: torch.Tensor, parts: Sequence[Part]) -> Iterator[Chosen]:
    rows = logits.float().numpy()
    finite: list[bool] = np.isfinite(rows).all(axis=1).tolist()
    plain = (p.sampling.greedy and not p.sampling.barred(p.position) and not p.edits for p in parts if p.rows)
    greedy: list[int] | None = rows.argmax(axis=1).tolist() if all(plain) else None  # of equal ones the first
    first = 0
    for part in parts:
        span = range(first, first + part.rows)
        first += part.rows
        tokens: list[int] = []
        entries: list[TokenLogprob] = []
        sound = True
        for i, row in enumerate(span):
            if not finite[row]:
                sound = False
                break
            how = (part.sampling, part.position + i, part.edit(i))
            tokens.append(target_token(rows[row], *how) if greedy is None else greedy[row])
            if part.logprobs is not None:
                own, best = log_probability(rows[row], tokens[-1], part.logprobs)
                entries.append(TokenLogprob(tokens[-1], own, [TopLogprob(*pair) for pair in best]))
            if i >= len(part.draft) or tokens[-1] != part.draft[i]:
                break
        seen = rows[span.start : span.stop].copy() if part.observed else None
        yield Chosen(tokens, entries, seen, sound)


def _chosen(parts: Sequence[Part], rows: Rows, said: Said, seen: Sequence[Any]) -> Iterator[Chosen]:
    """The answers, part by part, with the logits that were to be `seen`."""
    for part, first, n, sound, logits in zip(
        parts, rows.first.tolist(), said.said, said.sound, seen, strict=True
    ):
        span = range(first, first + n)
        entries: list[TokenLogprob] = []
        if part.logprobs is not None:
            for row in span:
                tops = map(TopLogprob, *said.others[row]) if row in said.others else ()
                entries.append(TokenLogprob(said.tokens[row], said.own[row], list(tops)))
        yield Chosen(said.tokens[first : first + n], entries, logits, sound)


# -- by torch


def answers(logits: torch.Tensor, rows: Rows) -> Said:
    """What the target says at each row of `logits` [rows, vocabulary]."""
    return begin(logits, rows)[1]()


def begin(logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, Callable[[], Said]]:
    """The tokens on the device, and a function that tells what the target says at each row of `logits`, which stay as
    they are. All that is asked goes there at once, and all that is said comes back at once. It waits for the device."""
    columns: list[npt.NDArray[Any]] = [
        rows.key.view(np.int64),
        rows.temperature.view(np.int64),
        rows.top_p.view(np.int64),
    ]
    columns += [rows.scale.astype(np.float64).view(np.int64), rows.top_k, rows.reach, rows.greedy]
    there = torch.from_numpy(np.stack([column.astype(np.int64) for column in columns])).to(logits.device)
    edits = dict(rows.edits)
    found = [
        _some(logits, rows, there, edits, first, min(first + ROWS, rows.key.size))
        for first in range(0, rows.key.size, ROWS)
    ]
    width = max(1, int(rows.logprobs.max()))
    there = torch.cat(found)
    back = there.cpu().numpy()
    values = back.view(np.float64)
    tokens, finite = back[:, 0], back[:, 1] != 0
    said, sound = accepted(rows, tokens, finite)
    asked = np.flatnonzero(rows.logprobs > 0).tolist()
    others = {
        row: (back[row, 3 : 3 + n].tolist(), values[row, 3 + width : 3 + width + n].tolist())
        for row, n in zip(asked, rows.logprobs[asked].tolist(), strict=True)
    }
    all_said = Said(tokens.tolist(), said, sound, values[:, 2].tolist(), others)
    return there[:, 0], lambda: all_said


def _some(
    logits: torch.Tensor, rows: Rows, there: torch.Tensor, edits: dict[int, Edit], first: int, end: int
) -> torch.Tensor:
    """Of these rows, [rows, columns] int64: token, is the row finite, its log probability (the bits of a float64), then
    the alternatives' ids, then their log probabilities."""
    given = logits[first:end].float()
    raw = x = torch.nan_to_num(given, nan=-torch.inf, posinf=_LARGEST, neginf=-torch.inf)
    if changed := [row for row in range(first, end) if row in edits]:
        at = torch.tensor([row - first for row in changed], device=raw.device)
        x = raw.index_copy(0, at, edited(raw[at], [edits[row] for row in changed]))
    tokens = x.argmax(dim=1)  # of equal ones the first
    if not rows.greedy[first:end].all():
        drawn = _drawn(x, there[:, first:end], rows, slice(first, end))
        tokens = torch.where(there[6, first:end] != 0, tokens, drawn)
    columns = [tokens.unsqueeze(1), torch.isfinite(given).all(dim=1, keepdim=True).long()]
    asked = rows.logprobs[first:end]
    width = max(1, int(rows.logprobs.max()))
    if (asked >= 0).any():
        peak = raw.amax(dim=1, keepdim=True)
        log_z = peak.double() + (raw - peak).exp().sum(dim=1, keepdim=True).log().double()
        columns.append((raw.gather(1, columns[0]).double() - log_z).view(torch.int64))
        ids, values = _largest(raw, width)
        columns += [ids, (values.double() - log_z).view(torch.int64)]
    else:
        columns.append(tokens.new_zeros((end - first, 1 + 2 * width)))
    return torch.cat(columns, dim=1)


def _largest(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n largest of each row, [rows, n] each of ids and values; ties by lower id, which torch does not promise."""
    n_there = min(n, x.shape[1])
    least = x.topk(n_there, dim=1).values[:, -1:]
    row, ids = torch.nonzero(x >= least, as_tuple=True)
    values = x[row, ids]
    order, rank = _ranked(row, values, x.shape[0])
    some = order[rank < n_there]
    pad = (0, n - n_there)
    shape = (x.shape[0], n_there)
    fill = torch.nn.functional.pad
    return fill(ids[some].view(shape), pad), fill(values[some].view(shape), pad)


def _ranked(row: torch.Tensor, values: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of entries by row, then from the largest value on, ties as they stand; and each one's rank in its row,
    in that order. `row` ascends."""
    bits = torch.where(values == 0.0, 0.0, values).view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    order = torch.sort(row * (1 << 32) - rising, stable=True).indices
    return order, torch.arange(row.numel(), device=row.device) - _starts(row, rows)[row]


def _starts(row: torch.Tensor, rows: int) -> torch.Tensor:
    counts = torch.bincount(row, minlength=rows)
    return torch.cumsum(counts, 0) - counts


def _drawn(x: torch.Tensor, there: torch.Tensor, rows: Rows, span: slice) -> torch.Tensor:
    """The tokens of rows of scores."""
    key, top_k, reach = there[0], there[4], there[5]
    temperature, p, scale = (there[i].view(torch.float64) for i in (1, 2, 3))
    n, size = x.shape
    below = (x.amax(dim=1, keepdim=True) - x) * scale.float().unsqueeze(1)
    away = torch.where(below < FAR, below, FAR).int()  # also where nothing is left to subtract
    most = torch.where((top_k > 0) & (p < 1.0), FAR, _HOPELESS)
    picked = away <= most.unsqueeze(1)
    k = int(rows.top_k[span].max())
    if k:
        heads = x.topk(k, dim=1).values.gather(1, (top_k - 1).clamp(min=0).unsqueeze(1))
        picked &= torch.where(top_k.unsqueeze(1) > 0, x >= heads, True)
    row, ids = torch.nonzero(picked, as_tuple=True)
    if rows.restricted[span].any():
        order, rank = _ranked(row, x[row, ids], n)
        ids, away_of = ids[order], away[row, ids[order]]  # rows stay in place
        kept = ((top_k[row] == 0) | (rank < top_k[row])) & (away_of <= reach[row])
        if (rows.top_p[span] < 1.0).any():
            kept &= _nucleus(row, rank, away, away_of, top_k, p)
        row, ids = row[kept], ids[kept]
    values = x[row, ids].double() / temperature[row] + _gumbels(key[row], ids)
    best = values.new_full((n,), -torch.inf).scatter_reduce(0, row, values, "amax")
    ids = torch.where(values == best[row], ids, size)
    return ids.new_full((n,), size).scatter_reduce(0, row, ids, "amin").clamp(max=size - 1)


def _nucleus(
    row: torch.Tensor,
    rank: torch.Tensor,
    away: torch.Tensor,
    away_of: torch.Tensor,
    top_k: torch.Tensor,
    p: Any,
) -> torch.Tensor:
    """Which of the entries, in order, do those before them in their row leave something of p for?"""
    n = p.numel()
    weight = _weights(away_of)
    some = weight * ((top_k[row] == 0) | (rank < top_k[row]))
    whole = torch.zeros_like(top_k).index_add(0, row, some)
    if (free := (top_k == 0) & (p < 1.0)).any():
        whole = torch.where(free, _weights(away).sum(dim=1), whole)
    sums = torch.cumsum(weight, 0) - weight
    starts = _starts(row, n).clamp(max=max(0, row.numel() - 1))
    before = sums - sums[starts][row]
    return (p[row] == 1.0) | (before.double() < p[row] * whole[row].double())


def _weights(away: torch.Tensor) -> torch.Tensor:
    """`core.protocol.sampling.weights`."""
    part = (away & (OCTAVE - 1)).long()
    power = torch.full_like(part, WEIGHT[-1])
    for term in WEIGHT[-2::-1]:
        power = term - (power * part >> 24)
    return power << PEAK_BITS - 30 >> (away >> 24)


def _gumbels(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Noise of these pairs: SplitMix64 in wrapping 64-bit arithmetic."""
    x = (ids + 1) * _signed(_GOLDEN) + keys
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = _shifted(x ^ _shifted(x, 31), 32)
    return -torch.log(-torch.log((x.double() + 0.5) / 4294967296.0))


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros coming in (torch's own shift brings in the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x
