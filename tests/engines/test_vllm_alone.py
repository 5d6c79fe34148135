"""Tests of the vLLM engine that need one of their own: it is started and ended for each, one at a time."""

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
    drive,
    engine_of,
    fleet,
    folder_of_tiny,
    reference,
    with_vllm,
)

from wisp.core.sampling import Sampling
from wisp.core.work import Slice
from wisp.lab.lossless.cases import TINY
from wisp.lab.lossless.check import Bench, check, chi_square
from wisp.lab.lossless.chi_square import ALARM

pytestmark = with_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_tiny(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("seed", range(3))
def test_a_kv_cache_for_a_few_is_enough_for_eight(folder: Path, seed: int) -> None:
    """Blocks for three contexts of the eight: vLLM's cache is taken from one for the other, and no text changes."""
    rng = random.Random(seed)
    with engine_of(folder, kv_bytes=20 * BLOCK_BYTES) as small:
        free = small.started.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert free < 20
        devices = fleet(rng, [GREEDY, Sampling(1.0, seed=seed)], n=60)
        drive(small, devices, rng, lambda device: None)
        fed = small.started.scheduler.rows
    check_all(devices)
    needed = sum(len(d.prompt) + len(d.said) for d in devices)
    assert fed > 1.2 * needed  # blocks were lost and computed again: this did test something


@pytest.mark.parametrize("blocks", [None, 24])
def test_a_sliding_window_is_rolled_back_rightly(folder: Path, tmp_path: Path, blocks: int | None) -> None:
    """The tiny target made to see 48 tokens only: blocks behind the window are given up as a sequence goes on."""
    shutil.copytree(folder, tmp_path / "sliding")
    config = json.loads((folder / "config.json").read_text())
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
