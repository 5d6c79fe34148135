"""Choosing many tokens at once by torch is the sampling rule itself, row by row; and so is what is made of it."""

from __future__ import annotations

import numpy as np
import pytest

from choosing_rig import any_edits, any_logits, check, random_parts, with_torch
from wisp.core.protocol.sampling import Sampling, target_token
from wisp.engines.vllm.parts import Part

pytestmark = with_torch
SAMPLINGS = (
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(1.0, 20, seed=4),
    Sampling(1.3, 0, 0.9, seed=5),
    Sampling(0.8, 50, 0.95, 0.01, seed=1 << 70),
    Sampling(100.0, 3, 0.3, 0.9, seed=8),
)


@pytest.mark.parametrize("size", [5, 64, 300, 3000])
def test_rows_of_all_kinds_are_chosen_as_the_rule_does(size: int) -> None:
    from wisp.engines.vllm.choosing import answers

    rng = np.random.default_rng(size)
    rows = 400 if size < 1000 else 100
    check(answers, any_logits(rng, rows, size), random_parts(rng, rows, size, 5, logprobs=True))


@pytest.mark.extended
@pytest.mark.parametrize("size", [5, 33, 127, 256])
def test_five_thousand_random_rows(size: int) -> None:
    from wisp.engines.vllm.choosing import answers

    rng = np.random.default_rng(2000 + size)
    check(answers, any_logits(rng, 5000, size), random_parts(rng, 5000, size, 5, logprobs=True))


def test_ties_go_to_the_lower_id() -> None:
    import torch

    from wisp.engines.vllm.choosing import answers
    from wisp.engines.vllm.rows import rows_of

    rows = np.zeros((6, 100), np.float32)
    rows[:, [70, 30, 50]] = 2.0
    how = [Sampling(), Sampling(1.0, 1, seed=1), Sampling(1.0, 2, seed=2)] * 2
    said = answers(torch.from_numpy(rows), rows_of([Part([], True, 4, s, 3) for s in how], 100))
    assert said.tokens == [target_token(row, s, 4) for row, s in zip(rows, how, strict=True)]
    assert said.tokens[:2] == [30, 30]
    assert said.tokens[2] in (30, 50)
    assert [said.others[i][0] for i in range(6)] == [[30, 50, 70]] * 6


def test_logits_in_half_precision_are_widened_first() -> None:
    import torch

    from wisp.engines.vllm.choosing import answers

    rng = np.random.default_rng(1)
    logits = (3.0 * rng.standard_normal((40, 500))).astype(np.float32)
    check(answers, logits, random_parts(rng, 40, 500, 5, logprobs=True), torch.bfloat16)


def test_a_device_accepts_and_reports_what_the_cpu_does() -> None:
    import torch

    from wisp.engines.vllm.choosing import choose

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
    one, other = (choose(rows, parts, here=here).chosen() for here in (True, False))
    for part, a, b in zip(parts, one, other, strict=True):
        assert a.tokens == b.tokens
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert (x.token, [t.token for t in x.top]) == (y.token, [t.token for t in y.top])
            assert x.logprob == pytest.approx(y.logprob, abs=1e-5)
            assert [t.logprob for t in x.top] == pytest.approx([t.logprob for t in y.top], abs=1e-5)
        assert (a.logits is not None) == (b.logits is not None) == part.observed
        assert a.logits is None or np.array_equal(a.logits, b.logits)
        assert a.tokens[:-1] == part.draft[: max(0, len(a.tokens) - 1)]
        assert bool(a.tokens) == part.sample
    assert {len(c.tokens) for c in one} >= {0, 1, 2, 3}
    nothing = choose(rows[:0], [Part([], False, 0, Sampling())] * 2, here=False)
    assert [c.tokens for c in nothing.chosen()] == [[], []]


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_constraints_on_many_rows_are_the_rule_row_by_row(spread: float) -> None:
    import torch

    from wisp.engines.vllm.choosing import answers
    from wisp.engines.vllm.editing import edited

    source = np.random.default_rng(4)
    size = 1000
    edits = [edit for _ in range(12) for edit in any_edits(source, size)]
    rows = (spread * source.standard_normal((len(edits), size))).astype(np.float32)
    scores = edited(torch.from_numpy(rows), edits)
    assert np.array_equal(
        scores.numpy(), np.stack([e.apply(row) for row, e in zip(rows, edits, strict=True)])
    )
    how = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(len(edits))]
    parts = [
        Part([], True, i // 3, s, 2, False, [e]) for i, (s, e) in enumerate(zip(how, edits, strict=True))
    ]
    check(answers, rows, parts)
    # without bits of a mask's words beyond its ids, and with all that lets through what is not restricted
    assert [e.packed(size) is None for e in edits[:11]] == [i in (0, 7, 8, 9) for i in range(11)]


def test_min_tokens_delays_the_end() -> None:
    from wisp.engines.vllm.choosing import answers

    rng = np.random.default_rng(6)
    logits = rng.standard_normal((12, 40)).astype(np.float32)
    logits[:, [3, 39]] += 50.0
    how = [Sampling(t, seed=1, min_tokens=4, ends=(3, 39)) for t in (0.0, 1.0)]
    said = check(answers, logits, [Part([0] * 5, True, 0, s) for s in how])
    assert not {3, 39} & {*said.tokens[:4], *said.tokens[6:10]}
    assert {said.tokens[4], said.tokens[10]} <= {3, 39}


@with_torch
@pytest.mark.filterwarnings("default")  # PyTorch's own, while vLLM is loaded
def test_the_rows_of_a_step_are_its_sequences_last() -> None:
    pytest.importorskip("vllm")
    from wisp.engines.vllm.worker import sampled_rows

    assert sampled_rows([3, 2, 4], [2, 0, 1]).tolist() == [1, 2, 8]
    assert sampled_rows([3, 2], [0, 0]).tolist() == [4]
