"""Models that compute NaN or infinity: refused at start; later they fail the sessions concerned, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gguf_files import Weights
from wisp.core.errors import ModelError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import NOT_FINITE, Slice, SliceResult
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.llama.model import Model
from wisp.engines.llama.target import LlamaTarget, Mode

MODES: list[Mode] = ["exact", "fast"]
POISON = 300  # the token whose embedding is no number
LONG = [
    int(t) for t in np.random.default_rng(1).integers(0, POISON, 150)
]  # attention is tiled from 64 rows on
GREEDY = Sampling()


@pytest.fixture(scope="module")
def poisoned(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poison(tiny_target, tmp_path_factory.mktemp("poisoned") / "target.gguf")


def poison(source: Path, path: Path, value: float = np.nan) -> Path:
    weights = Weights(source)
    weights.untie()
    weights.tensors["token_embd.weight"][POISON, 5] = value
    return weights.write(path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_weight_that_is_not_finite_is_enough_to_refuse_a_model(
    tiny_target: Path, tmp_path: Path, mode: Mode, value: float
) -> None:
    path = poison(tiny_target, tmp_path / "bad.gguf", value)
    with pytest.raises(ModelError, match=r"bad\.gguf has weights that are not finite .*token_embd"):
        LlamaTarget(path, mode=mode, slots=2, slot_tokens=64, threads=1)
    with pytest.raises(ModelError, match="not finite"):
        LlamaDraft(path, slots=1, slot_tokens=64, threads=1)


@pytest.mark.parametrize("mode", MODES)
def test_finite_weights_whose_sums_are_not_are_refused_by_the_check_at_start(
    tiny_target: Path, tmp_path: Path, mode: Mode
) -> None:
    weights = Weights(tiny_target)
    weights.untie()
    weights.tensors["output.weight"][POISON] = 3e38
    path = weights.write(tmp_path / "large.gguf")
    with pytest.raises(ModelError, match=r"large\.gguf: this model computes NaN or infinity"):
        LlamaTarget(path, mode=mode, slots=2, slot_tokens=64, threads=1)
    with pytest.raises(ModelError, match=r"large\.gguf: this model computes NaN or infinity"):
        LlamaDraft(path, slots=1, slot_tokens=64, threads=1)


@pytest.fixture(params=MODES)
def engine(request: pytest.FixtureRequest, poisoned: Path) -> Iterator[LlamaTarget]:
    """One whose weights nobody looked at: only what it computes tells."""
    engine = LlamaTarget(poisoned, mode=request.param, slots=3, slot_tokens=256, threads=1, check=False)
    yield engine
    engine.close()


def alone(engine: LlamaTarget, prompt: list[int]) -> SliceResult:
    engine.clear()
    [result] = engine.run([Slice(9, 0, 0, prompt, sampling=GREEDY)])
    engine.clear()
    assert result.error == ""
    return result


def test_one_of_a_batch_fails_and_the_others_say_what_they_would_alone(engine: LlamaTarget) -> None:
    said = alone(engine, LONG).tokens
    bad, good = engine.run([Slice(1, 1, 0, [*LONG, POISON, *LONG[:40]]), Slice(2, 0, 0, LONG)])
    assert (bad.code, bad.tokens) == (NOT_FINITE, [])
    assert "NaN" in bad.error
    assert engine.held(1) == 0
    assert (good.error, good.tokens) == ("", said)
    [later] = engine.run([Slice(3, 1, 0, LONG)])  # in the very slot of the one that failed
    assert later.tokens == said
    [later] = engine.run([Slice(4, 2, 0, LONG)])
    assert later.tokens == said


def test_a_prompt_that_is_read_in_pieces_harms_nobody_beside_it(engine: LlamaTarget) -> None:
    said = alone(engine, LONG).tokens
    first = [Slice(1, 1, 0, [*LONG[:90], POISON], sample=False), Slice(2, 0, 0, LONG[:90], sample=False)]
    bad, good = engine.run(first)
    assert good.error == ""
    second = [Slice(2, 0, 90, LONG[90:])]
    if not bad.error:  # exact mode looks at the rows that it chooses from, and slots share nothing
        second.append(Slice(1, 1, 91, LONG[90:]))
    good, *rest = engine.run(second)
    assert good.tokens == said
    assert [r.code for r in (*rest, bad) if r.error] == [NOT_FINITE]


def test_a_draft_that_is_rejected_before_the_place_does_no_harm(engine: LlamaTarget) -> None:
    prompt = LONG[:8]
    said = alone(engine, prompt).tokens
    wrong = (said[0] + 1) % POISON
    [result] = engine.run([Slice(1, 0, 0, [*prompt, wrong, POISON], 2)])
    assert (result.error, result.accepted, result.tokens) == ("", 0, said)
    [result] = engine.run([Slice(1, 0, 8, said)])
    assert result.error == ""


def test_an_engine_that_is_empty_again_is_as_it_was(poisoned: Path) -> None:
    """In fast mode slots share cells, which are wiped as soon as nobody holds any; until then calls stay narrow."""
    engine = LlamaTarget(poisoned, mode="fast", slots=3, slot_tokens=256, threads=1, check=False)
    try:
        together = [Slice(1, 0, 0, LONG), Slice(2, 1, 0, LONG[:100])]
        before = engine.observe(together)[1]
        engine.run([Slice(1, 0, 0, [POISON]), Slice(2, 1, 0, [POISON])])
        after = engine.observe(together)[1]
        assert all(np.array_equal(after[place], row) for place, row in before.items())
    finally:
        engine.close()


def test_a_drafter_stops_drafting_for_that_session_alone(
    tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = poison(tiny_draft, tmp_path / "draft.gguf")
    monkeypatch.setattr(
        "wisp.engines.llama.draft.Model", lambda path, **options: Model(path, check=False, **options)
    )
    engine = LlamaDraft(path, slots=2, slot_tokens=256, threads=1)
    try:
        fine = engine.propose("fine", LONG, 0, GREEDY)
        assert fine is not None
        with caplog.at_level(logging.WARNING):
            assert engine.propose("bad", [*LONG, POISON], 0, GREEDY) is None
            rows = engine.rows_evaluated
            assert engine.propose("bad", [*LONG, POISON, 7], 1, GREEDY) is None
            assert engine.rows_evaluated == rows  # it does not even try
        assert len(caplog.records) == 1
        assert "without drafts" in caplog.text
        again = engine.propose("fine", LONG, 0, GREEDY)
        assert again is not None
        assert again.token == fine.token
        assert engine.propose("other", LONG[:100], 0, GREEDY) is not None
        engine.forget("bad")
        assert engine.propose("bad", LONG, 0, GREEDY) is not None
    finally:
        engine.close()
