"""The verifier's llama.cpp engine.

*Exact* mode: a position's logits depend on the tokens before it and on nothing else. llama.cpp's CPU kernels
round differently for different batch shapes and quantise the difference to noise; what was found to keep every
bit the same is: no weight repacking, flash attention, a KV stream for each slot, and calls of 2 to 7 rows of a
single slot. So here a slice is cut into pieces of 2 to 7 rows, and one row alone gets a dummy row after it that
is rolled back. `selfcheck.check` holds the loaded model to this at start-up.

*Fast* mode: the rows of all slices share calls. Scores closer than `EngineInfo.flip_gap` may then change places
between one batch shape and another.

A step is: check each slice, evaluate piece by piece, and cut each slot back to what was accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from wisp.core.errors import EngineError, GrammarError, ModelError
from wisp.core.protocol.step import (
    ENGINE_ERROR,
    NO_TOKEN,
    NOT_FINITE,
    Copy,
    Slice,
    SliceResult,
)
from wisp.engines.base import EngineInfo, StepQueue
from wisp.engines.constraining import SlotTrackers, code_of
from wisp.engines.identity import engine_digest, gguf_digest
from wisp.engines.in_order import OneAtATime
from wisp.engines.llama import selfcheck
from wisp.engines.llama.capi import PIN, kernels
from wisp.engines.llama.context import Context, DecodeError, Logits, physical_cores
from wisp.engines.llama.devices import USUAL, LlamaOptions, accelerators
from wisp.engines.llama.model import Model
from wisp.engines.llama.verification import Run, Tap
from wisp.engines.slots import check_copy, slice_problem

Mode = Literal["exact", "fast"]

EXACT_ROWS = 7  # K-quant, Q5_0 and Q8_0 matrices switch kernels at 8 rows
FAST_ROWS = 128  # more rows a call are no faster on a CPU, and each takes n_vocab * 4 bytes of output buffer
# With an accelerator: llama.cpp's own choice, since its reads of the weights are shared by all
DEVICE_ROWS = 512
STEP_TOKENS = {"exact": 32, "fast": 96}
UNMEASURED_FLIP_GAP = 1.0  # without the check at start-up; 0.4 to 1.0 was measured on quantised models
SLOT_TOKENS = 2048  # where nothing else is asked for
_NARROW = 32  # rows a call where NaN may be about: from 64 rows on, attention multiplies what it masks by 0
_SPARE = 8  # cells beyond slot_tokens, for the dummy row


def pieces(tokens: int) -> list[int]:
    """`tokens` rows cut into as few pieces as possible, as even as possible: of 2 to 7 rows, unless it is just one."""
    count = -(-tokens // EXACT_ROWS)
    small, larger = divmod(tokens, count)
    return [small + 1] * larger + [small] * (count - larger)


class LlamaTarget:
    """TargetEngine over a GGUF file.

    name:        the model's name in EngineInfo (default: the file's)
    mode:        "exact", which falls back to "fast" with a note if this model or build does not pass the check at
                 start-up, or "fast"
    slots:       sequences held at once
    slot_tokens: context length of each (default 2048); the model's training context where that is shorter, with a note
                 if more was asked for
    threads:     default: one per physical core
    check:       verify weights, and exactness (or measure `flip_gap`), at start-up: a few dozen positions, seconds
    options:     devices, types and sizes of calls

    A slice that cannot be run (out of room, out of vocabulary, logits that are not finite, ...) fails alone.

    Raises ModelError if the model cannot be loaded, or has weights that are not finite, and ConfigError for options
    that this build or mode cannot have.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        mode: Mode = "exact",
        slots: int = 8,
        slot_tokens: int | None = None,
        threads: int | None = None,
        check: bool = True,
        options: LlamaOptions = USUAL,
    ) -> None:
        options.check(exact=mode == "exact")
        wanted = SLOT_TOKENS if slot_tokens is None else slot_tokens
        if slots < 1 or wanted < 32:
            raise EngineError(
                f"{slots} slots of {wanted} tokens: an engine needs at least one, of at least 32"
            )
        self._options = options
        self._devices = [str(device) for device in accelerators() if device.holds_layers]
        self._path = Path(path)
        self._name = name or self._path.stem
        self._slots, self._slot_tokens = slots, wanted
        self._threads = threads or physical_cores()
        self._notes: list[str] = []
        self._fewest_outputs = 2
        self._flip_gap = 0.0 if mode == "exact" else UNMEASURED_FLIP_GAP
        self.constraints = SlotTrackers()
        self._tap: Tap | None = None  # sees (slot, place, logits) of each sampled row
        self._check, self._tainted = check, False
        self._open(mode)
        if slot_tokens is not None and slot_tokens > self._slot_tokens:
            self._notes.append(
                f"a context of {slot_tokens} tokens was asked for, but {self._name} was trained on "
                f"{self._slot_tokens}: sessions have {self._slot_tokens}"
            )
        try:
            if check and self._mode == "exact":
                self._check_exact()
            if check and self._mode == "fast":
                self._flip_gap = selfcheck.measure_flip_gap(self._context)
            if self._mode == "exact" and self._devices:
                self._notes.append(
                    f"exact mode computes on the CPU, without {', '.join(self._devices)}; --mode fast uses it"
                )
            self.clear()
            self._info = self._describe()
        except ModelError as error:
            self._model.close()
            raise ModelError(f"{self._path}: {error}") from None

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
        if self._tainted and not any(self._held):
            self.clear()
        runs = [self._admit(work) for work in batch]
        for run in runs:
            self._cut(run.work.slot, 0 if run.error else run.work.start)
        for call in self._calls([run for run in runs if not run.done]):
            self._evaluate(call)
        for run in runs:
            self._cut(run.work.slot, 0 if run.error else run.kept)
        return [run.result() for run in runs]

    def queue(self, depth: int) -> StepQueue:
        """Steps run one at a time."""
        return OneAtATime(self, depth)

    def copy(self, copy: Copy) -> None:
        """Copy a prefix between slots (see TargetEngine.copy). Raises EngineError if the source does not hold it."""
        check_copy(copy, self.held, slots=self._slots)
        self._context.copy(copy.source, copy.target, copy.tokens)
        self._held[copy.target] = copy.tokens

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
        self._context.clear(wipe=self._tainted)
        self._tainted = False
        self._held = [0] * self._slots

    def close(self) -> None:
        self._model.close()

    # -- opening

    def _open(self, mode: Mode) -> None:
        exact = mode == "exact"
        self._mode: Mode = mode
        options = self._options
        self._layers = 0 if exact else -1 if options.gpu_layers is None else options.gpu_layers
        self._rows = EXACT_ROWS + 1 if exact else options.batch_rows or FAST_ROWS
        self._step_tokens = STEP_TOKENS[mode] if options.batch_rows is None or exact else options.batch_rows
        if self._layers and options.batch_rows is None and self._devices:
            self._rows = self._step_tokens = DEVICE_ROWS
        self._model = Model(
            self._path,
            repack=not exact,
            layers=self._layers,
            split=() if exact else options.tensor_split,
            check=self._check,
        )
        self._slot_tokens = min(self._slot_tokens, self._model.n_ctx_train)
        try:
            self._context = Context(
                self._model,
                slots=self._slots,
                slot_tokens=self._slot_tokens + _SPARE,
                rows=self._rows,
                threads=self._threads,
                unified=not exact,  # slices of unequal length: 29 rows took 255 ms, in streams 451
                flash="on" if exact else options.flash_attention,
                offload=self._layers != 0,
                kv_type=options.kv_number,
            )
        except ModelError:
            self._model.close()
            raise
        self._held = [0] * self._slots

    def _check_exact(self) -> None:
        """A single output row makes the last layer and the output matrix one-row operations. For quantised models
        these give the same bits and save 10-15 % of a decode step; so try that first, then two rows at least."""
        for self._fewest_outputs in (1, 2):
            problem = selfcheck.check(self)
            if not problem:
                return
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
            step_tokens=self._step_tokens,
            digest=self._digest(),
            flip_gap=self._flip_gap,
            notes=tuple(self._notes),
        )

    def _digest(self) -> str:
        """A longer context may choose other rotary factors. Bits are the same between kernels of the same kind alone;
        fast mode, whose bits differ from batch to batch anyway, may go on with others."""
        return engine_digest(
            "llama.cpp",
            build=PIN,
            weights=gguf_digest(self._path),
            mode=self._mode,
            kv=list(self._context.kv_types),
            context=self._slot_tokens,
            kernels=kernels() if self._mode == "exact" else "",
        )

    # -- a step

    def _admit(self, work: Slice) -> Run:
        error, code, edits = self._problem(work), ENGINE_ERROR, None
        if not error:
            try:
                edits = self.constraints.edits(work)
            except GrammarError as why:
                error, code = str(why), code_of(why)
        run = Run(work, self._tap, edits)
        if error:
            run.fail(error, code)
        else:
            run.feed = np.array(work.tokens, np.int32)
        return run

    def _problem(self, work: Slice) -> str:
        """What is wrong with a slice, in words, or ""."""
        sizes = {"slots": self._slots, "slot_tokens": self._slot_tokens, "n_vocab": self._context.n_vocab}
        return slice_problem(work, self.held, **sizes)

    def _calls(self, runs: list[Run]) -> Iterator[list[tuple[Run, int]]]:
        """The step as llama_decode calls: (run, rows) each. What a call decides shapes the calls after it."""
        if self._mode == "exact":
            for run in runs:
                for piece in pieces(len(run.feed)):
                    if run.done:
                        break
                    yield [(run, piece)]
            return
        while True:
            if self._tainted:
                left = next((run for run in runs if not run.done), None)
                if left is None:
                    return
                yield [(left, min(_NARROW, len(left.feed) - left.fed))]
                continue
            call: list[tuple[Run, int]] = []
            room = self._rows
            for run in runs:
                rows = 0 if run.done else min(room, len(run.feed) - run.fed)
                if rows:
                    call.append((run, rows))
                    room -= rows
            if not call:
                return
            yield call

    def _evaluate(self, call: list[tuple[Run, int]]) -> None:
        """One llama_decode; its logits go to the runs they belong to."""
        asked: list[int] = []
        exact = self._mode == "exact"
        for run, rows in call:
            slot, place = run.work.slot, run.work.start + run.fed
            feed, needed = run.feed[run.fed : run.fed + rows], run.wanted(rows)
            # Outputs beyond the needed ones are of earlier rows, or of the dummy. In fast mode the last row of each
            # slice tells whether all before it are finite.
            outputs = (max(needed, self._fewest_outputs) if needed else 0) if exact else max(needed, 1)
            self._context.add(slot, place, feed, min(outputs, rows))
            if rows == 1 and exact:
                self._context.add(slot, place + 1, feed, outputs - min(outputs, rows))
                rows += 1
            self._held[slot] = place + rows
            asked.append(outputs)
        try:
            logits = self._context.decode()
        except DecodeError as error:
            self._fail(call, error)
            return
        if not (exact or self._tainted or np.isfinite(logits).all()):
            self._part(call)
            return
        first = 0
        for (run, rows), outputs in zip(call, asked, strict=True):
            needed = run.wanted(rows)
            if self._tainted and not needed and not np.isfinite(logits).all():
                run.fail(NO_TOKEN, NOT_FINITE)
            # The dummy's output comes last, earlier rows' first
            skip = 0 if exact and rows == 1 else outputs - needed
            run.take(rows, logits[first + skip : first + skip + needed])
            first += outputs

    def _part(self, call: list[tuple[Run, int]]) -> None:
        """A call of slices that share their cells gave what is not finite. Whose it is shows when each is evaluated
        by itself, in narrow calls; and so it stays until every slot is empty and the cells can be wiped."""
        self._tainted = True
        for run, _ in call:
            self._cut(run.work.slot, run.work.start + run.fed)

    def _fail(self, call: list[tuple[Run, int]], error: DecodeError) -> None:
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
