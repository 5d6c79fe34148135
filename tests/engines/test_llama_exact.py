"""Exact mode is exact: the engine's tokens and logits are the reference decoder's, whatever the schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice
from wisp.engines.llama.context import Context, Logits
from wisp.engines.llama.proof import check_build, prove_exact
from wisp.engines.llama.reference import reference_steps, reference_tokens
from wisp.engines.llama.target import LlamaTarget, pieces


@pytest.mark.parametrize("seed", [0, 1])
def test_random_schedules_equal_the_reference_in_every_bit(tiny_target: Path, seed: int) -> None:
    proof = prove_exact(tiny_target, sessions=7, slots=3, new_tokens=30, seed=seed)
    assert proof.positions > 400
    assert proof.exact, proof


def test_contexts_beyond_the_512_cell_view_are_exact(tiny_target: Path) -> None:
    proof = prove_exact(tiny_target, sessions=2, slots=2, prompt_tokens=(690, 720), new_tokens=30, seed=5)
    assert proof.longest > 700
    assert proof.exact, proof


def test_one_wrong_bit_is_seen(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Context.decode, iter(range(10_000))

    def decode(context: Context) -> Logits:
        logits = real(context)
        if next(calls) > 60 and logits.size:  # the check at start-up is over
            logits[0, 3] = np.nextafter(logits[0, 3], np.inf)
        return logits

    monkeypatch.setattr(Context, "decode", decode)
    proof = prove_exact(tiny_target, sessions=3, new_tokens=20, threads=(1,))
    assert (proof.exact, proof.wrong) == (False, 0)
    assert proof.differing > 0


def test_every_chunking_of_a_prompt_gives_the_same_next_token_logits(
    engine: LlamaTarget, tiny_target: Path
) -> None:
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, engine.info.n_vocab, 23)]
    first = next(iter(reference_steps(tiny_target, prompt, Sampling())))
    for chunk in range(1, 24):
        engine.clear()
        for start in range(0, 22, chunk):
            engine.run([Slice(0, 1, start, prompt[start : min(22, start + chunk)], sample=False)])
        [result], logits = engine.observe([Slice(0, 1, 22, prompt[22:])])
        assert result.tokens == [first.token]
        assert np.array_equal(logits[1, 22], first.logits)


def test_the_last_place_of_a_slot_can_be_decoded(tiny_target: Path) -> None:
    engine = LlamaTarget(tiny_target, slots=2, slot_tokens=32, threads=1, check=False)
    prompt = list(range(5, 36))
    expected = reference_tokens(tiny_target, prompt, Sampling(), 2)
    [first] = engine.run([Slice(0, 0, 0, prompt)])
    [second] = engine.run([Slice(0, 0, 31, first.tokens, position=1)])
    assert first.tokens + second.tokens == expected
    assert engine.held(0) == 32
    engine.close()


def test_reference_stops_after_an_eos_and_reports_gaps(tiny_target: Path) -> None:
    gaps: list[float] = []
    sampling = Sampling(temperature=1.0, seed=9)
    tokens = reference_tokens(tiny_target, [7, 8, 9], sampling, 12, gaps=gaps)
    assert len(tokens) == len(gaps) == 12
    assert min(gaps) >= 0.0
    stop = tokens[5]
    assert reference_tokens(tiny_target, [7, 8, 9], sampling, 12, {stop}) == tokens[: tokens.index(stop) + 1]


def test_fast_mode_runs_the_same_schedules_without_failing(tiny_target: Path) -> None:
    proof = prove_exact(tiny_target, sessions=7, slots=3, new_tokens=20, seed=1, mode="fast")
    assert proof.errors == []
    assert proof.largest < 1.0


def test_the_shipped_build_passes_the_quick_check(tiny_target: Path) -> None:
    assert check_build(tiny_target) == ""


def test_pieces_never_leave_a_single_row() -> None:
    assert pieces(1) == [1]
    for rows in range(2, 200):
        cut = pieces(rows)
        assert sum(cut) == rows
        assert all(2 <= piece <= 7 for piece in cut)
        assert len(cut) == -(-rows // 7)
