"""The inputs that our hooks make for Model Runner V1 are those that its own method would make."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rig import RUNNER, Device, check_all, drive, fleet, with_vllm
from wisp.core.protocol.sampling import Sampling

pytestmark = [*with_vllm, pytest.mark.skipif(RUNNER != "v1", reason="of V1")]
FORGOTTEN = -7  # no token, place or length


def inputs(runner: Any, rows: int, total: int) -> dict[str, list[Any]]:
    """What a step reads."""
    found = {
        "input_ids": runner.input_ids.gpu[:total],
        "positions": runner.positions[:total],
        "query_start_loc": runner.query_start_loc.gpu,
        "query_start_loc_cpu": runner.query_start_loc.cpu,
        "seq_lens": runner.seq_lens,
        "seq_lens_cpu": runner.optimistic_seq_lens_cpu,
    }
    for i, table in enumerate(runner.input_batch.block_table.block_tables):
        found[f"slot_mapping {i}"] = table.slot_mapping.gpu[:total]
        found[f"block_table {i}"] = table.block_table.gpu[:rows]
    return {name: tensor.tolist() for name, tensor in found.items()}


def by_vllm(runner: Any, batch: Any, output: Any, counts: Any) -> None:
    """The same inputs by its own method, over buffers that know nothing. It is given what it reads them from."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for buffer in (runner.input_ids.cpu, runner.query_start_loc.cpu, runner.positions, runner.seq_lens):
        buffer.fill_(FORGOTTEN)
    runner.optimistic_seq_lens_cpu.fill_(FORGOTTEN)
    for table in runner.input_batch.block_table.block_tables:
        table.slot_mapping.cpu.fill_(FORGOTTEN)
    first = 0
    for row, (start, count) in enumerate(zip(batch.starts, batch.counts, strict=True)):
        tokens = batch.tokens[first : first + count]
        runner.input_batch.token_ids_cpu[row, start : start + count] = tokens
        first += count
    runner.requests = dict.fromkeys(runner.input_batch.req_ids, SimpleNamespace(num_tokens=0))
    GPUModelRunner._prepare_inputs(runner, output, counts)


@pytest.mark.parametrize("seed", range(2))
def test_inputs_are_those_that_vllm_makes(
    engine_of_vllm: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks and whole, drafts and decodes, alone and together, of slots in any order."""
    worker = engine_of_vllm.started.core.model_executor.driver_worker.worker
    runner, hooks, steps = worker.model_runner, worker.wisp_hooks, []

    def both(output: Any, counts: Any) -> Any:
        made = hooks.prepare_inputs(output, counts)
        rows, total = len(counts), int(counts.sum())
        ours = inputs(runner, rows, total)
        for (
            table
        ) in runner.input_batch.block_table.block_tables:  # vLLM's kernels pad it, its code for CPUs does not
            assert set(table.slot_mapping.gpu[total:].tolist()) <= {-1}
        by_vllm(runner, hooks.batch, output, counts)
        assert ours == inputs(runner, rows, total)
        assert FORGOTTEN not in {*ours["input_ids"], *ours["positions"]}
        steps.append((rows, total))
        return made

    monkeypatch.setattr(runner, "_prepare_inputs", both)
    rng = random.Random(seed)
    devices = fleet(rng, [Sampling(), Sampling(0.8, seed=seed)], 20)

    def mishap(device: Device) -> None:
        if rng.random() < 0.1:
            device.forget()

    drive(engine_of_vllm, devices, rng, mishap)
    check_all(devices)
    assert {rows for rows, _ in steps} >= {1, 2, 3}
    assert max(total for _, total in steps) > 100
