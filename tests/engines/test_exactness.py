"""The self-test of exact mode finds a single bit, wherever it comes from, and passes an engine that keeps them all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_rig import engine_of, with_vllm
from wisp.core.errors import ConfigError, EngineError
from wisp.core.protocol.step import Slice, SliceResult
from wisp.engines.base import EngineInfo
from wisp.engines.exactness import difference

VOCABULARY = 64
Noise = Callable[[list[Slice], Slice], bool]


class Toy:
    """An engine whose logits at a position follow from the tokens up to it, and from the noise that was planted.

    `noise` says of a slice of a step whether it moves a bit in what is computed there: in its own logits, or, where it
    is a chunk of a prompt, in the KV that later rows read.
    """

    def __init__(
        self, noise: Noise = lambda batch, work: False, slots: int = 8, step_tokens: int = 256
    ) -> None:
        self.info = EngineInfo(
            "toy", "toy", "fast", VOCABULARY, frozenset(), slots, 64, 64 * slots, step_tokens, ""
        )
        self.noise = noise
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.moved = [False] * slots
        self.widest = 0

    def clear(self) -> None:
        self.held = [[] for _ in self.held]
        self.moved = [False] * len(self.moved)

    def observe(self, batch: list[Slice]) -> list[tuple[SliceResult, Any]]:
        self.widest = max(self.widest, sum(len(s.tokens) for s in batch))
        return [self._one(batch, work) for work in batch]

    def _one(self, batch: list[Slice], work: Slice) -> tuple[SliceResult, Any]:
        held = self.held[work.slot]
        assert work.start <= len(held)
        del held[work.start :]
        held += work.tokens
        moved = self.noise(batch, work)
        if not work.sample:
            self.moved[work.slot] |= moved
            return SliceResult(work.session), None
        moved |= self.moved[work.slot]
        rows = [self._logits(held[: len(held) - work.n_draft + i], moved) for i in range(work.n_draft + 1)]
        chosen = [int(row.argmax()) for row in rows]
        draft = work.tokens[len(work.tokens) - work.n_draft :]
        accepted = next((i for i, token in enumerate(draft) if token != chosen[i]), len(draft))
        del held[len(held) - work.n_draft + accepted :]
        return SliceResult(work.session, accepted, chosen[: accepted + 1]), np.array(rows)

    @staticmethod
    def _logits(tokens: list[int], moved: bool) -> Any:
        row = np.random.default_rng(zlib.crc32(bytes(tokens))).normal(size=VOCABULARY).astype(np.float32)
        if moved:
            row[3] = np.nextafter(row[3], np.float32(9.0))
        return row


def test_an_engine_that_keeps_every_bit_passes() -> None:
    toy = Toy()
    assert difference(toy) == ""
    assert toy.widest <= toy.info.step_tokens
    assert not any(toy.held)


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        (
            lambda batch, work: work.n_draft == 8,
            "a row along 8 draft tokens alone in its step has other logits",
        ),
        (lambda batch, work: work.n_draft == 1, "a row along 1 draft token alone"),
        (lambda batch, work: len(batch) == 2, "a single row beside 1 other has"),
        (
            lambda batch, work: len(batch) == 7 and work.n_draft == 4,
            "a row along 4 draft tokens beside 6 others",
        ),
        (lambda batch, work: not work.sample and len(work.tokens) == 9, "a single row alone in its step"),
        (lambda batch, work: not work.sample and len(batch) == 3, "a single row beside 2 others"),
    ],
    ids=["rows", "two rows", "crowd", "rows in a crowd", "chunk", "chunk in a crowd"],
)
def test_one_bit_that_moves_is_found(noise: Noise, said: str) -> None:
    assert said in difference(Toy(noise))


@pytest.mark.parametrize(("slots", "step_tokens"), [(1, 16), (8, 16), (200, 256)])
def test_it_keeps_to_the_steps_and_slots_that_there_are(slots: int, step_tokens: int) -> None:
    toy = Toy(slots=slots, step_tokens=step_tokens)
    assert difference(toy) == ""
    assert toy.widest <= max(step_tokens, 40)  # one prompt alone is read in one step


def test_a_step_that_fails_is_no_difference() -> None:
    toy = Toy()
    toy.observe = lambda batch: [(SliceResult(s.session, error="broken"), None) for s in batch]  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="self-test of exact mode failed: broken"):
        difference(toy)


class TestOfVllm:
    """The tiny model in float32 on a CPU keeps every bit: its sums are short."""

    pytestmark = with_vllm

    def test_kernels_that_round_by_the_rows_of_a_step_are_refused(
        self, engine_of_vllm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = engine_of_vllm.started.core.model_executor.driver_worker.worker.model_runner.model
        compute = model.compute_logits

        def rounding(hidden: Any, *args: Any) -> Any:
            logits = compute(hidden, *args)
            return logits * (1 + 2**-22) if logits.shape[0] >= 9 else logits

        assert difference(engine_of_vllm) == ""
        monkeypatch.setattr(model, "compute_logits", rounding)
        with pytest.raises(
            ConfigError,
            match=r"--mode exact is refused: .* a row along 8 draft tokens alone in its step .* fast",
        ):
            engine_of_vllm._exact()

    def test_an_engine_whose_bits_are_kept_says_that_it_is_exact(self, hf_folder: Path) -> None:
        with engine_of(hf_folder, exact=True) as engine:
            assert (engine.info.mode, engine.info.flip_gap) == ("exact", 0.0)
            exact = engine.info.digest
        with engine_of(hf_folder) as engine:
            assert (engine.info.mode, engine.info.flip_gap > 0) == ("fast", True)
            assert engine.info.digest != exact
