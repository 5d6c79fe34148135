"""What llama.cpp makes of slices. What all engines do: test_target_engines.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from slices import PROMPT, SAMPLING, other, verify
from wisp.core.errors import EngineError, ModelError
from wisp.core.protocol.step import Copy, Slice
from wisp.engines.llama import selfcheck
from wisp.engines.llama.context import DecodeError
from wisp.engines.llama.model import Model
from wisp.engines.llama.reference import reference_tokens
from wisp.engines.llama.target import LlamaTarget
from wisp.engines.llama.tokenizer import LlamaTokenizer


@pytest.fixture(scope="module")
def answer(tiny_target: Path) -> list[int]:
    return reference_tokens(tiny_target, PROMPT, SAMPLING, 24)


def test_info_describes_the_model(engine: LlamaTarget, tokenizer: LlamaTokenizer) -> None:
    info = engine.info
    assert (info.engine, info.model, info.mode, info.flip_gap, info.notes) == (
        "llama.cpp",
        "tiny",
        "exact",
        0.0,
        (),
    )
    assert (info.slots, info.slot_tokens, info.kv_tokens) == (4, 256, 1024)
    assert (info.n_vocab, info.eos) == (tokenizer.n_vocab, tokenizer.eos)


def test_rows_after_a_rejected_piece_are_not_evaluated(engine: LlamaTarget, answer: list[int]) -> None:
    before = engine.context.rows_evaluated
    [result] = engine.run([verify(0, [other(answer[0]), *answer[1:20]])])
    assert (result.accepted, result.tokens) == (0, answer[:1])
    assert engine.context.rows_evaluated - before == 7  # of 25, in pieces 7, 6, 6, 6
    assert engine.held(0) == len(PROMPT)


def test_a_prefix_is_copied_and_the_source_goes_its_own_way(engine: LlamaTarget, answer: list[int]) -> None:
    engine.run([verify(0, answer[:6])])
    engine.run([Slice(1, 1, 0, PROMPT, sample=False)])
    engine.copy(Copy(0, 1, 8))
    engine.copy(Copy(1, 2, 4))
    # Slot 0 is overwritten in the very step in which the copies of it are used.
    results = engine.run(
        [
            Slice(1, 0, 0, [1, 2, 3], sample=False),
            Slice(2, 1, 8, answer[3:4], position=4, sampling=SAMPLING),
            Slice(3, 2, 4, PROMPT[4:], sampling=SAMPLING),
        ]
    )
    assert [r.error for r in results] == ["", "", ""]
    assert results[1].tokens == answer[4:5]
    assert results[2].tokens == answer[:1]
    assert [engine.held(slot) for slot in range(3)] == [3, 9, 5]


def test_a_failed_decode_empties_its_slot_only(
    engine: LlamaTarget, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.run([Slice(1, 0, 0, PROMPT, sample=False), Slice(2, 1, 0, PROMPT[:4], sample=False)])
    decode, calls = engine.context.decode, iter([1])

    def flaky() -> object:
        logits = decode()
        if next(calls, 0):
            raise DecodeError(1, "no room")
        return logits

    monkeypatch.setattr(engine.context, "decode", flaky)
    failed, good = engine.run([Slice(1, 0, 5, answer[:1]), verify(1, answer[:2], start=4)])
    assert "no room" in failed.error
    assert good.tokens == answer[:3]
    assert (engine.held(0), engine.held(1)) == (0, 7)
    assert engine.run([verify(0, answer[:4])])[0].tokens == answer[:5]


def test_a_fatal_error_empties_everything(engine: LlamaTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.run([Slice(1, 0, 0, PROMPT, sample=False)])

    def broken() -> object:
        raise DecodeError(-3, "compute failed")

    monkeypatch.setattr(engine.context, "decode", broken)
    with pytest.raises(EngineError, match="compute failed"):
        engine.run([Slice(2, 1, 0, PROMPT)])
    monkeypatch.undo()
    assert engine.held(0) == 0
    [result] = engine.run([Slice(1, 0, 5, [1])])
    assert "holds 0 tokens" in result.error


def test_a_model_that_is_not_exact_here_runs_fast_and_says_so(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "check", lambda engine: "3 of 12 positions differ between batch shapes")
    engine = LlamaTarget(tiny_target, slots=2, slot_tokens=128, threads=1)
    assert engine.info.mode == "fast"
    assert engine.info.flip_gap > 0
    assert "3 of 12 positions differ" in engine.info.notes[0]
    engine.close()


def test_more_context_than_the_model_has_is_cut_and_said(tiny_target: Path) -> None:
    engines = [LlamaTarget(tiny_target, slots=1, slot_tokens=n, threads=1, check=False) for n in (5000, None)]
    most = engines[0].model.n_ctx_train
    assert [engine.info.slot_tokens for engine in engines] == [most, min(most, 2048)]
    [note] = engines[0].info.notes
    assert f"5000 tokens was asked for, but tiny-target was trained on {most}" in note
    assert engines[1].info.notes == ()
    for engine in engines:
        engine.close()


def test_fast_mode_says_what_exact_mode_says_but_for_ties(tiny_target: Path, answer: list[int]) -> None:
    gaps: list[float] = []
    reference_tokens(tiny_target, PROMPT, SAMPLING, 24, gaps=gaps)
    engine = LlamaTarget(tiny_target, mode="fast", slots=3, slot_tokens=256, threads=1)
    clear = next((i for i, gap in enumerate(gaps) if gap < engine.info.flip_gap), len(gaps))
    work = [
        Slice(1, 0, 0, PROMPT * 30, sample=False),
        verify(1, answer[:3]),
        verify(2, [other(answer[0]), *answer[1:5]]),
    ]
    results = engine.run(work)
    assert results[1].tokens[:clear] == answer[: min(4, clear)]
    assert results[2].tokens[:clear] == answer[: min(1, clear)]
    assert engine.held(0) == 150
    engine.close()


def test_a_closed_engine_says_so(tiny_target: Path) -> None:
    engine = LlamaTarget(tiny_target, slots=1, slot_tokens=64, threads=1, check=False)
    tokenizer = LlamaTokenizer(engine.model)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run([Slice(1, 0, 0, [1])])
    with pytest.raises(EngineError, match="closed"):
        tokenizer.encode("text", add_bos=False, parse_special=False)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    with pytest.raises(ModelError, match="no model file"):
        Model(path)
    path.write_bytes(b"this is not a model, whatever its name says")
    with pytest.raises(ModelError, match=r"broken\.gguf.*magic"):
        Model(path)


@pytest.mark.parametrize(("slots", "slot_tokens"), [(0, 100), (1, 31)])
def test_an_engine_without_room_is_refused(tiny_target: Path, slots: int, slot_tokens: int) -> None:
    with pytest.raises(EngineError, match="at least one"):
        LlamaTarget(tiny_target, slots=slots, slot_tokens=slot_tokens)
