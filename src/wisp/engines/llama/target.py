"""The verifier's llama.cpp engine.

*Exact* mode: a position's logits depend on the tokens before it and on nothing else. llama.cpp's CPU kernels
round differently for different batch shapes and quantise the difference to noise; what was found to keep every
bit the same is: no weight repacking, flash attention, a KV stream for each slot, and calls of 2 to 7 rows of a
single slot. So here a slice is cut into pieces of 2 to 7 rows, and one row alone gets a dummy row after it that
is rolled back. `selfcheck.check` holds the loaded model to this at start-up.

*Fast* mode: the rows of all slices share calls. Scores closer than `EngineInfo.flip_gap` may then change places
between one batch shape and another.

A step is: check each slice, copy prefixes, evaluate piece by piece, and cut each slot back to what was accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from wisp.core.errors import EngineError, ModelError
from wisp.core.sampling import log_probability, target_token
from wisp.core.work import Slice, SliceResult, TokenLogprob, TopLogprob
from wisp.engines.base import EngineInfo
from wisp.engines.llama import selfcheck
from wisp.engines.llama.context import Context, DecodeError, Logits, Tokens, physical_cores
from wisp.engines.llama.model import Model

Mode = Literal["exact", "fast"]
Tap = Callable[[int, int, Logits], None]

EXACT_ROWS = 7  # K-quant, Q5_0 and Q8_0 matrices switch kernels at 8 rows
FAST_ROWS = 128  # more rows a call are no faster on a CPU, and each takes n_vocab * 4 bytes of output buffer
STEP_TOKENS = {"exact": 32, "fast": 96}
_SPARE = 8  # cells beyond slot_tokens, for the dummy row


def pieces(tokens: int) -> list[int]:
    """`tokens` rows cut into as few pieces as possible, as even as possible: of 2 to 7 rows, unless it is just one."""
    count = -(-tokens // EXACT_ROWS)
    small, larger = divmod(tokens, count)
    return [small + 1] * larger + [small] * (count - larger)


class _Run:
    """One slice on its way through a step."""

    def __init__(self, work: Slice, tap: Tap | None) -> None:
        self.work = work
        self.fed = 0  # rows evaluated
        self.accepted = 0
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.error = ""
        self.done = False
        self._tap = tap
        self.feed: Tokens = np.empty(0, np.int32)

    @property
    def first_sampled(self) -> int:
        """Index of the first row whose logits are needed."""
        work = self.work
        return len(work.tokens) - work.n_draft - 1 if work.sample else len(work.tokens)

    @property
    def kept(self) -> int:
        """Tokens that the slot is to hold once the slice is done."""
        work = self.work
        return work.start + len(work.tokens) - work.n_draft + self.accepted

    def wanted(self, rows: int) -> int:
        """Of the next `rows` rows, how many need logits. They are the last ones."""
        return min(rows, max(0, self.fed + rows - self.first_sampled))

    def take(self, rows: int, logits: Logits) -> None:
        """`rows` more rows were evaluated; `logits` are those of the last `wanted(rows)` of them."""
        self.fed += rows
        for index, row in enumerate(logits, self.fed - len(logits)):
            if self._tap is not None:
                self._tap(self.work.slot, self.work.start + index, row)
            self._choose(index - self.first_sampled, row)
            if self.done:
                return
        self.done = self.fed == len(self.work.tokens)

    def _choose(self, step: int, row: Logits) -> None:
        """The target's token after `step` accepted draft tokens; done unless the draft says the same."""
        work = self.work
        token = target_token(row, work.sampling, work.position + step)
        self.tokens.append(token)
        if work.logprobs is not None:
            chosen, top = log_probability(row, token, work.logprobs)
            self.logprobs.append(TokenLogprob(token, chosen, [TopLogprob(*pair) for pair in top]))
        if step < work.n_draft and token == work.tokens[self.first_sampled + 1 + step]:
            self.accepted += 1
        else:
            self.done = True

    def fail(self, error: str) -> None:
        self.error, self.done = error, True

    def result(self) -> SliceResult:
        if self.error:
            return SliceResult(self.work.session, error=self.error)
        return SliceResult(self.work.session, self.accepted, self.tokens, self.logprobs)


class LlamaTarget:
    """TargetEngine over a GGUF file.

    name:        the model's name in EngineInfo (default: the file's)
    mode:        "exact", which falls back to "fast" with a note if this model or build does not pass the check at
                 start-up, or "fast"
    slots:       sequences held at once
    slot_tokens: context length of each, at most (default 2048, or the model's training context if shorter)
    threads:     default: one per physical core
    check:       verify exactness (or measure `flip_gap`) at start-up: a few dozen positions, seconds at most

    Within a batch all `copy_from` copies happen before any slice is evaluated, each reading its source as it was
    when the step began. A slice that cannot be run (out of room, out of vocabulary, ...) fails alone.

    Raises ModelError if the model cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        mode: Mode = "exact",
        slots: int = 8,
        slot_tokens: int = 2048,
        threads: int | None = None,
        check: bool = True,
    ) -> None:
        if slots < 1 or slot_tokens < 32:
            raise EngineError(f"{slots} slots of {slot_tokens} tokens: an engine needs at least one, of at least 32")
        self._path = Path(path)
        self._name = name or self._path.stem
        self._slots, self._slot_tokens = slots, slot_tokens
        self._threads = threads or physical_cores()
        self._notes: list[str] = []
        self._flip_gap = 0.0
        self._tap: Tap | None = None  # sees (slot, place, logits) of each sampled row
        self._open(mode)
        if check and self._mode == "exact":
            problem = selfcheck.check(self)
            if problem:
                self._fall_back(problem)
        if check and self._mode == "fast":
            self._flip_gap = selfcheck.measure_flip_gap(self._context)
        self.clear()
        self._info = self._describe()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def model(self) -> Model:
        """The open model, e.g. for a LlamaTokenizer that shares it."""
        return self._model

    @property
    def context(self) -> Context:
        """The context below, for checks and measurements; its slots are the engine's own."""
        return self._context

    @property
    def slots(self) -> int:
        return self._slots

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """One step (see TargetEngine.run)."""
        slots = [work.slot for work in batch]
        if len(set(slots)) != len(slots):
            raise EngineError("two slices of one batch use the same slot")
        runs = [self._admit(work) for work in batch]
        self._copy_prefixes(runs)
        for run in runs:
            self._cut(run.work.slot, 0 if run.error else run.work.start)
        for call in self._calls([run for run in runs if not run.done]):
            self._evaluate(call)
        for run in runs:
            self._cut(run.work.slot, 0 if run.error else run.kept)
        return [run.result() for run in runs]

    def observe(self, batch: Sequence[Slice]) -> tuple[list[SliceResult], dict[tuple[int, int], Logits]]:
        """`run`, and a copy of the logits of each sampled row, by (slot, place)."""
        seen: dict[tuple[int, int], Logits] = {}
        self._tap = lambda slot, place, row: seen.__setitem__((slot, place), row.copy())
        try:
            return self.run(batch), seen
        finally:
            self._tap = None

    def held(self, slot: int) -> int:
        """Tokens that `slot` holds."""
        return self._held[slot]

    def clear(self) -> None:
        """Empties every slot."""
        self._context.clear()
        self._held = [0] * self._slots

    def close(self) -> None:
        self._model.close()

    # -- opening

    def _open(self, mode: Mode) -> None:
        exact = mode == "exact"
        self._mode: Mode = mode
        self._model = Model(self._path, repack=not exact, gpu=not exact)
        self._slot_tokens = min(self._slot_tokens, self._model.n_ctx_train)
        try:
            self._context = Context(
                self._model,
                slots=self._slots,
                slot_tokens=self._slot_tokens + _SPARE,
                rows=EXACT_ROWS + 1 if exact else FAST_ROWS,
                threads=self._threads,
                flash=exact,
                offload=not exact,
            )
        except ModelError:
            self._model.close()
            raise
        self._held = [0] * self._slots

    def _fall_back(self, problem: str) -> None:
        self._notes.append(f"exact mode is off: {problem}; running in fast mode, where near-ties may flip")
        self._model.close()
        self._open("fast")

    def _describe(self) -> EngineInfo:
        return EngineInfo(
            engine="llama.cpp",
            model=self._name,
            mode=self._mode,
            n_vocab=self._model.n_vocab,
            eos=self._model.eos,
            slots=self._slots,
            slot_tokens=self._slot_tokens,
            kv_tokens=self._slots * self._slot_tokens,
            step_tokens=STEP_TOKENS[self._mode],
            flip_gap=self._flip_gap,
            notes=tuple(self._notes),
        )

    # -- a step

    def _admit(self, work: Slice) -> _Run:
        run = _Run(work, self._tap)
        error = self._problem(work)
        if error:
            run.fail(error)
        else:
            run.feed = np.array(work.tokens, np.int32)
        return run

    def _problem(self, work: Slice) -> str:
        """What is wrong with a slice, in words, or ""."""
        if not 0 <= work.slot < self._slots:
            return f"slot {work.slot} is not one of 0..{self._slots - 1}"
        if not -1 <= work.copy_from < self._slots:
            return f"slot {work.copy_from}, to copy from, is not one of 0..{self._slots - 1}"
        if not work.tokens:
            return "a slice feeds at least one token"
        if not 0 <= work.n_draft < len(work.tokens) or (work.n_draft and not work.sample):
            return f"{work.n_draft} draft tokens do not fit a slice of {len(work.tokens)} tokens"
        source = work.slot if work.copy_from < 0 else work.copy_from
        if not 0 <= work.start <= self._held[source]:
            return f"slot {source} holds {self._held[source]} tokens, not the {work.start} to start from"
        if work.start + len(work.tokens) > self._slot_tokens:
            return f"{work.start} + {len(work.tokens)} tokens exceed the slot's {self._slot_tokens}"
        if min(work.tokens) < 0 or max(work.tokens) >= self._context.n_vocab:
            return f"a token id is outside the vocabulary of {self._context.n_vocab}"
        wrong = work.sampling.problem()
        return f"{wrong[0]} {wrong[1]}" if wrong else ""

    def _copy_prefixes(self, runs: list[_Run]) -> None:
        """Copies prefixes between slots, so ordered that a slot is read before it is overwritten."""
        waiting = {
            run.work.slot: run.work
            for run in runs
            if not run.error and run.work.copy_from not in (-1, run.work.slot)
        }
        while waiting:
            sources = {work.copy_from for work in waiting.values()}
            ready = [slot for slot in waiting if slot not in sources]
            if not ready:
                raise EngineError(f"slots {sorted(waiting)} are to be copied into one another in a circle")
            for slot in ready:
                work = waiting.pop(slot)
                self._context.copy(work.copy_from, slot, work.start)
                self._held[slot] = work.start

    def _calls(self, runs: list[_Run]) -> Iterator[list[tuple[_Run, int]]]:
        """The step as llama_decode calls: (run, rows) each. What a call decides shapes the calls after it."""
        if self._mode == "exact":
            for run in runs:
                for piece in pieces(len(run.feed)):
                    if run.done:
                        break
                    yield [(run, piece)]
            return
        while True:
            call: list[tuple[_Run, int]] = []
            room = FAST_ROWS
            for run in runs:
                rows = 0 if run.done else min(room, len(run.feed) - run.fed)
                if rows:
                    call.append((run, rows))
                    room -= rows
            if not call:
                return
            yield call

    def _evaluate(self, call: list[tuple[_Run, int]]) -> None:
        """One llama_decode; its logits go to the runs they belong to."""
        wanted: list[tuple[int, int]] = []  # (outputs asked for, outputs needed) of each run
        for run, rows in call:
            place, feed = run.work.start + run.fed, run.feed[run.fed : run.fed + rows]
            needed = run.wanted(rows)
            asked = needed
            if self._mode == "exact":
                if rows == 1:
                    feed = np.append(feed, feed)  # the dummy row
                # One output row makes the last layer and the output matrix one-row operations.
                asked = needed and max(needed, 2)
            self._context.add(run.work.slot, place, feed, asked)
            self._held[run.work.slot] = place + len(feed)
            wanted.append((asked, needed))
        try:
            logits = self._context.decode()
        except DecodeError as error:
            self._fail(call, error)
            return
        first = 0
        for (run, rows), (asked, needed) in zip(call, wanted, strict=True):
            # With a dummy row the needed row is the first of two, otherwise the needed ones are the last.
            skip = 0 if rows == 1 else asked - needed
            run.take(rows, logits[first + skip : first + skip + needed])
            first += asked

    def _fail(self, call: list[tuple[_Run, int]], error: DecodeError) -> None:
        """The slices of a failed call fail and their slots are dropped; a fatal error fails the step."""
        if error.code < -1:
            self.clear()
            raise error
        for run, _ in call:
            run.fail(str(error))

    def _cut(self, slot: int, tokens: int) -> None:
        """Rolls `slot` back to `tokens` tokens (a slot out of range is a failed slice's: nothing to do)."""
        if 0 <= slot < self._slots and self._held[slot] > tokens:
            self._context.drop(slot, tokens)
            self._held[slot] = tokens
