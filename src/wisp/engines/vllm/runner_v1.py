"""The hooks in vLLM's Model Runner V1: they make its inputs themselves.

V1 keeps tokens, lengths and blocks of each sequence in arrays of its own, and makes a step's inputs of them, along with
what its sampler, its drafts and recurrent layers need. Here a step's `Batch` has all of that already: the inputs are
made in NumPy and written where V1's own method leaves them, and the rest is left out.

V1's host memory is the same in each step, and copies from it may wait on the device for the step before. So V1 waits,
before it prepares a step, for an event behind the copies of the last one (`synchronize_input_prep`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from wisp.engines.vllm.parts import Batch
from wisp.engines.vllm.worker import Hooks, Table, sampled_rows

EVENT = "prepare_inputs_event"


def hooks_in(runner: Any) -> HooksV1 | None:
    """Put them in; None for a runner that is not the one known, or splits sequences over devices."""
    known = isinstance(runner, GPUModelRunner) and runner.dcp_world_size == 1 and hasattr(runner, EVENT)
    return HooksV1(runner) if known else None


class HooksV1(Hooks):
    """Takes the place of methods of one runner."""

    def __init__(self, runner: Any) -> None:
        self._batches = runner.input_batch.block_table.block_tables  # of those in the batch, by group
        super().__init__(runner, [Table(b.block_table.np.shape, b.block_size) for b in self._batches])
        self._determine: Callable[..., Any] = runner._determine_batch_execution_and_padding
        self._names = [str(slot) for slot in range(runner.input_batch.max_num_reqs)]
        if runner.device.type == "cuda":
            setattr(runner, EVENT, torch.cuda.Event())
        runner.input_batch.num_prompt_tokens[:] = 1  # whatever begins is a prompt, and nothing else
        runner._update_states = self.update_states
        runner._prepare_inputs = self.prepare_inputs
        runner._determine_batch_execution_and_padding = self.determine_graph
        runner.sample_tokens = self.sample_tokens

    def zero(self, blocks: Any) -> None:
        self.runner._zero_block_ids(blocks)

    def update_states(self, scheduler_output: Any) -> None:
        """The rows of the batch are this step's sequences."""
        runner = self.runner
        batch = self.take(scheduler_output)
        threshold = runner.reorder_batch_threshold
        batch = self.arrange(batch, None if threshold is None else _order(batch, threshold))
        rows, n = runner.input_batch, len(batch.slots)
        names = [self._names[slot] for slot in batch.slots.tolist()]
        rows._req_ids, rows.req_id_to_index = names, dict(zip(names, range(n), strict=True))
        rows.num_computed_tokens_cpu[:n] = batch.starts

    def prepare_inputs(self, scheduler_output: Any, counts: Any) -> tuple[torch.Tensor, None, int]:
        """(Indices of the rows that need logits, no drafts of vLLM's, most rows that it would sample of a sequence)."""
        batch, runner = self.batch, self.runner
        assert batch is not None
        n, total = len(batch.slots), len(batch.tokens)
        ends = batch.starts + batch.counts
        begins, lengths = runner.query_start_loc.np, runner.optimistic_seq_lens_cpu.numpy()
        begins[0] = 0
        np.cumsum(batch.counts, out=begins[1 : n + 1])
        begins[n + 1 :] = total
        lengths[:n], lengths[n:] = ends, 0
        runner.input_ids.np[:total] = batch.tokens
        of = np.repeat(np.arange(n), batch.counts)
        positions = np.arange(total) + (batch.starts - begins[:n])[of]
        runner.query_start_loc.copy_to_gpu()
        runner.seq_lens.copy_(runner.optimistic_seq_lens_cpu, non_blocking=True)
        runner.input_ids.copy_to_gpu(total)
        self.fill(runner.input_ids.gpu, begins)
        async_tensor_h2d(positions, out=runner.positions[:total])
        longest = int(ends.max())
        for table, own in zip(self._batches, self.tables, strict=True):
            rows = own.rows(batch.slots, longest)
            table.block_table.np[:n, : rows.shape[1]] = rows
            table.block_table.copy_to_gpu(n)
            table.slot_mapping.np[:total] = own.places(rows, of, positions)
            table.slot_mapping.np[total:] = PAD_SLOT_ID
            table.slot_mapping.copy_to_gpu()
        return async_tensor_h2d(sampled_rows(counts, batch.wanted), device=runner.device), None, 1

    def determine_graph(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, counted. (Dummy runs, which make the graphs, come before the hooks.)"""
        determined = self._determine(*args, **kwargs)
        self.graphs[determined[0].name.lower()] += 1
        return determined

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """The target's choices along each part."""
        runner = self.runner
        state, runner.execute_model_state = runner.execute_model_state, None
        runner.kv_connector_output = None
        if state is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        return self.choose(state.logits)


def _order(batch: Batch, threshold: int) -> npt.NDArray[np.int64] | None:
    """The order in which some attention backends want a batch: with at most `threshold` tokens and something to read,
    with more, and from the beginning. None: it has that order."""
    region = np.where(batch.starts == 0, 2, batch.counts > threshold)
    if not (np.diff(region) < 0).any():
        return None
    return np.argsort(region, kind="stable")
