"""`core.protocol.sampling.target_token` for many rows at once, on the device where their logits are.

The same rule, hash and order of operations in float64; held against the rule itself by tests. A few dozen passes
over [rows, vocabulary] are cheap for an accelerator; on a CPU the rule itself, which looks at few ids, is quicker.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import _GOLDEN, _MASK, Sampling, _key
from wisp.engines.vllm.editing import edited

Asked = tuple[Sampling, int]  # how, and at which position

ROWS = 16  # at a time: 8 bytes * vocabulary * a dozen temporaries each
_FREE: Asked = (Sampling(), 0)


def target_tokens(
    logits: torch.Tensor, asked: Sequence[Asked], edits: Sequence[Edit | None] | None = None
) -> list[int]:
    """The target's token at each row of `logits` [rows, vocabulary]; `edits`: of the rows' constraints."""
    edits = edits or [None] * len(asked)
    unedited = [how if edit is None else _FREE for how, edit in zip(asked, edits, strict=True)]
    logits = _without_barred(logits, unedited)
    tokens = torch.argmax(logits, dim=1)  # of equal ones the first
    drawn = [i for i, (s, _) in enumerate(asked) if not s.greedy and edits[i] is None]
    for first in range(0, len(drawn), ROWS):
        some = torch.tensor(drawn[first : first + ROWS], device=logits.device)
        tokens[some] = _draw(logits[some], [asked[i] for i in drawn[first : first + ROWS]])
    if any(edit is not None for edit in edits):
        _choose_edited(logits, asked, edits, tokens)
    return [int(token) for token in tokens.tolist()]


def _choose_edited(
    logits: torch.Tensor, asked: Sequence[Asked], edits: Sequence[Edit | None], tokens: torch.Tensor
) -> None:
    """Into `tokens`, those of the rows with edits."""
    for greedy in (True, False):
        rows = [(i, e) for i, e in enumerate(edits) if e is not None and asked[i][0].greedy == greedy]
        for first in range(0, len(rows), ROWS):
            some = rows[first : first + ROWS]
            at = torch.tensor([i for i, _ in some], device=logits.device)
            scores = edited(logits[at], [edit for _, edit in some])
            how = [asked[i] for i, _ in some]
            tokens[at] = torch.argmax(scores, dim=1) if greedy else _draw(scores, how)


def _without_barred(logits: torch.Tensor, asked: Sequence[tuple[Sampling, int]]) -> torch.Tensor:
    """`logits`, with minus infinity for ids that may not be chosen yet; a copy where there are any."""
    size = logits.shape[1]
    pairs = [
        (row, i)
        for row, (sampling, position) in enumerate(asked)
        for i in sampling.barred(position)
        if i < size
    ]
    if not pairs:
        return logits
    rows, ids = torch.tensor(pairs, device=logits.device).unbind(1)
    return logits.index_put((rows, ids), logits.new_tensor(-torch.inf))


def _draw(logits: torch.Tensor, asked: Sequence[tuple[Sampling, int]]) -> torch.Tensor:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    scores = logits.double() / column([s.temperature for s, _ in asked])
    size = scores.shape[1]
    if any(0 < s.top_k < size or s.top_p < 1.0 or s.min_p > 0.0 for s, _ in asked):
        counts = column([s.top_k if 0 < s.top_k < size else size for s, _ in asked])
        scores = _kept(
            scores, counts, column([s.top_p for s, _ in asked]), column([s.min_p for s, _ in asked])
        )
    keys = torch.tensor([_signed(_key(s.seed, p)) for s, p in asked], dtype=torch.int64, device=logits.device)
    return torch.argmax(scores + _gumbels(keys, size), dim=1)


def _kept(scores: torch.Tensor, k: torch.Tensor, p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """`scores`, with minus infinity for the ids that top-k, then top-p, then min-p leave out."""
    ordered, ids = torch.sort(scores, dim=1, descending=True, stable=True)  # ties by lower id
    out = torch.arange(scores.shape[1], device=scores.device).unsqueeze(0) >= k
    weights = torch.exp(ordered - ordered[:, :1]).masked_fill(out, 0.0)
    before = torch.cumsum(weights, dim=1) - weights
    # An id is left out once those before it reach p. p = 1 is off: sums may reach their total early.
    out |= (before >= p * weights.sum(dim=1, keepdim=True)) & (p < 1.0)
    out |= ordered < ordered[:, :1] + torch.log(min_p)
    out[:, 0] = False
    return scores.scatter(1, ids, ordered.masked_fill(out, -torch.inf))


def _gumbels(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Noise [rows, size] from the rows' keys: SplitMix64 in wrapping 64-bit arithmetic."""
    ids = torch.arange(1, size + 1, dtype=torch.int64, device=keys.device)
    x = ids.unsqueeze(0) * _signed(_GOLDEN) + keys.unsqueeze(1)
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
