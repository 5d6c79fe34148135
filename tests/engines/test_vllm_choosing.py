"""Choosing many tokens at once on a device is the sampling rule itself, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_rig import with_vllm
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling, target_token

pytestmark = with_vllm
SAMPLINGS = (
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(0.7, seed=-5),
    Sampling(1.0, 20, seed=4),
    Sampling(1.3, 0, 0.9, seed=5),
    Sampling(1.0, 0, 1.0, 0.05, seed=6),
    Sampling(0.8, 50, 0.95, 0.01, seed=1 << 70),
    Sampling(100.0, 3, 0.3, 0.9, seed=8),
    Sampling(0.01, seed=9),
    Sampling(1e-300, seed=10),
    Sampling(0.0, min_tokens=40, ends=(5, 2999)),
    Sampling(1.0, 20, seed=4, min_tokens=40, ends=tuple(range(0, 3000, 2))),
)


@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
def test_rows_of_all_kinds_are_chosen_as_the_rule_does(spread: float) -> None:
    import torch

    from wisp.engines.vllm.choosing import target_tokens

    rng = np.random.default_rng(int(spread * 10))
    asked = [(SAMPLINGS[i % len(SAMPLINGS)], i // 3) for i in range(200)]
    rows = (spread * rng.standard_normal((len(asked), 3000))).astype(np.float32)
    said = target_tokens(torch.from_numpy(rows), asked)
    assert said == [target_token(row, *how) for row, how in zip(rows, asked, strict=True)]


def test_ties_go_to_the_lower_id() -> None:
    import torch

    from wisp.engines.vllm.choosing import target_tokens

    rows = np.zeros((6, 100), np.float32)
    rows[:, [70, 30, 50]] = 2.0
    asked = [(Sampling(), 0), (Sampling(1.0, 1, seed=1), 0), (Sampling(1.0, 2, seed=2), 4)] * 2
    said = target_tokens(torch.from_numpy(rows), asked)
    assert said == [target_token(row, *how) for row, how in zip(rows, asked, strict=True)]
    assert said[:2] == [30, 30]
    assert said[2] in (30, 50)


def test_logits_in_half_precision_are_widened_first() -> None:
    import torch

    from wisp.engines.vllm.choosing import target_tokens

    rows = torch.randn(8, 500, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    asked = [(Sampling(0.9, 0, 0.95, seed=i), i) for i in range(8)]
    assert target_tokens(rows, asked) == [
        target_token(row.float().numpy(), *how) for row, how in zip(rows, asked, strict=True)
    ]


def test_a_device_accepts_and_reports_what_the_cpu_does() -> None:
    import torch

    from wisp.engines.vllm.parts import Part
    from wisp.engines.vllm.worker import choose, sampled_rows

    rng = np.random.default_rng(5)
    rows = torch.from_numpy((2.0 * rng.standard_normal((60, 40))).astype(np.float32))
    parts, first = [], 0
    while first < 50:
        n, sampling, position = (
            int(rng.integers(0, 6)),
            SAMPLINGS[first % len(SAMPLINGS)],
            int(rng.integers(0, 9)),
        )
        right = [target_token(rows[first + i].numpy(), sampling, position + i) for i in range(n)]
        draft = [t if rng.random() < 0.8 else (t + 1) % 40 for t in right]
        parts.append(Part(draft, True, position, sampling, [None, 0, 3][n % 3], n == 4))
        parts.append(Part([], False, 0, sampling))  # prefill: no rows
        first += n + 1
    one, other = (choose(rows, parts, here=here) for here in (True, False))
    for part, a, b in zip(parts, one, other, strict=True):
        assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)
        assert (a.logits is not None) == (b.logits is not None) == part.observed
        assert a.logits is None or np.array_equal(a.logits, b.logits)
        assert a.tokens[:-1] == part.draft[: max(0, len(a.tokens) - 1)]
        assert bool(a.tokens) == part.sample
    assert {len(c.tokens) for c in one} >= {0, 1, 2, 3}
    assert sampled_rows([3, 2, 4], [2, 0, 1]).tolist() == [1, 2, 8]
    assert sampled_rows([3, 2], [0, 0]).tolist() == [4]


def _edits(source: np.random.Generator, size: int) -> list[Edit | None]:
    """Edits of every kind, alone and together, with ids that the logits do not have."""

    def some(n: int) -> np.ndarray:
        return source.choice(size + 20, n, replace=False).astype(np.int64)

    mask = np.zeros((size + 63) // 32, np.uint32)
    for i in some(40):
        mask[i // 32] |= np.uint32(1 << i % 32)
    empty = np.zeros(2, np.uint32)
    ids, values = some(30), source.standard_normal(30)
    one = np.array([7], np.int64)
    return [
        None,
        Edit(),
        Edit(mask=mask),
        Edit(mask=empty),
        Edit(mask=mask[:3], banned=some(5)),
        Edit(allowed=some(6)),
        Edit(allowed=one, banned=one, early=one),
        Edit(banned=some(9), early=some(4)),
        Edit(biased=ids, biases=100 * values),
        Edit(repeated=some(50), factor=1.3),
        Edit(counted=ids, penalties=values),
        Edit(mask, some(200), some(3), some(2), ids, values, some(60), 0.8, some(30), values),
    ]


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_constraints_on_many_rows_are_the_rule_row_by_row(spread: float) -> None:
    import torch

    from wisp.engines.vllm.choosing import target_tokens
    from wisp.engines.vllm.editing import edited

    source = np.random.default_rng(4)
    size = 1000
    edits = [edit for _ in range(12) for edit in _edits(source, size)]
    asked = [(SAMPLINGS[i % 11], i // 3) for i in range(len(edits))]
    rows = (spread * source.standard_normal((len(edits), size))).astype(np.float32)
    both = [(row, edit) for row, edit in zip(rows, edits, strict=True) if edit is not None]
    scores = edited(torch.from_numpy(np.stack([row for row, _ in both])), [edit for _, edit in both])
    assert np.array_equal(scores.numpy(), np.stack([edit.apply(row) for row, edit in both]))
    said = target_tokens(torch.from_numpy(rows), asked, edits)
    assert said == [target_token(r, *how, edit) for r, how, edit in zip(rows, asked, edits, strict=True)]
