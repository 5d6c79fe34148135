"""Slices become steps of vLLM: mostly one step, with exactly these slices.

A step that does not fit, in tokens or in blocks, becomes several. A slice is then computed in chunks, and its tokens
are chosen with the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wisp.core.errors import EngineError, GrammarError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.step import (
    ENGINE_ERROR,
    NO_TOKEN,
    NOT_FINITE,
    Slice,
    SliceResult,
)
from wisp.engines.constraining import SlotTrackers, code_of
from wisp.engines.slots import slice_problem
from wisp.engines.vllm.parts import Batch, Blocks, Chosen, Part
from wisp.engines.vllm.slots import Slot, Slots
from wisp.engines.vllm.starting import Started


class Task:
    """A slice on its way through steps of vLLM, whose tokens are the last ones of its slot meanwhile."""

    __slots__ = ("chosen", "code", "done", "edits", "error", "slot", "work")

    def __init__(self, work: Slice, slot: Slot) -> None:
        self.work, self.slot = work, slot
        self.edits: Sequence[Edit] = ()
        self.chosen: Chosen | None = None
        self.done = False
        self.error = self.code = ""

    def result(self) -> SliceResult:
        """What it came to."""
        if self.error:
            return SliceResult(self.work.session, error=self.error, code=self.code)
        chosen = self.chosen
        if chosen is None or not self.work.sample:
            return SliceResult(self.work.session)
        return SliceResult(self.work.session, len(chosen.tokens) - 1, chosen.tokens, chosen.logprobs)


class _Columns:
    """A step of vLLM in the making: its tasks, and of each what `Batch` has a column for."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.parts: list[Part] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.tokens: list[int] = []

    def batch(self, news: list[tuple[int, int, Blocks]]) -> Batch:
        return Batch(
            np.array([task.slot.index for task in self.tasks]),
            np.array(self.starts),
            np.array(self.counts),
            np.array(self.tokens),
            np.array([len(part.draft) + 1 if part.sample else 0 for part in self.parts]),
            self.parts,
            news,
        )


class Steps:
    """Runs slices on `slots`, of `slot_tokens` tokens each."""

    def __init__(self, started: Started, slots: Slots, slot_tokens: int, constraints: SlotTrackers) -> None:
        self._started, self._slots, self._constraints = started, slots, constraints
        self._slot_tokens, self._n_vocab = slot_tokens, started.n_vocab
        self._clock = 0  # steps so far
        self._observed = False

    def run(self, batch: Sequence[Slice], *, observed: bool = False) -> list[Task]:
        """The slices' tasks, done. `observed`: with their logits.

        Raises EngineError where two slices share a slot, and what vLLM raises.
        """
        self._clock += 1
        self._observed = observed
        tasks = self._tasks(batch)
        left = [task for task in tasks if not task.done]
        while left:
            self._step(left)
            left = [task for task in left if not task.done]
        return tasks

    # -- slices

    def _tasks(self, batch: Sequence[Slice]) -> list[Task]:
        """The slices' tasks, their tokens in their slots; those that cannot be run have failed."""
        tasks: list[Task] = []
        if len({work.slot for work in batch}) != len(batch):
            raise EngineError("two slices of one batch use the same slot")
        slots, clock = self._slots, self._clock
        for work in batch:
            error = self._problem(work)
            if error:
                here = 0 <= work.slot < len(slots.all)
                task = Task(work, slots.all[work.slot] if here else Slot(-1))
                self._fail(task, error)
                tasks.append(task)
                continue
            slot = slots.all[work.slot]
            slot.used, slot.sampling = clock, work.sampling
            start = work.start
            if start == 0:
                slots.drop_blocks(slot)
                slot.salt = str(work.session)
            if start < len(slot.tokens):
                slots.cut(slot, start)
            slot.tokens += work.tokens
            task = Task(work, slot)
            if work.sampling.constraints is not None:
                self._constrain(task)
            tasks.append(task)
        return tasks

    def _constrain(self, task: Task) -> None:
        try:
            task.edits = list(self._constraints.edits(task.work) or ())
        except GrammarError as error:
            self._fail(task, str(error), code_of(error))

    def _problem(self, work: Slice) -> str:
        """What is wrong with a slice, in words, or ""."""
        n, slots = work.slot, self._slots
        if 0 <= n < len(slots.all):
            slot, tokens, sampling = slots.all[n], work.tokens, work.sampling
            if (
                sampling is slot.sampling  # which was in order then
                and sampling.constraints is None
                and work.sample
                and 0 < work.start <= len(slot.tokens)
                and 0 <= work.n_draft < len(tokens) <= self._started.step_tokens
                and work.start + len(tokens) <= self._slot_tokens
                and min(tokens) >= 0
                and max(tokens) < self._n_vocab
            ):
                return ""  # what is said below of most, sooner
        if work.n_draft >= self._started.step_tokens:
            return f"{work.n_draft} draft tokens do not fit a step of {self._started.step_tokens}"
        sizes = {"slots": len(slots.all), "slot_tokens": self._slot_tokens, "n_vocab": self._n_vocab}
        return slice_problem(work, slots.held, **sizes)

    def _fail(self, task: Task, error: str, code: str = ENGINE_ERROR) -> None:
        task.error, task.code, task.done = error, code, True
        self._slots.empty(task.slot)

    # -- a step of vLLM

    def _step(self, tasks: list[Task]) -> None:
        """One step of vLLM with as much of the unfinished `tasks` as fits."""
        budget = self._started.step_tokens
        columns = _Columns()
        for task in tasks:
            if budget <= 0:
                break
            budget -= self._place(task, budget, tasks, columns)
        if not columns.tasks:
            return  # the first of the unfinished has failed
        scheduler = self._started.scheduler
        scheduler.batch = columns.batch(scheduler.take_news())
        self._started.step()
        block = scheduler.hash_block_size  # the finest at which blocks are shared
        for task, start, count, chosen in zip(
            columns.tasks, columns.starts, columns.counts, scheduler.chosen, strict=True
        ):
            self._take(task, start, count, chosen, block)

    def _place(self, task: Task, budget: int, tasks: list[Task], columns: _Columns) -> int:
        """How many of the task's tokens go into the next step of vLLM: up to the end, or a chunk that leaves all
        sampled rows for a later one; 0 if it has to wait."""
        slot, work = task.slot, task.work
        begun = slot.sequence is None
        if begun:
            self._slots.begin(slot, len(slot.tokens) - work.n_draft)
        start, end = slot.computed, len(slot.tokens)
        firm = end - work.n_draft
        whole = end - start <= budget
        if not whole:
            end = firm = start + min(budget, firm - work.sample - start)
        sequence = slot.sequence
        assert sequence is not None
        if end > start and (
            sequence.fits(end, firm) or self._grown(task, tasks, start, end, firm, alone=not columns.tasks)
        ):
            columns.tasks.append(task)
            columns.starts.append(start)
            columns.counts.append(end - start)
            tokens = work.tokens
            columns.tokens += tokens if whole and end - start == len(tokens) else slot.tokens[start:end]
            columns.parts.append(
                Part(
                    tokens[len(tokens) - work.n_draft :],
                    work.sample,
                    work.position,
                    work.sampling,
                    work.logprobs,
                    self._observed,
                    task.edits,
                )
                if whole
                else Part([], False)
            )
            return end - start
        if begun:  # what the prefix cache was found to have is taken now or may be gone later
            self._slots.drop_blocks(slot)
        if not columns.tasks:
            self._fail(task, "the KV cache is too small for this context")
        return 0

    def _grown(self, task: Task, tasks: list[Task], start: int, end: int, firm: int, *, alone: bool) -> bool:
        """Are there blocks for the task's tokens up to `end`? Others give up theirs for it where they must, and others
        of this batch only where nothing else will do and it is `alone`."""
        slot = task.slot
        assert slot.sequence is not None
        while not self._started.scheduler.grow(slot.sequence, start, end - start, slot.tokens, firm):
            busy = {t.slot.index for t in tasks if not t.done}
            if not self._slots.make_room(busy, [t.slot for t in tasks if t is not task] if alone else ()):
                return False
        return True

    def _take(self, task: Task, start: int, count: int, chosen: Chosen, block: int) -> None:
        """`count` tokens from place `start` on were computed."""
        slot = task.slot
        held = len(slot.tokens)
        computed = slot.computed = start + count
        firm = computed
        if computed == held:
            firm -= task.work.n_draft
        slot.anchor = max(start, firm // block * block)
        if computed < held:
            return
        if not chosen.finite:
            self._fail(task, NO_TOKEN, NOT_FINITE)
            return
        task.chosen, task.done = chosen, True
        if task.work.n_draft:
            self._slots.cut(slot, firm + len(chosen.tokens) - 1)
