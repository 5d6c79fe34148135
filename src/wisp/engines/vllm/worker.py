"""Hooks in vLLM's worker. Three places of its model runner (version 1) are told what to do by a step's parts:

    which tokens   they are written into the batch before inputs are gathered, so nothing that a worker remembers
                   of a sequence but its blocks matters, and rolling back needs no message
    which rows     logits of the last rows of each part, drafts included
    what is chosen `core.protocol.sampling` at each of these rows, up to the first that disagrees with the draft:
                   the same rule as everywhere in WISP, so the text depends on target, prompt, parameters and seed alone

vLLM's own sampler, rejection sampler and proposers are never called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from wisp.engines.vllm.choosing import choose
from wisp.engines.vllm.parts import Chosen, Part

EMPTY = EMPTY_MODEL_RUNNER_OUTPUT


class Extension:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any

    def wisp_install(self) -> str:
        """Put the hooks in; the kind of device this worker computes on, or "" if its runner is not the one known."""
        runner = self.model_runner
        if not isinstance(runner, GPUModelRunner):
            return ""
        _Hooks(runner)
        return str(runner.device.type)


class _Hooks:
    """Takes the place of three methods of one runner."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.parts: Mapping[str, Part] = {}
        self._update: Callable[..., Any] = runner._update_states
        self._prepare: Callable[..., Any] = runner._prepare_inputs
        runner._update_states = self.update_states
        runner._prepare_inputs = self.prepare_inputs
        runner.sample_tokens = self.sample_tokens

    def update_states(self, scheduler_output: Any) -> Any:
        """vLLM's, then this step's tokens are written where inputs are gathered from."""
        later = self._update(scheduler_output)
        self.parts = getattr(scheduler_output, "wisp_parts", {})
        batch = self.runner.input_batch
        for sequence, part in self.parts.items():
            row = batch.req_id_to_index[sequence]
            batch.token_ids_cpu[row, part.start : part.start + len(part.tokens)] = part.tokens
        return later

    def prepare_inputs(self, scheduler_output: Any, counts: Any) -> Any:
        """vLLM's, with the rows that need logits in place of the last row of each sequence."""
        prepared = self._prepare(scheduler_output, counts)
        if not self.parts:  # a dummy run
            return prepared
        rows = sampled_rows(counts, [part.rows for part in self._in_order()])
        return torch.from_numpy(rows).to(self.runner.device, non_blocking=True), None, 1

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """The target's choices along each part."""
        runner = self.runner
        state, runner.execute_model_state = runner.execute_model_state, None
        runner.kv_connector_output = None
        if state is None:
            return EMPTY
        names = list(runner.input_batch.req_ids)
        output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)})
        # Where only one rank is given the logits, the others' answers are not read.
        chosen: list[Chosen] = []
        if state.logits is not None:
            here = state.logits.device.type == "cpu"
            chosen = choose(state.logits, list(self._in_order()), here=here)
        output.wisp_chosen = dict(zip(names, chosen, strict=False))
        # A step that chose nothing has not waited for the device, whose copies of its inputs may not be made yet;
        # the next step writes into the same memory.
        runner._sync_device()
        return output

    def _in_order(self) -> Iterator[Part]:
        return (self.parts[name] for name in self.runner.input_batch.req_ids)


def sampled_rows(counts: Any, wanted: Sequence[int]) -> npt.NDArray[np.int64]:
    """Indices of the last `wanted` rows of each of the sequences, which have `counts` rows each.

    If none is wanted the very last one, which is of no use, but models like to have one.
    """
    ends, per = np.cumsum(counts, dtype=np.int64), np.asarray(wanted, np.int64)
    total = int(per.sum())
    if total == 0:
        return ends[-1:] - 1
    return np.arange(total) + np.repeat(ends - np.cumsum(per), per)
