"""The hooks in vLLM's Model Runner V2: they make its inputs themselves.

V2 keeps tokens, drafts and lengths of each sequence on the device, and has Triton kernels make a step's inputs of them.
Here a step's `Batch` has all of that already, on the host: the inputs are made in NumPy, and copied to where V2's
kernels would have written them, so that CUDA graphs find them there. No kernel of V2's and none of its records is used.
Each copy has host memory of its own, so that a step can be prepared while copies of the one before are still to come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import envs
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner
from vllm.v1.worker.utils import get_uniform_decode_token_count

from wisp.engines.vllm.parts import Batch
from wisp.engines.vllm.worker import Hooks, Table, sampled_rows


def hooks_in(runner: Any) -> HooksV2 | None:
    """Put them in; None for a runner that is not the one known, or splits sequences over devices."""
    known = isinstance(runner, GPUModelRunner) and runner.pcp_manager is None and runner.dcp_size == 1
    return HooksV2(runner) if known else None


def _nothing(*_: Any) -> None:
    """In place of V2's records of requests."""


class HooksV2(Hooks):
    """Takes the place of methods of one runner."""

    def __init__(self, runner: Any) -> None:
        blocks = runner.block_tables
        tables = [
            Table(table.shape, size)
            for table, size in zip(blocks.input_block_tables, blocks.block_sizes, strict=True)
        ]
        super().__init__(runner, tables)
        self._gather: Callable[..., Any] = runner.gather_batch_req_state
        self._names = [str(slot) for slot in range(runner.max_num_reqs)]
        self._positions = np.empty(0, np.int64)  # of the step's tokens
        self._of = np.empty(0, np.int64)  # which of the batch's sequences each is of
        for name in ("finish_requests", "free_states", "add_requests"):
            setattr(runner, name, _nothing)
        blocks.apply_staged_writes = _nothing
        runner.update_requests = self.update_requests
        runner.gather_batch_req_state = self.gather
        runner.prepare_inputs = self.prepare_inputs
        runner.prepare_attn = self.prepare_attn
        runner.sample_tokens = self.sample_tokens

    def zero(self, blocks: Any) -> None:
        self.runner.kv_block_zeroer.zero_block_ids(blocks)

    def update_requests(self, scheduler_output: Any) -> None:
        """The step's sequences, those with few rows first: some attention backends want decodes to lead."""
        batch = self.take(scheduler_output)
        self.arrange(batch, _order(batch))

    def gather(self, scheduler_output: Any, dummy_run: bool) -> Any:
        """What vLLM picks a CUDA graph by: (the batch as it knows it, rows of each sequence if all have as many)."""
        if dummy_run:
            return self._gather(scheduler_output, dummy_run)
        batch = self.batch
        assert batch is not None
        counts, begins = batch.counts.astype(np.int32), batch.starts == 0
        n, total, prefill = len(counts), len(batch.tokens), bool(begins.any())
        state = BatchReqState(
            req_ids=[self._names[slot] for slot in batch.slots.tolist()],
            num_scheduled_tokens=counts,
            num_tokens=total,
            num_draft_tokens_np=None,
            idx_mapping_np=batch.slots.astype(np.intp),
            prefill_len_np=np.ones(n, np.int32),  # whatever begins is a prompt, and nothing else
            num_computed_prefill_tokens_np=np.minimum(batch.starts, 1).astype(np.int32),
            is_prefilling_np=begins,
            max_seq_len_np=None,
            has_prefill=prefill,
            prefill_runs_as_decode_np=None,
            decode_graph_eligible=not prefill,
        )
        return state, get_uniform_decode_token_count(n, total, int(counts.max()), not prefill)

    def prepare_inputs(self, scheduler_output: Any, state: Any, graph: Any, loras: int) -> InputBatch:
        """The batch on the device, padded as the graph was made."""
        batch, buffers = self.batch, self.runner.input_buffers
        assert batch is not None
        self.graphs[graph.cg_mode.name.lower()] += 1
        n, total = len(batch.slots), len(batch.tokens)
        padded, sequences = max(total, graph.num_tokens), graph.num_reqs or n
        begins = np.full(self.runner.max_num_reqs + 1, total, np.int32)
        begins[0] = 0
        np.cumsum(batch.counts, out=begins[1 : n + 1])
        self._of = np.repeat(np.arange(n), batch.counts)
        self._positions = np.arange(total) + (batch.starts - begins[:n])[self._of]
        lengths = np.zeros(self.runner.max_num_reqs, np.int32)
        lengths[:n] = batch.starts + batch.counts
        async_tensor_h2d(batch.tokens.astype(np.int32), out=buffers.input_ids[:total])
        self.fill(buffers.input_ids, begins)
        async_tensor_h2d(self._positions, out=buffers.positions[:total])
        async_tensor_h2d(begins, out=buffers.query_start_loc)
        async_tensor_h2d(lengths, out=buffers.seq_lens)
        if envs.VLLM_MOE_SKIP_PADDING:
            buffers.is_padding[:total].fill_(False)
            buffers.is_padding[total:padded].fill_(True)
        wanted = np.zeros(n + 1, np.int32)
        np.cumsum(batch.wanted, out=wanted[1:])
        indices = async_tensor_h2d(batch.slots, device=self.runner.device)
        return InputBatch(
            req_ids=state.req_ids,
            num_reqs=n,
            num_reqs_after_padding=sequences,
            idx_mapping=indices,
            idx_mapping_np=state.idx_mapping_np,
            expanded_idx_mapping=indices,
            expanded_local_pos=torch.zeros(n, dtype=torch.int32, device=self.runner.device),
            num_scheduled_tokens=state.num_scheduled_tokens,
            num_tokens=total,
            num_tokens_after_padding=padded,
            num_draft_tokens=0,
            num_draft_tokens_per_req=None,
            query_start_loc=buffers.query_start_loc[: sequences + 1],
            query_start_loc_np=begins[: sequences + 1],
            seq_lens=buffers.seq_lens[:sequences],
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths[:sequences]),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=batch.starts.astype(np.int32),
            prefill_len_np=state.prefill_len_np,
            num_computed_prefill_tokens_np=state.num_computed_prefill_tokens_np,
            is_prefilling_np=state.is_prefilling_np,
            has_prefill=state.has_prefill,
            decode_graph_eligible=state.decode_graph_eligible,
            input_ids=buffers.input_ids[:padded],
            positions=buffers.positions[:padded],
            is_padding=buffers.is_padding[:padded],
            logits_indices=async_tensor_h2d(
                sampled_rows(batch.counts, batch.wanted), device=self.runner.device
            ),
            cu_num_logits=async_tensor_h2d(wanted, device=self.runner.device),
            cu_num_logits_np=wanted,
            has_structured_output_reqs=False,
            prompt_lens=None,
        )

    def prepare_attn(self, prepared: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """(The sequences' blocks of each group of layers, and where in the KV cache each token goes)."""
        batch, blocks = self.batch, self.runner.block_tables
        assert batch is not None
        n, total = prepared.num_reqs, prepared.num_tokens
        sequences, padded = prepared.num_reqs_after_padding, prepared.num_tokens_after_padding
        longest = int((batch.starts + batch.counts).max())
        mappings = blocks.slot_mappings
        for group, (own, table) in enumerate(zip(self.tables, blocks.input_block_tables, strict=True)):
            rows = own.rows(batch.slots, longest)
            async_tensor_h2d(rows, out=table[:n, : rows.shape[1]])
            table[n:sequences].zero_()
            async_tensor_h2d(own.places(rows, self._of, self._positions), out=mappings[group, :total])
        mappings[:, total:].fill_(PAD_SLOT_ID)
        return tuple(table[:sequences] for table in blocks.input_block_tables), mappings[:, :padded]

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """The target's choices along each part."""
        runner = self.runner
        state, runner.execute_model_state = runner.execute_model_state, None
        if state is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        logits = runner.model.compute_logits(state.hidden_states[state.input_batch.logits_indices])
        return self.choose(logits)


def _order(batch: Batch) -> npt.NDArray[np.int64] | None:
    """By rows, beginnings last. None: it has that order."""
    by = np.where(batch.starts == 0, np.iinfo(np.int64).max, batch.counts)
    if not (np.diff(by) < 0).any():
        return None
    return np.argsort(by, kind="stable")
