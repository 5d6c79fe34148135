"""Hooks in vLLM's worker. Its model runner is told by a step's `Batch`, in three places:

    the batch      sequences, their tokens and blocks, gathered by slot from arrays of our own, in a few operations
                   however many take part, whatever the step before had. So rolling back needs no message, and
                   sessions that alternate cost nothing more
    which rows     logits of the last rows of each part, drafts included
    what is chosen `core.protocol.sampling` at each of these rows, up to the first that disagrees with the draft:
                   the same rule as everywhere in WISP, so the text depends on target, prompt, parameters and seed alone

A step is launched, and its answers come back when somebody asks for them: meanwhile the next one may be launched. The
token that it needs of this one stays on the device, in `Hooks.last`.

vLLM's own sampler, rejection sampler and proposers are never called. Where the three places are in each version of the
model runner is in `runner_v1.py` and `runner_v2.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from wisp.engines.vllm.choosing import choose
from wisp.engines.vllm.parts import Batch, Chosen


class Extension:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any
    wisp_hooks: Hooks

    def wisp_install(self) -> str:
        """Put the hooks in; the kind of device this worker computes on, or "" if its runner is not one known."""
        runner = self.model_runner
        hooks: Hooks | None
        if runner.vllm_config.use_v2_model_runner:
            from wisp.engines.vllm import runner_v2

            hooks = runner_v2.hooks_in(runner)
        else:
            from wisp.engines.vllm import runner_v1

            hooks = runner_v1.hooks_in(runner)
        if hooks is None:
            return ""
        self.wisp_hooks = hooks
        return str(runner.device.type)

    def wisp_graphs(self) -> dict[str, int]:
        """Steps so far, by the mode of their CUDA graph."""
        return dict(self.wisp_hooks.graphs)


class Hooks(ABC):
    """What both versions have in common.

    batch:  of the step at hand, in the order in which the attention wants it
    order:  of that batch in the one that was given, None: the same
    tables: of each group of layers
    last:   on the device, int64 [slots]: the first token that was chosen for each slot, in the last step that chose one
            for it and was to `keep` it
    graphs: steps so far by the mode of their CUDA graph
    """

    def __init__(self, runner: Any, tables: list[Table]) -> None:
        self.runner = runner
        self.last = torch.zeros(len(tables[0].all), dtype=torch.int64, device=runner.device)
        self.batch: Batch | None = None
        self.order: npt.NDArray[np.int64] | None = None
        self.tables = tables
        self.graphs: Counter[str] = Counter()

    def take(self, scheduler_output: Any) -> Batch:
        """This step's batch as it was given; its news of blocks are taken in."""
        if scheduler_output.new_block_ids_to_zero:
            self.zero(scheduler_output.new_block_ids_to_zero)
        batch: Batch = scheduler_output.wisp_batch
        for slot, known, blocks in batch.blocks:
            for table, ids in zip(self.tables, blocks, strict=True):
                table.append(slot, known, ids)
        return batch

    @abstractmethod
    def zero(self, blocks: Any) -> None:
        """What these blocks hold on the device is to be zero."""

    def arrange(self, batch: Batch, order: npt.NDArray[np.int64] | None) -> Batch:
        """Keep the batch, in that order."""
        self.order = order
        self.batch = batch if order is None else batch.ordered(order)
        return self.batch

    def fill(self, tokens: torch.Tensor, begins: npt.NDArray[Any]) -> None:
        """Put what the step before has chosen among this step's tokens; a sequence's are there from `begins` on."""
        batch = self.batch
        assert batch is not None
        some = np.flatnonzero(batch.open >= 0)
        if some.size:
            at, of = self._there(begins[some] + batch.open[some], batch.slots[some])
            tokens[at] = self.last[of].to(tokens.dtype)

    def choose(self, logits: torch.Tensor | None) -> Answers:
        """The target's choices along each part, in the order in which they were given."""
        batch, order = self.batch, self.order
        assert batch is not None
        if logits is None:  # another rank has them, and this one's answers are not read
            if batch.keep:
                raise RuntimeError("a worker is not given the logits, and cannot have two steps in flight")
            return Answers(list, self.mark())
        choice = choose(logits, batch.parts, here=logits.device.type == "cpu")
        if batch.keep:
            # Of logits that are not finite the token may be none, and nobody is told what comes of it.
            self._keep(batch, choice.tokens.clamp(0, logits.shape[1] - 1))
        if order is None:
            return Answers(choice.chosen, self.mark())
        back = np.argsort(order)

        def ordered() -> list[Chosen]:
            chosen = choice.chosen()
            return [chosen[i] for i in back]

        return Answers(ordered, self.mark())

    def _keep(self, batch: Batch, tokens: torch.Tensor) -> None:
        """The first of each part; `tokens` has one for each row."""
        some = np.flatnonzero(batch.wanted)
        if some.size:
            of, at = self._there(batch.slots[some], (np.cumsum(batch.wanted) - batch.wanted)[some])
            self.last[of] = tokens[at].to(torch.int64)

    def mark(self) -> torch.cuda.Event | None:
        """What to wait for until the device has done all that it was told so far; None where that is the case now."""
        device = self.runner.device
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            return event
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return None

    def _there(self, *rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return async_tensor_h2d(np.stack(rows), device=self.runner.device)


class Answers(AsyncModelRunnerOutput):
    """A step's answers: `chosen` tells them once the device is `done`."""

    def __init__(self, chosen: Callable[[], list[Chosen]], done: torch.cuda.Event | None) -> None:
        self._chosen, self._done = chosen, done

    def get_output(self) -> ModelRunnerOutput:
        """Waits for them, in any thread."""
        if self._done is not None:
            self._done.synchronize()
        output = ModelRunnerOutput([], {})
        output.wisp_chosen = self._chosen()
        return output

    def get_kv_connector_output(self) -> None:
        """There is no connector; vLLM 0.33 asks."""


class Table:
    """The blocks of every slot, of one group of layers: int32 [slots, blocks of the longest sequence]."""

    def __init__(self, shape: tuple[int, int], size: int) -> None:
        self.all = np.zeros(shape, np.int32)
        self.size = size  # tokens of a block

    def append(self, slot: int, known: int, blocks: Sequence[int]) -> None:
        """`blocks` follow the first `known` ones of the slot."""
        self.all[slot, known : known + len(blocks)] = blocks

    def rows(self, slots: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.int32]:
        """Of these slots, as far as `tokens` tokens reach."""
        return self.all[slots, : -(-tokens // self.size)]

    def places(
        self, rows: npt.NDArray[np.int32], of: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where in the KV cache tokens go: `of` says which of the rows each is of, `positions` its place there."""
        blocks = rows[of, positions // self.size].astype(np.int64)
        return blocks * self.size + positions % self.size


def sampled_rows(counts: Any, wanted: Any) -> npt.NDArray[np.int64]:
    """Indices of the last `wanted` rows of each of the sequences, which have `counts` rows each.

    If none is wanted the very last one, which is of no use, but models like to have one.
    """
    ends, per = np.cumsum(counts, dtype=np.int64), np.asarray(wanted, np.int64)
    total = int(per.sum())
    if total == 0:
        return ends[-1:] - 1
    return np.arange(total) + np.repeat(ends - np.cumsum(per), per)
