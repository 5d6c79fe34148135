"""TargetEngine over vLLM: a step of the verifier is one step of vLLM's engine, with exactly its slices.

A slot is a vLLM sequence: held while no slice names it, cut back when drafts are rejected, begun anew when a slice
starts where nothing is to be kept. What a slot *holds* is the verifier's business and is promised; how much of it
is *computed* is a cache: where blocks run short, sequences that are not in the step give theirs up, and what is
missing is fed again with their next slice (mostly from the prefix cache). A step that does not fit, in tokens or in
blocks, becomes several. So text never depends on memory.

Prefixes are shared only where the verifier copies one slot to another, or goes on in a slot: as everywhere in
WISP, what another customer has asked cannot be felt in the time to the first token.

vLLM wants all of its calls from the thread that loaded it, so it has a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from wisp.core.errors import ConfigError, EngineDeadError, EngineError, GrammarError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import (
    ENGINE_ERROR,
    NO_TOKEN,
    NOT_FINITE,
    Copy,
    Slice,
    SliceResult,
)
from wisp.engines import exactness
from wisp.engines.base import EngineInfo, StepQueue
from wisp.engines.constraining import SlotTrackers, code_of
from wisp.engines.identity import engine_digest, folder_digest
from wisp.engines.in_order import OneAtATime
from wisp.engines.slots import check_copy, slice_problem
from wisp.engines.vllm import selftest
from wisp.engines.vllm.models import fetched
from wisp.engines.vllm.parts import Batch, Blocks, Chosen, Part
from wisp.engines.vllm.starting import RUNNERS, Started, Wanted

if TYPE_CHECKING:
    from wisp.engines.vllm.scheduler import Held

T = TypeVar("T")


class _Slot:
    """`tokens` are held; the first `computed` of them have KV, in the blocks of `sequence` (None: no blocks).

    anchor:   it can be cut back to here or further on; before that, blocks are shared or dropped
    salt:     sequences of one salt may share blocks
    used:     when it last took part, in steps
    sampling: the parameters that were last found to be in order
    """

    __slots__ = ("anchor", "computed", "index", "salt", "sampling", "sequence", "tokens", "used")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.sequence: Held | None = None
        self.computed = self.anchor = self.used = 0
        self.salt = ""
        self.sampling: Sampling | None = None


class _Task:
    """A slice on its way through a step, whose tokens are the last ones of its slot meanwhile."""

    __slots__ = ("chosen", "code", "done", "edits", "error", "slot", "work")

    def __init__(self, work: Slice, slot: _Slot) -> None:
        self.work, self.slot = work, slot
        self.edits: Sequence[Edit] = ()
        self.chosen: Chosen | None = None
        self.done = False
        self.error = self.code = ""

    def result(self) -> SliceResult:
        if self.error:
            return SliceResult(self.work.session, error=self.error, code=self.code)
        chosen = self.chosen
        if chosen is None or not self.work.sample:
            return SliceResult(self.work.session)
        return SliceResult(self.work.session, len(chosen.tokens) - 1, chosen.tokens, chosen.logprobs)


class _Columns:
    """A step of vLLM in the making: its tasks, and of each what `Batch` has a column for."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
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


class VllmTarget:
    """See the top of this file. `name` is the model's in EngineInfo, `eos` the ids that end a generation.

    Raises ConfigError or ModelError if vLLM or the model is not one that this works with, or fails the self-test.
    """

    def __init__(self, wanted: Wanted, *, name: str, eos: Iterable[int]) -> None:
        if wanted.slots < 1 or wanted.slot_tokens < 32:
            raise EngineError(
                f"{wanted.slots} slots of {wanted.slot_tokens} tokens: an engine needs at least one, of at least 32"
            )
        self._thread = ThreadPoolExecutor(1, "vllm")
        self._own = self._thread.submit(threading.current_thread).result()
        self._closed = False
        self._slot_tokens = wanted.slot_tokens
        self._clock = 0
        self._observing = False
        self._model, self._quantization, self._runner = wanted.model, wanted.quantization, wanted.runner
        self._is_exact = wanted.exact
        self.constraints = SlotTrackers()
        self._slots = [_Slot(index) for index in range(wanted.slots)]
        try:
            self._started = self._call(lambda: Started(wanted))
        except BaseException:
            self._thread.shutdown()
            raise
        try:
            self._n_vocab = self._started.n_vocab
            self._info = self._describe(name, frozenset(eos))
            self._info = msgspec.structs.replace(self._info, flip_gap=selftest.check(self))
            if wanted.exact:
                self._info = self._exact()
        except BaseException:
            self.close()
            raise
        self.clear()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def inside(self, function: Callable[[], T]) -> T:
        """Call `function` in the engine's own thread, where its methods take no switch: for measurements."""
        return self._call(function)

    def occupy(self, main: Callable[[], None]) -> Callable[[], None]:
        """Run `main` in the engine's own thread (see OwnThread)."""
        return self._thread.submit(main).result

    @property
    def started(self) -> Started:
        """The engine below, for measurements."""
        return self._started

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """One step (see TargetEngine.run)."""
        return [task.result() for task in self._run(batch)]

    def observe(self, batch: Sequence[Slice]) -> list[tuple[SliceResult, Any]]:
        """`run`, and with each result the logits of all its sampled rows (float32 [rows, vocabulary], or None)."""
        self._observing = True
        try:
            return [(t.result(), t.chosen.logits if t.chosen else None) for t in self._run(batch)]
        finally:
            self._observing = False

    def queue(self, depth: int) -> StepQueue:
        """Steps run one at a time."""
        return OneAtATime(self, depth)

    def copy(self, copy: Copy) -> None:
        """`target` holds what `source` holds, up to `copy.tokens`; its blocks are looked up when it is next fed."""
        check_copy(copy, self.held, slots=len(self._slots))
        source, target = self._slots[copy.source], self._slots[copy.target]
        self._call(lambda: self._drop_blocks(target))
        target.tokens, target.salt = source.tokens[: copy.tokens], source.salt

    def held(self, slot: int) -> int:
        """Tokens that `slot` holds."""
        return len(self._slots[slot].tokens)

    def clear(self) -> None:
        """Empties every slot and the prefix cache."""
        self._call(self._clear)

    def close(self) -> None:
        """Ends vLLM's workers and frees the model. Closing twice does nothing."""
        if not self._closed:
            self._call(self._started.close)
            self._closed = True
            self._thread.shutdown()

    # -- a step

    def _run(self, batch: Sequence[Slice]) -> list[_Task]:
        self._require_life()
        return self._call(lambda: self._steps(batch))

    def _call(self, function: Callable[[], T]) -> T:
        if self._closed:
            raise EngineError("the engine is closed")
        if threading.current_thread() is self._own:
            return function()
        return self._thread.submit(function).result()

    def _steps(self, batch: Sequence[Slice]) -> list[_Task]:
        self._clock += 1
        tasks = self._tasks(batch)
        try:
            left = [task for task in tasks if not task.done]
            while left:
                self._step(left)
                left = [task for task in left if not task.done]
        except EngineError:
            raise
        except Exception as error:
            self._require_life()
            self._clear()
            raise EngineError(f"vLLM failed: {str(error).strip() or repr(error)}") from error
        return tasks

    def _require_life(self) -> None:
        if self._started.dead:
            raise EngineDeadError("a worker process of vLLM has died; start the verifier again")

    def _step(self, tasks: list[_Task]) -> None:
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

    def _place(self, task: _Task, budget: int, tasks: list[_Task], columns: _Columns) -> int:
        """How many of the task's tokens go into the next step of vLLM: up to the end, or a chunk that leaves all
        sampled rows for a later one; 0 if it has to wait."""
        slot, work = task.slot, task.work
        begun = slot.sequence is None
        if begun:
            self._begin(task)
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
                    self._observing,
                    task.edits,
                )
                if whole
                else Part([], False)
            )
            return end - start
        if begun:  # what the prefix cache was found to have is taken now or may be gone later
            self._drop_blocks(slot)
        if not columns.tasks:
            self._fail(task, "the KV cache is too small for this context")
        return 0

    def _grown(
        self, task: _Task, tasks: list[_Task], start: int, end: int, firm: int, *, alone: bool
    ) -> bool:
        """Are there blocks for the task's tokens up to `end`? Others give up theirs for it where they must."""
        slot = task.slot
        assert slot.sequence is not None
        while not self._started.scheduler.grow(slot.sequence, start, end - start, slot.tokens, firm):
            if not self._make_room(task, tasks, anyone=alone):
                return False
        return True

    def _begin(self, task: _Task) -> None:
        """A new sequence for the slot; what the prefix cache still has need not be computed."""
        slot = task.slot
        firm = slot.tokens[: len(slot.tokens) - task.work.n_draft]
        slot.sequence, slot.computed = self._started.scheduler.open(slot.index, firm, slot.salt)
        slot.anchor = slot.computed

    def _make_room(self, task: _Task, tasks: list[_Task], *, anyone: bool) -> bool:
        """Take the blocks of the slot that was idle longest; of one in this batch only where nothing else will do."""
        busy = {t.slot.index for t in tasks if not t.done}
        idle = [s for s in self._slots if s.sequence is not None and s.index not in busy]
        if not idle and anyone:
            idle = [t.slot for t in tasks if t is not task and t.slot.sequence is not None]
        if not idle:
            return False
        self._drop_blocks(min(idle, key=lambda s: s.used))
        return True

    def _take(self, task: _Task, start: int, count: int, chosen: Chosen, block: int) -> None:
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
            self._cut(slot, firm + len(chosen.tokens) - 1)

    def _cut(self, slot: _Slot, tokens: int) -> None:
        """The slot holds its first `tokens` tokens, of which not all need be computed."""
        if tokens >= len(slot.tokens):
            return
        del slot.tokens[tokens:]
        slot.computed = min(slot.computed, tokens)
        if slot.sequence is None:
            return
        if tokens < slot.anchor:
            self._drop_blocks(slot)
        else:
            slot.sequence.cut(tokens, self._started.scheduler.hash_block_size)

    # -- slots

    def _tasks(self, batch: Sequence[Slice]) -> list[_Task]:
        """The slices' tasks, their tokens in their slots; those that cannot be run have failed."""
        tasks: list[_Task] = []
        if len({work.slot for work in batch}) != len(batch):
            raise EngineError("two slices of one batch use the same slot")
        slots, clock = self._slots, self._clock
        for work in batch:
            error = self._problem(work)
            if error:
                here = 0 <= work.slot < len(slots)
                task = _Task(work, slots[work.slot] if here else _Slot(-1))
                self._fail(task, error)
                tasks.append(task)
                continue
            slot = slots[work.slot]
            slot.used, slot.sampling = clock, work.sampling
            start = work.start
            if start == 0:
                self._drop_blocks(slot)
                slot.salt = str(work.session)
            if start < len(slot.tokens):
                self._cut(slot, start)
            slot.tokens += work.tokens
            task = _Task(work, slot)
            if work.sampling.constraints is not None:
                self._constrain(task)
            tasks.append(task)
        return tasks

    def _constrain(self, task: _Task) -> None:
        try:
            task.edits = list(self.constraints.edits(task.work) or ())
        except GrammarError as error:
            self._fail(task, str(error), code_of(error))

    def _problem(self, work: Slice) -> str:
        """What is wrong with a slice, in words, or ""."""
        n = work.slot
        if 0 <= n < len(self._slots):
            slot, tokens, sampling = self._slots[n], work.tokens, work.sampling
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
        sizes = {"slots": len(self._slots), "slot_tokens": self._slot_tokens, "n_vocab": self._n_vocab}
        return slice_problem(work, self.held, **sizes)

    def _fail(self, task: _Task, error: str, code: str = ENGINE_ERROR) -> None:
        task.error, task.code, task.done = error, code, True
        self._drop_blocks(task.slot)
        task.slot.tokens = []

    def _drop_blocks(self, slot: _Slot) -> None:
        """The slot holds what it holds, but none of it is computed any more."""
        if slot.sequence is not None:
            self._started.scheduler.close(slot.sequence)
        slot.sequence, slot.computed, slot.anchor = None, 0, 0

    def _clear(self) -> None:
        self._started.scheduler.reset()
        for slot in self._slots:
            slot.tokens, slot.sequence, slot.computed, slot.anchor = [], None, 0, 0

    def _describe(self, name: str, eos: frozenset[int]) -> EngineInfo:
        started = self._started
        return EngineInfo(
            engine="vllm",
            model=name,
            mode="fast",
            n_vocab=started.n_vocab,
            eos=eos,
            slots=len(self._slots),
            slot_tokens=self._slot_tokens,
            kv_tokens=min(started.kv_tokens, len(self._slots) * self._slot_tokens),
            step_tokens=started.step_tokens,
            digest=self._digest(eos),
        )

    def _exact(self) -> EngineInfo:
        """Raises ConfigError where a bit depends on what shares a step."""
        if why := exactness.difference(self):
            raise ConfigError(
                f"--mode exact is refused: with {self._model} on {self._started.device}, {why}. Serve with --mode fast"
            )
        return msgspec.structs.replace(self._info, mode="exact", flip_gap=0.0)

    def _digest(self, eos: frozenset[int]) -> str:
        """A longer context may choose other rotary factors."""
        started = self._started
        return engine_digest(
            "vllm",
            build=started.version,
            weights=folder_digest(fetched(self._model, offline=True)),
            device=started.device,
            dtype=started.dtype,
            kv=started.kv_dtype,
            context=self._slot_tokens,
            eos=sorted(eos),
            **({"quantization": self._quantization} if self._quantization else {}),
            **({"mode": "exact"} if self._is_exact else {}),
            **({"runner": self._runner} if self._runner not in ("", RUNNERS[0]) else {}),
        )
