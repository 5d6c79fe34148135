"""Rows of logits of all kinds, chosen from by an engine and by the rule itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling, target_token
from wisp.engines.vllm.parts import Part

with_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")

TEMPERATURES = (0.0, 1e-300, 1e-5, 0.01, 0.3, 0.7, 1.0, 1.0, 1.5, 100.0)
TOP_K = (0, 0, 0, 1, 2, 5, 20, 100, 100_000)
TOP_P = (1.0, 1.0, 1.0 - 2.0**-53, 0.999999, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 1e-3, 1e-12)
MIN_P = (0.0, 0.0, 0.0, 1e-300, 1e-6, 0.05, 0.5, 1.0)


def any_sampling(rng: np.random.Generator) -> Sampling:
    """Adversarial ones are as likely as usual ones."""

    def one(values: Sequence[Any]) -> Any:
        return values[int(rng.integers(len(values)))]

    seed = int(rng.integers(-(2**63), 2**63)) * (1 + int(rng.integers(3)))
    return Sampling(one(TEMPERATURES), one(TOP_K), one(TOP_P), one(MIN_P), seed)


def any_logits(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """[rows, size], each row of another kind: smooth, few values, flat, one or a few peaks, far apart, holes."""
    x = rng.standard_normal((rows, size))
    kind = rng.integers(0, 8, rows)
    x *= np.array([3.0, 1.5, 0.0, 0.2, 2.5, 4000.0, 3.0, 12.0])[kind][:, None]
    x = np.where((kind == 1)[:, None], np.round(x), x)
    some = np.where((kind == 4)[:, None] & (rng.random((rows, size)) < 4 / size), rng.uniform(5, 30), 0.0)
    x = x + some + np.where(kind == 2, 17.25, 0.0)[:, None]
    x = np.where((kind == 6)[:, None] & (rng.random((rows, size)) < 0.6), -np.inf, x)
    x[np.isinf(x).all(axis=1), 0] = 0.0
    x[kind == 1] -= 0.0 * x[kind == 1]  # both zeros
    return x.astype(np.float32)


def random_parts(
    rng: np.random.Generator, rows: int, size: int, longest: int, logprobs: bool = False
) -> list[Part]:
    """Parts of `rows` rows in all; their drafts are whatever."""
    parts: list[Part] = []
    left = rows
    while left:
        n = min(left, int(rng.integers(1, longest + 1)))
        draft = rng.integers(0, size, n - 1).tolist()
        told = [None, 0, 3, 20][int(rng.integers(4))] if logprobs else None
        position = int(rng.integers(0, 10_000))
        parts.append(Part(draft, True, position, any_sampling(rng), told))
        left -= n
    return parts


def check(answers: Callable[..., Any], logits: np.ndarray, parts: Sequence[Part], dtype: Any = None) -> Any:
    """Whatever `answers` says of the sampled rows is what the rule says; returns it."""
    import torch

    from wisp.engines.vllm.rows import rows_of

    there = torch.from_numpy(logits)
    if dtype is not None:
        there = there.to(dtype)
        logits = there.float().numpy()
    said = answers(there, rows_of(parts, logits.shape[1]))
    first, wrong = 0, []
    for part in parts:
        for i, row in enumerate(logits[first : first + part.rows]):
            if np.isnan(row).any() or row.max() == np.inf:
                continue  # nothing is said of these
            token = target_token(row, part.sampling, part.position + i, part.edit(i))
            if said.tokens[first + i] != token:
                wrong.append((first + i, part.sampling, part.position + i, said.tokens[first + i], token))
            if part.logprobs is not None:
                check_reported(row, said, first + i, part.logprobs)
        first += part.rows
    assert not wrong, (len(wrong), wrong[:5])
    assert list(zip(said.said, said.sound, strict=True)) == along(logits, parts, said.tokens)
    return said


def along(logits: np.ndarray, parts: Sequence[Part], tokens: Sequence[int]) -> list[tuple[int, bool]]:
    """(rows said, are all finite?) of each part, one row at a time."""
    found, first = [], 0
    for part in parts:
        n, sound = 0, True
        for i in range(part.rows):
            sound = bool(np.isfinite(logits[first + i]).all())
            if not sound:
                break
            n += 1
            if i == len(part.draft) or part.draft[i] != tokens[first + i]:
                break
        found.append((n, sound))
        first += part.rows
    return found


def check_reported(row: np.ndarray, said: Any, at: int, top: int) -> None:
    """Log probabilities of the plain softmax, within 1e-5; ties by lower id."""
    if not np.isfinite(row).all():
        return
    scores = row.astype(np.float64)
    log_z = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    assert abs(said.own[at] - (scores[said.tokens[at]] - log_z)) < close(scores[said.tokens[at]] - log_z)
    if top:
        order = np.lexsort((np.arange(row.size), -scores))[:top]
        ids, values = said.others[at]
        assert ids == order.tolist()
        assert all(
            abs(v - (scores[i] - log_z)) < close(scores[i] - log_z) for i, v in zip(ids, values, strict=True)
        )


def close(value: float) -> float:
    """1e-5, and what a float32 can tell apart of very unlikely ones."""
    return max(1e-5, abs(value) * 2.0**-23)


def any_edits(source: np.random.Generator, size: int) -> list[Edit]:
    """Edits of every kind, alone and together, with ids that the logits do not have."""

    def some(n: int) -> np.ndarray:
        return source.choice(size + 20, min(n, size), replace=False).astype(np.int64)

    mask = np.zeros((size + 63) // 32, np.uint32)
    for i in some(40):
        mask[i // 32] |= np.uint32(1 << i % 32)
    empty = np.zeros(2, np.uint32)
    ids = some(30)
    values = source.standard_normal(ids.size)
    one = np.array([7], np.int64)
    return [
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
        Edit(mask, some(200), some(3), some(2), ids, values, some(60), 0.8, ids[:20], values[:20]),
    ]
