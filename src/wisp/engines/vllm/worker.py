"""Hooks in vLLM's worker. Three places of its model runner (version 1) are told what to do by a step's `Batch`:

    the batch      our own array of the sequences' blocks takes the place of vLLM's records of requests: a step gathers
                   the rows of its slots from it, in a few operations however many take part, and whoever took part
                   before. So rolling back needs no message, and sessions that alternate cost nothing more
    which rows     logits of the last rows of each part, drafts included
    what is chosen `core.protocol.sampling` at each of these rows, up to the first that disagrees with the draft:
                   the same rule as everywhere in WISP, so the text depends on target, prompt, parameters and seed alone

vLLM's own sampler, rejection sampler and proposers are never called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from wisp.engines.vllm.choosing import choose
from wisp.engines.vllm.parts import Batch, Chosen

EMPTY = EMPTY_MODEL_RUNNER_OUTPUT


class Extension:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any
    wisp_hooks: _Hooks

    def wisp_install(self) -> str:
        """Put the hooks in; the kind of device this worker computes on, or "" if its runner is not the one known."""
        runner = self.model_runner
        if not isinstance(runner, GPUModelRunner):
            return ""
        self.wisp_hooks = _Hooks(runner)
        return str(runner.device.type)

    def wisp_graphs(self) -> dict[str, int]:
        """Steps so far, by the mode of their CUDA graph."""
        return dict(self.wisp_hooks.graphs)


class _Request:
    """What the runner is told of every sequence: nothing is ever to be withheld from sampling."""

    num_tokens = 0


class _Hooks:
    """Takes the place of methods of one runner."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.batch: Batch | None = None
        self.order: npt.NDArray[np.int64] | None = None  # of the batch, where the attention wants another
        self._prepare: Callable[..., Any] = runner._prepare_inputs
        self._determine: Callable[..., Any] = runner._determine_batch_execution_and_padding
        self.graphs: Counter[str] = Counter()
        most = runner.input_batch.max_num_reqs
        self._names = [str(slot) for slot in range(most)]
        self._tables = [_Table(table) for table in runner.input_batch.block_table.block_tables]
        runner.requests = dict.fromkeys(self._names, _Request())
        runner.input_batch.num_prompt_tokens[:] = 1  # whatever begins is a prompt, and nothing else
        runner._update_states = self.update_states
        runner._prepare_inputs = self.prepare_inputs
        runner._determine_batch_execution_and_padding = self.determine_graph
        runner.sample_tokens = self.sample_tokens

    def update_states(self, scheduler_output: Any) -> None:
        """The rows of the batch are this step's sequences."""
        runner = self.runner
        if scheduler_output.new_block_ids_to_zero:
            runner._zero_block_ids(scheduler_output.new_block_ids_to_zero)
        batch: Batch = scheduler_output.wisp_batch
        for slot, known, blocks in batch.blocks:
            for table, ids in zip(self._tables, blocks, strict=True):
                table.append(slot, known, ids)
        self.order = None
        if runner.reorder_batch_threshold is not None:
            self.order = _order(batch, runner.reorder_batch_threshold)
            if self.order is not None:
                batch = batch.ordered(self.order)
        self.batch = batch
        rows, n = runner.input_batch, len(batch.slots)
        names = [self._names[slot] for slot in batch.slots.tolist()]
        rows._req_ids, rows.req_id_to_index = names, dict(zip(names, range(n), strict=True))
        rows.num_computed_tokens_cpu[:n] = batch.starts
        ends = batch.starts + batch.counts
        for table in self._tables:
            table.gather(batch.slots, int(ends.max()))
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
            return EMPTY
        assert self.batch is not None
        output = ModelRunnerOutput([], {})
        # Where only one rank is given the logits, the others' answers are not read.
        chosen: list[Chosen] = []
        if state.logits is not None:
            here = state.logits.device.type == "cpu"
            chosen = choose(state.logits, self.batch.parts, here=here)
            if self.order is not None:
                chosen = [chosen[i] for i in np.argsort(self.order)]
        output.wisp_chosen = chosen
        # A step that chose nothing has not waited for the device, whose copies of its inputs may not be made yet;
        # the next step writes into the same memory.
        runner._sync_device()
        return output


class _Table:
    """The blocks of every slot, of one group of layers, and vLLM's table of those in the batch."""

    def __init__(self, table: Any) -> None:
        self._batch: npt.NDArray[np.int32] = table.block_table.np
        self._all = np.zeros_like(self._batch)
        self._size: int = table.block_size

    def append(self, slot: int, known: int, blocks: Sequence[int]) -> None:
        """`blocks` follow the first `known` ones of the slot."""
        self._all[slot, known : known + len(blocks)] = blocks

    def gather(self, slots: npt.NDArray[np.int64], tokens: int) -> None:
        """The batch's rows are those of `slots`, as far as `tokens` tokens reach."""
        columns = -(-tokens // self._size)
        self._batch[: len(slots), :columns] = self._all[slots, :columns]


def _order(batch: Batch, threshold: int) -> npt.NDArray[np.int64] | None:
    """The order in which some attention backends want a batch: with at most `threshold` tokens and something to read,
    with more, and from the beginning. None: it has that order."""
    region = np.where(batch.starts == 0, 2, batch.counts > threshold)
    if not (np.diff(region) < 0).any():
        return None
    return np.argsort(region, kind="stable")


def sampled_rows(counts: Any, wanted: Any) -> npt.NDArray[np.int64]:
    """Indices of the last `wanted` rows of each of the sequences, which have `counts` rows each.

    If none is wanted the very last one, which is of no use, but models like to have one.
    """
    ends, per = np.cumsum(counts, dtype=np.int64), np.asarray(wanted, np.int64)
    total = int(per.sum())
    if total == 0:
        return ends[-1:] - 1
    return np.arange(total) + np.repeat(ends - np.cumsum(per), per)
