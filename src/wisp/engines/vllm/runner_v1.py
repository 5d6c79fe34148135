"""The hooks in vLLM's Model Runner V1: they write into the arrays that it makes its inputs from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from wisp.engines.vllm.parts import Batch
from wisp.engines.vllm.worker import Hooks, Table, sampled_rows


def hooks_in(runner: Any) -> HooksV1 | None:
    """Put them in; None for a runner that is not the one known."""
    return HooksV1(runner) if isinstance(runner, GPUModelRunner) else None


class _Request:
    """What the runner is told of every sequence: nothing is ever to be withheld from sampling."""

    num_tokens = 0


class HooksV1(Hooks):
    """Takes the place of methods of one runner."""

    def __init__(self, runner: Any) -> None:
        self._batches = runner.input_batch.block_table.block_tables  # of those in the batch, by group
        super().__init__(runner, [Table(b.block_table.np.shape, b.block_size) for b in self._batches])
        self._prepare: Callable[..., Any] = runner._prepare_inputs
        self._determine: Callable[..., Any] = runner._determine_batch_execution_and_padding
        self._names = [str(slot) for slot in range(runner.input_batch.max_num_reqs)]
        runner.requests = dict.fromkeys(self._names, _Request())
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
        ends = batch.starts + batch.counts
        for table, own in zip(self._batches, self.tables, strict=True):
            blocks = own.rows(batch.slots, int(ends.max()))
            table.block_table.np[:n, : blocks.shape[1]] = blocks
        width = rows.token_ids_cpu.shape[1]
        first = np.arange(n) * width + ends - np.cumsum(batch.counts)
        rows.token_ids_cpu.reshape(-1)[np.repeat(first, batch.counts) + np.arange(len(batch.tokens))] = (
            batch.tokens
        )

    def prepare_inputs(self, scheduler_output: Any, counts: Any) -> Any:
        """vLLM's, with the rows that need logits in place of the last row of each sequence."""
        prepared = self._prepare(scheduler_output, counts)
        if self.batch is None:  # a dummy run
            return prepared
        rows = sampled_rows(counts, self.batch.wanted)
        return torch.from_numpy(rows).to(self.runner.device, non_blocking=True), None, 1

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
        output = self.choose(state.logits)
        # A step that chose nothing has not waited for the device, whose copies of its inputs may not be made yet;
        # the next step writes into the same memory.
        runner._sync_device()
        return output


def _order(batch: Batch, threshold: int) -> npt.NDArray[np.int64] | None:
    """The order in which some attention backends want a batch: with at most `threshold` tokens and something to read,
    with more, and from the beginning. None: it has that order."""
    region = np.where(batch.starts == 0, 2, batch.counts > threshold)
    if not (np.diff(region) < 0).any():
        return None
    return np.argsort(region, kind="stable")
