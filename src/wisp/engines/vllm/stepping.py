"""Slices become steps of vLLM: mostly one step, with exactly these slices.

A step that does not fit, in tokens or in blocks, becomes several. A slice is then computed in chunks, and its tokens
are chosen with the last of them.

Steps are launched, and their results taken later. Meanwhile others may be launched that build on them. So slots are
kept as they will be once all steps that were launched have run: how far a slice gets is known beforehand, unless it has
a draft. What steps in flight decide (behind `Slot.known`) enters neither the prefix cache nor copies. Blocks may be
given up at once: whoever gets them writes into them after all steps that were launched before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
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
from wisp.engines.in_order import GONE
from wisp.engines.slots import slice_problem
from wisp.engines.vllm.parts import Batch, Blocks, Chosen, Part
from wisp.engines.vllm.slots import Slot, Slots
from wisp.engines.vllm.starting import Started

Launch = Callable[[object], Callable[[], list[Chosen]]]  # see Started.launch


class Task:
    """A slice on its way through steps of vLLM, whose tokens are the last ones of its slot meanwhile.

    step:   the number of its step
    life:   of its slot when it began
    open:   the place of its token that the step before chooses, which the device fills in; -1: all are known
    placed: has all of it been launched, or failed?
    """

    __slots__ = ("chosen", "code", "edits", "error", "life", "open", "placed", "slot", "step", "work")

    def __init__(self, work: Slice, slot: Slot, step: int = -1) -> None:
        self.work, self.slot, self.step = work, slot, step
        self.edits: Sequence[Edit] = ()
        self.chosen: Chosen | None = None
        self.life, self.open = slot.life, -1
        self.placed = False
        self.error = self.code = ""

    def fail(self, error: str, code: str = ENGINE_ERROR) -> None:
        self.error, self.code, self.placed = error, code, True

    def result(self) -> SliceResult:
        """What it came to."""
        if self.error:
            return SliceResult(self.work.session, error=self.error, code=self.code)
        chosen = self.chosen
        if chosen is None or not self.work.sample:
            return SliceResult(self.work.session)
        return SliceResult(self.work.session, len(chosen.tokens) - 1, chosen.tokens, chosen.logprobs)


class Flight:
    """Slices in flight: their tasks, and of each step of vLLM its tasks and what waits for its answers."""

    __slots__ = ("launched", "tasks")

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.launched: list[tuple[list[Task], Callable[[], list[Chosen]]]] = []

    def wait(self) -> None:
        """Until the answers are there. Touches nothing but its own tasks. Raises what vLLM raises."""
        for tasks, answers in self.launched:
            for task, chosen in zip(tasks, answers(), strict=True):
                task.chosen = chosen  # of several chunks the last has them


class _Columns:
    """A step of vLLM in the making: its tasks, and of each what `Batch` has a column for."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.parts: list[Part] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.tokens: list[int] = []
        self.open: list[int] = []

    def batch(self, news: list[tuple[int, int, Blocks]], *, keep: bool) -> Batch:
        return Batch(
            np.array([task.slot.index for task in self.tasks]),
            np.array(self.starts),
            np.array(self.counts),
            np.array(self.tokens),
            np.array([len(part.draft) + 1 if part.sample else 0 for part in self.parts]),
            self.parts,
            news,
            np.array(self.open),
            keep,
        )


class Steps:
    """Runs slices on `slots`, of `slot_tokens` tokens each."""

    def __init__(
        self, started: Started, slots: Slots, slot_tokens: int, constraints: SlotTrackers, launch: Launch
    ) -> None:
        self._started, self._slots, self._constraints = started, slots, constraints
        self._slot_tokens, self._n_vocab = slot_tokens, started.n_vocab
        self._send = launch
        self._clock = 0  # steps so far
        self._observed = self._keep = False

    def run(self, batch: Sequence[Slice], *, observed: bool = False) -> list[Task]:
        """The slices' tasks, done. `observed`: with their logits.

        Raises EngineError where two slices share a slot, and what vLLM raises.
        """
        flight = self.launch(batch, observed=observed)
        flight.wait()
        self.take(flight)
        return flight.tasks

    def launch(
        self, batch: Sequence[Slice], *, step: int = -1, keep: bool = False, observed: bool = False
    ) -> Flight:
        """Launch a step, after all before it. `keep`: the next one may begin with what it chooses.

        Raises EngineError where two slices share a slot, and what vLLM raises.
        """
        self._clock += 1
        self._observed, self._keep = observed, keep
        flight = Flight(self._tasks(batch, step))
        left = [task for task in flight.tasks if not task.placed]
        while left:
            self._launch(left, flight)
            left = [task for task in left if not task.placed]
        return flight

    def take(self, flight: Flight) -> None:
        """What a flight that was waited for means for its slots. Flights are taken in the order of their launches."""
        for task in flight.tasks:
            if not task.error:
                self._take(task)

    # -- slices

    def _tasks(self, batch: Sequence[Slice], step: int) -> list[Task]:
        """The slices' tasks, their tokens in their slots; those that cannot be run have failed."""
        tasks: list[Task] = []
        if len({work.slot for work in batch}) != len(batch):
            raise EngineError("two slices of one batch use the same slot")
        slots, clock = self._slots, self._clock
        for work in batch:
            error = self._problem(work)
            here = 0 <= work.slot < len(slots.all)
            slot = slots.all[work.slot] if here else Slot(-1)
            task = Task(work, slot, step)
            tasks.append(task)
            if not error and work.after >= 0:
                error = self._open(task)
            if error:
                self._fail(task, error)
                continue
            slot.used, slot.sampling = clock, work.sampling
            start, tokens = work.start, task.work.tokens
            if start == 0:
                slots.empty(slot)
                slot.salt = str(work.session)
                task.life = slot.life
            if start < len(slot.tokens):
                slots.cut(slot, start)
            slot.tokens += tokens
            slot.known = start if task.open >= 0 else len(slot.tokens) - work.n_draft
            slot.newest = task
            if work.sampling.constraints is not None:
                self._constrain(task)
        return tasks

    def _open(self, task: Task) -> str:
        """Its first token is what an earlier step chose: filled in, or left to the device if that is not known yet.
        Returns what is wrong, or ""."""
        work, slot = task.work, task.slot
        step, token = slot.last
        if step == work.after:
            task.work = msgspec.structs.replace(work, tokens=[token, *work.tokens[1:]])
            return ""
        before = slot.newest
        if before is None or before.step != work.after or not before.work.sample or before.work.n_draft:
            return GONE
        task.open = work.start
        return ""

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
                and 0 < work.start <= slot.known
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
        """Also what builds on it, in its slot."""
        task.fail(error, code)
        slot = task.slot
        if task.life != slot.life:  # it was begun anew since
            return
        if slot.newest is not None and slot.newest is not task and slot.newest.step > task.step:
            slot.newest.fail(GONE)
        self._slots.empty(slot)
        slot.broken = True

    # -- a step of vLLM

    def _launch(self, tasks: list[Task], flight: Flight) -> None:
        """One step of vLLM with as much of the `tasks` that are left as fits."""
        budget = self._started.step_tokens
        columns = _Columns()
        for task in tasks:
            if budget <= 0:
                break
            budget -= self._place(task, budget, tasks, columns)
        if not columns.tasks:
            return  # the first of those that are left has failed
        scheduler = self._started.scheduler
        batch = columns.batch(scheduler.take_news(), keep=self._keep)
        flight.launched.append((columns.tasks, self._send(scheduler.step(batch))))
        block = scheduler.hash_block_size  # the finest at which blocks are shared
        for task, start, count in zip(columns.tasks, columns.starts, columns.counts, strict=True):
            slot = task.slot
            end = slot.computed = start + count
            slot.anchor = max(start, min(end, slot.known) // block * block)
            task.placed = end == len(slot.tokens)

    def _place(self, task: Task, budget: int, tasks: list[Task], columns: _Columns) -> int:
        """How many of the task's tokens go into the next step of vLLM: up to the end, or a chunk that leaves all
        sampled rows for a later one; 0 if it has to wait."""
        slot, work = task.slot, task.work
        begun = slot.sequence is None
        if begun:
            self._slots.begin(slot, slot.known)
        start, end = slot.computed, len(slot.tokens)
        whole = end - start <= budget
        if not whole:
            end = start + min(budget, end - work.n_draft - work.sample - start)
        firm = min(end, slot.known)
        sequence = slot.sequence
        assert sequence is not None
        if end > start and (
            sequence.fits(end, firm) or self._grown(task, tasks, start, end, firm, alone=not columns.tasks)
        ):
            columns.tasks.append(task)
            columns.starts.append(start)
            columns.counts.append(end - start)
            columns.open.append(task.open - start if start <= task.open < end else -1)
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
            busy = {t.slot.index for t in tasks if not t.placed}
            if not self._slots.make_room(busy, [t.slot for t in tasks if t is not task] if alone else ()):
                return False
        return True

    # -- results

    def _take(self, task: Task) -> None:
        work, slot, chosen = task.work, task.slot, task.chosen
        assert chosen is not None
        if not chosen.finite:
            self._fail(task, NO_TOKEN, NOT_FINITE)
            return
        newest = slot.newest
        if newest is task:
            slot.newest = None
        if not work.sample:
            return
        slot.last = (task.step, chosen.tokens[-1])
        if newest is task:
            self._slots.cut(slot, work.start + len(work.tokens) - work.n_draft + len(chosen.tokens) - 1)
            slot.known = len(slot.tokens)
        elif newest is not None and newest.open >= 0 and newest.work.after == task.step:
            slot.tokens[newest.open] = chosen.tokens[-1]
            slot.known = len(slot.tokens) - newest.work.n_draft
