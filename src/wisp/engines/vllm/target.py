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
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from wisp.core.errors import EngineDeadError, EngineError, GrammarError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.step import (
    ENGINE_ERROR,
    INVALID_GRAMMAR,
    NO_TOKEN,
    NOT_FINITE,
    Copy,
    Slice,
    SliceResult,
)
from wisp.engines.base import EngineInfo, StepQueue
from wisp.engines.constraining import SlotTrackers
from wisp.engines.identity import engine_digest, folder_digest
from wisp.engines.in_order import OneAtATime
from wisp.engines.slots import check_copy, slice_problem
from wisp.engines.vllm import selftest
from wisp.engines.vllm.models import fetched
from wisp.engines.vllm.parts import Chosen, Part
from wisp.engines.vllm.starting import Started, Wanted

T = TypeVar("T")


@dataclass
class _Slot:
    """`tokens` are held; the first `computed` of them have KV, in the blocks of `sequence` (None: no blocks).

    anchor: it can be cut back to here or further on; before that, blocks are shared or dropped
    salt:   sequences of one salt may share blocks
    used:   when it last took part, in slices
    """

    tokens: list[int] = field(default_factory=list)
    sequence: str | None = None
    computed: int = 0
    anchor: int = 0
    salt: str = ""
    used: int = 0


@dataclass
class _Task:
    """A slice on its way through a step. `chain`: the slot's own tokens, with the slice's behind them meanwhile."""

    work: Slice
    slot: _Slot
    chain: list[int]
    edits: Sequence[Edit] = ()
    chosen: Chosen | None = None
    done: bool = False
    error: str = ""
    code: str = ""

    @property
    def accepted(self) -> int:
        return max(0, len(self.chosen.tokens) - 1) if self.chosen else 0

    def result(self) -> SliceResult:
        if self.error:
            return SliceResult(self.work.session, error=self.error, code=self.code)
        if self.chosen is None or not self.work.sample:
            return SliceResult(self.work.session)
        return SliceResult(self.work.session, self.accepted, self.chosen.tokens, self.chosen.logprobs)


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
        self._opened = 0
        self._observing = False
        self._model = wanted.model
        self.constraints = SlotTrackers()
        self._slots = [_Slot() for _ in range(wanted.slots)]
        try:
            self._started = self._call(lambda: Started(wanted))
        except BaseException:
            self._thread.shutdown()
            raise
        try:
            self._info = self._describe(name, frozenset(eos))
            self._info = msgspec.structs.replace(self._info, flip_gap=selftest.check(self))
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
        slots = [work.slot for work in batch]
        if len(set(slots)) != len(slots):
            raise EngineError("two slices of one batch use the same slot")
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
        tasks = [self._task(work) for work in batch]
        try:
            while any(not task.done for task in tasks):
                self._step(tasks)
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
        """One step of vLLM with as much of the unfinished tasks as fits."""
        budget = self._started.step_tokens
        going: list[tuple[_Task, Part]] = []
        for task in tasks:
            if task.done or budget <= 0:
                continue
            part = self._place(task, budget, tasks, anyone=not going)
            if part is not None:
                going.append((task, part))
                budget -= len(part.tokens)
        if not going:
            return  # the first of the unfinished has failed
        self._started.step()
        for task, part in going:
            sequence = task.slot.sequence
            assert sequence is not None
            self._take(task, part, self._started.scheduler.chosen[sequence])

    def _place(self, task: _Task, budget: int, tasks: list[_Task], *, anyone: bool) -> Part | None:
        """The task's next part, with blocks for it; None if it has to wait for another step of vLLM."""
        slot = task.slot
        begun = slot.sequence is None
        if begun:
            self._begin(task)
        part = self._part(task, budget)
        if part is not None and self._added(task, part, tasks, anyone=anyone):
            return part
        if begun:  # what the prefix cache was found to have is taken now or may be gone later
            self._drop_blocks(slot)
        if anyone:
            self._fail(task, "the KV cache is too small for this context")
        return None

    def _added(self, task: _Task, part: Part, tasks: list[_Task], *, anyone: bool) -> bool:
        """Is the part in the next step of vLLM? Others give up their blocks for it where they must."""
        sequence, scheduler = task.slot.sequence, self._started.scheduler
        assert sequence is not None
        scheduler.firm(sequence, task.chain[scheduler.length(sequence) : part.firm])
        while not scheduler.add(sequence, part):
            if not self._make_room(task, tasks, anyone=anyone):
                return False
        return True

    def _part(self, task: _Task, budget: int) -> Part | None:
        """What to feed next: up to the end, or a chunk that leaves all sampled rows for a later one."""
        work, start, end = task.work, task.slot.computed, len(task.chain)
        rows = work.n_draft + 1 if work.sample else 0
        if end - start <= budget:
            draft = work.tokens[len(work.tokens) - work.n_draft :]
            tokens = task.chain[start:]
            return Part(
                start,
                tokens,
                draft,
                work.sample,
                work.position,
                work.sampling,
                work.logprobs,
                self._observing,
                task.edits,
            )
        count = min(budget, end - rows - start)
        if count <= 0:
            return None
        return Part(start, task.chain[start : start + count], [], False, 0, work.sampling)

    def _begin(self, task: _Task) -> None:
        """A new sequence for the slot; what the prefix cache still has need not be computed."""
        slot, work = task.slot, task.work
        self._opened += 1
        slot.sequence = f"{work.slot}.{self._opened}"
        firm = task.chain[: len(task.chain) - work.n_draft]
        slot.computed = self._started.scheduler.open(slot.sequence, firm, slot.salt)
        slot.anchor = slot.computed

    def _make_room(self, task: _Task, tasks: list[_Task], *, anyone: bool) -> bool:
        """Take the blocks of the slot that was idle longest; of one in this batch only where nothing else will do."""
        busy = {id(t.slot) for t in tasks if not t.done}
        idle = [s for s in self._slots if s.sequence is not None and id(s) not in busy]
        if not idle and anyone:
            idle = [t.slot for t in tasks if t is not task and t.slot.sequence is not None]
        if not idle:
            return False
        self._drop_blocks(min(idle, key=lambda s: s.used))
        return True

    def _take(self, task: _Task, part: Part, chosen: Chosen) -> None:
        """A part was computed."""
        slot = task.slot
        slot.computed = part.start + len(part.tokens)
        block = self._started.scheduler.hash_block_size  # the finest at which blocks are shared
        slot.anchor = max(part.start, part.firm // block * block)
        if slot.computed < len(task.chain):
            return
        if not chosen.finite:
            self._fail(task, NO_TOKEN, NOT_FINITE)
            return
        task.chosen, task.done = chosen, True
        self._cut(slot, len(task.chain) - task.work.n_draft + task.accepted)

    def _cut(self, slot: _Slot, tokens: int) -> None:
        """The slot holds its first `tokens` tokens, of which not all need be computed."""
        del slot.tokens[tokens:]
        slot.computed = min(slot.computed, tokens)
        if slot.sequence is None:
            return
        if tokens < slot.anchor:
            self._drop_blocks(slot)
        else:
            self._started.scheduler.cut(slot.sequence, tokens)

    # -- slots

    def _task(self, work: Slice) -> _Task:
        error = self._problem(work)
        if error:
            slot = self._slots[work.slot] if 0 <= work.slot < len(self._slots) else _Slot()
            task = _Task(work, slot, [])
            self._fail(task, error)
            return task
        slot = self._slots[work.slot]
        slot.used = self._clock
        if work.start == 0:
            self._drop_blocks(slot)
            slot.salt = str(work.session)
        self._cut(slot, work.start)
        slot.tokens += work.tokens
        task = _Task(work, slot, slot.tokens)
        try:
            task.edits = list(self.constraints.edits(work) or ())
        except GrammarError as error:
            self._fail(task, str(error), INVALID_GRAMMAR)
        return task

    def _problem(self, work: Slice) -> str:
        """What is wrong with a slice, in words, or ""."""
        if work.n_draft >= self._started.step_tokens:
            return f"{work.n_draft} draft tokens do not fit a step of {self._started.step_tokens}"
        sizes = {"slots": len(self._slots), "slot_tokens": self._slot_tokens, "n_vocab": self._info.n_vocab}
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
        )
