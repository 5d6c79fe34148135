"""The inputs that our hooks make for Model Runner V2 are those that its own kernels would make.

Its kernels run in Triton's interpreter (TRITON_INTERPRET=1, in a process of its own). vLLM's CPU build takes Triton
only where that has a CPU backend, so one that does nothing is named before vLLM is loaded.
"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wisp.engines.vllm.parts import Batch, Part

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("vllm") is None,
        reason="TRITON_INTERPRET=1, with vLLM",
    ),
    pytest.mark.filterwarnings("ignore"),  # vLLM's and Triton's own
]

SLOTS, CONTEXT, STEP, BLOCK = 6, 128, 64, 16


@pytest.fixture(scope="module", autouse=True)
def triton_for_vllm() -> None:
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
    from vllm.v1.worker.gpu import buffer_utils

    buffer_utils.UvaBuffer = UvaBuffer  # as vLLM's worker on a CPU does


def runner() -> Any:
    """What of a runner takes part in making inputs: the real buffers, records and tables, and methods of its class."""
    import torch
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBuffers
    from vllm.v1.worker.gpu.states import RequestState

    cpu = torch.device("cpu")
    return SimpleNamespace(
        device=cpu,
        max_num_reqs=SLOTS,
        decode_query_len=1,
        pcp_manager=None,
        adaptive_verification=None,
        fast_prefill=None,
        use_pp=False,
        model_state=SimpleNamespace(num_new_sampled_tokens_per_step=1),
        model_config=SimpleNamespace(rswa_window=None),
        input_buffers=InputBuffers(SLOTS, STEP, cpu),
        req_states=RequestState(SLOTS, CONTEXT, STEP, 0, 512, cpu),
        block_tables=BlockTables([BLOCK], SLOTS, STEP, [CONTEXT // BLOCK], cpu),
        gather_batch_req_state=None,
    )


def batch(starts: list[int], counts: list[int], blocks: list[list[int]]) -> Batch:
    """The sequence in slot i has the tokens 100 i, 100 i + 1, ..., and these blocks."""
    tokens = [100 * i + t for i, start in enumerate(starts) for t in range(start, start + counts[i])]
    return Batch(
        np.arange(len(starts)),
        np.array(starts),
        np.array(counts),
        np.array(tokens),
        np.ones(len(starts), np.int64),
        [Part([], True)] * len(starts),
        [(i, 0, (ids,)) for i, ids in enumerate(blocks)],
        np.full(len(starts), -1),
    )


def by_vllm(of: Any, given: Batch, output: Any, graph: Any) -> tuple[Any, Any]:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    for i in range(len(given.starts)):
        end = int(given.starts[i] + given.counts[i])
        of.req_states.add_request(
            str(i), 1, [100 * i + t for t in range(end)], int(given.starts[i]), max_tokens=1
        )
        index = of.req_states.req_id_to_index[str(i)]
        of.block_tables.append_block_ids(index, given.blocks[i][2], overwrite=True)
    of.req_states.apply_staged_writes()
    of.block_tables.apply_staged_writes()
    state, _ = GPUModelRunner.gather_batch_req_state(of, output, dummy_run=False)
    prepared = GPUModelRunner.prepare_inputs(of, output, state, graph, 0)
    return prepared, GPUModelRunner.prepare_attn(of, prepared)


def by_us(of: Any, output: Any, graph: Any) -> tuple[Any, Any]:
    from wisp.engines.vllm.runner_v2 import HooksV2

    hooks = HooksV2(of)
    hooks.update_requests(output)
    state, _ = hooks.gather(output, dummy_run=False)
    prepared = hooks.prepare_inputs(output, state, graph, 0)
    return prepared, hooks.prepare_attn(prepared)


@pytest.mark.parametrize(
    ("starts", "counts", "blocks", "tokens", "sequences"),
    [
        ([20], [1], [[3, 4]], 1, None),
        ([0, 5, 40], [18, 1, 5], [[7, 8], [1], [9, 2, 4]], 24, None),
        ([31, 5, 40], [2, 1, 1], [[7, 8, 5], [1], [9, 2, 4]], 8, 6),  # padded, as a full CUDA graph is
        ([16, 0], [1, 40], [[1, 6], [5, 4, 3]], 48, None),
    ],
    ids=["one", "mixed", "padded", "prefill"],
)
def test_inputs_are_those_that_vllm_makes(
    starts: list[int], counts: list[int], blocks: list[list[int]], tokens: int, sequences: int | None
) -> None:
    from vllm.config.compilation import CUDAGraphMode

    given = batch(starts, counts, blocks)
    output = SimpleNamespace(
        num_scheduled_tokens={str(i): n for i, n in enumerate(counts)},
        total_num_scheduled_tokens=sum(counts),
        scheduled_spec_decode_tokens={},
        has_structured_output_requests=False,
        new_block_ids_to_zero=None,
        wisp_batch=given,
    )
    graph = SimpleNamespace(cg_mode=CUDAGraphMode.NONE, num_tokens=tokens, num_reqs=sequences)
    theirs, (their_blocks, their_slots) = by_vllm(runner(), given, output, graph)
    ours, (our_blocks, our_slots) = by_us(runner(), output, graph)
    total = sum(counts)
    assert ours.req_ids == theirs.req_ids
    for name in ("input_ids", "positions"):
        assert getattr(ours, name)[:total].tolist() == getattr(theirs, name)[:total].tolist(), name
        assert getattr(ours, name).shape == getattr(theirs, name).shape
    for name in (
        "query_start_loc",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "logits_indices",
        "cu_num_logits",
    ):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    for name in ("query_start_loc_np", "num_scheduled_tokens", "num_computed_tokens_np", "cu_num_logits_np"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    for name in ("num_reqs", "num_reqs_after_padding", "num_tokens", "num_tokens_after_padding"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert our_slots.tolist() == their_slots.tolist()
    assert our_blocks[0].tolist() == their_blocks[0].tolist()
