"""Tests of the vLLM engine that need one of their own."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import msgspec
import pytest

from vllm_rig import (
    BLOCK_BYTES,
    GREEDY,
    Device,
    check_all,
    close_common,
    drive,
    engine_of,
    fleet,
    reference,
    with_vllm,
)
from wisp.check.lossless.cases import TINY
from wisp.check.lossless.check import Bench, check, chi_square
from wisp.check.lossless.chi_square import ALARM
from wisp.core.errors import EngineError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice

pytestmark = with_vllm


def test_a_kv_cache_for_a_few_is_enough_for_eight(hf_folder: Path) -> None:
    """Blocks for three contexts of the eight: vLLM's cache is taken from one for the other, and no text changes."""
    with engine_of(hf_folder, kv_bytes=20 * BLOCK_BYTES) as small:
        scheduler = small.started.scheduler
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < 20
        for seed in range(3):
            rng = random.Random(seed)
            devices = fleet(rng, [GREEDY, Sampling(1.0, seed=seed)], n=60)
            before = scheduler.rows
            drive(small, devices, rng, lambda device: None)
            check_all(devices)
            needed = sum(len(d.prompt) + len(d.said) for d in devices)
            assert scheduler.rows - before > 1.2 * needed  # lost and computed again: this did test something
            small.clear()


def test_a_closed_engine_says_so(hf_folder: Path) -> None:
    with engine_of(hf_folder, slots=1, slot_tokens=64) as engine:
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.run([Slice(1, 0, 0, [1])])


@pytest.mark.parametrize("blocks", [None, 24])
def test_a_sliding_window_is_rolled_back_rightly(hf_folder: Path, tmp_path: Path, blocks: int | None) -> None:
    """The tiny target made to see 48 tokens only: blocks behind the window are given up as a sequence goes on."""
    shutil.copytree(hf_folder, tmp_path / "sliding")
    config = json.loads((hf_folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 48}
    (tmp_path / "sliding" / "config.json").write_text(json.dumps(config))
    rng = random.Random(1)
    with engine_of(tmp_path / "sliding", kv_bytes=blocks and blocks * BLOCK_BYTES) as engine:
        wanted = []
        for device in fleet(rng, [GREEDY, Sampling(1.0, seed=5)], n=60):
            alone = Device(device.slot, device.prompt, device.sampling, 68, rng)
            while not alone.done:
                chain = alone.prompt + alone.said
                work = Slice(9, 0, alone.held, chain[alone.held :], 0, True, len(alone.said), alone.sampling)
                alone.take(work, engine.run([work])[0])
            wanted.append(alone)
        assert wanted[0].said[:60] != reference(wanted[0].prompt, GREEDY, 68)[:60]  # the window matters
        engine.clear()
        devices = [Device(d.slot, d.prompt, d.sampling, 60, rng, ahead=d.said) for d in wanted]

        def mishap(device: Device) -> None:
            if rng.random() < 0.05:
                device.forget()

        drive(engine, devices, rng, mishap)
    assert [d.said[:60] for d in devices] == [d.said[:60] for d in wanted]


def test_check_lossless_finds_nothing() -> None:
    """Reconnects, restarts, evictions, overlapping drafts, failed steps: `wisp check-lossless`, shortened."""
    scale = msgspec.structs.replace(TINY, chats=6, plain=2, samples=0)
    close_common()
    bench = Bench("tiny", "fast", scale, engine="vllm", offline=True)
    try:
        report = check(bench, mode="fast", cases=80, seed=1)
        assert report.passed, report
        assert (report.cases, report.mismatches) == (80, 0)
        assert report.counts["evictions"]
        assert report.counts["overlapping_drafts"]
        found = chi_square(bench, 600, seed=1)
        assert found.p > ALARM, found
    finally:
        bench.close()
