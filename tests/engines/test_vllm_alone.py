"""Tests of the vLLM engine that need one of their own: it is started and ended for each, one at a time."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from vllm_rig import BLOCK_BYTES, GREEDY, check_all, drive, engine_of, fleet, folder_of_tiny, with_vllm

from wisp.core.sampling import Sampling
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
