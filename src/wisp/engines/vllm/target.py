"""TargetEngine over vLLM: a step of the verifier is one step of vLLM's engine, with exactly its slices.

    slots.py     what slots hold, and which of it has KV
    stepping.py  slices become steps of vLLM, mostly one
    queue.py     a step is launched while the one before it runs

vLLM wants all of its calls from the thread that loaded it, so it has a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from wisp.core.errors import ConfigError, EngineDeadError, EngineError
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.engines import exactness
from wisp.engines.base import EngineInfo, StepQueue
from wisp.engines.constraining import SlotTrackers
from wisp.engines.identity import engine_digest, folder_digest
from wisp.engines.in_order import OneAtATime
from wisp.engines.vllm import selftest
from wisp.engines.vllm.models import fetched
from wisp.engines.vllm.parts import Chosen
from wisp.engines.vllm.queue import DEAD, VllmQueue, failure
from wisp.engines.vllm.slots import Slots
from wisp.engines.vllm.starting import RUNNERS, Started, Wanted
from wisp.engines.vllm.stepping import Steps, Task

T = TypeVar("T")


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
        self._model, self._quantization, self._runner = wanted.model, wanted.quantization, wanted.runner
        self._is_exact = wanted.exact
        self.constraints = SlotTrackers()
        try:
            self._started = self._call(lambda: Started(wanted))
        except BaseException:
            self._thread.shutdown()
            raise
        try:
            self._slots = Slots(wanted.slots, self._started.scheduler)
            self._steps = Steps(
                self._started, self._slots, wanted.slot_tokens, self.constraints, self._launch
            )
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
        tasks = self._run(batch, observed=True)
        return [(t.result(), t.chosen.logits if t.chosen else None) for t in tasks]

    def queue(self, depth: int) -> StepQueue:
        """Of a depth above 1: a step is launched while the one before it runs. No other calls meanwhile."""
        if depth == 1:
            return OneAtATime(self)
        own = None if self._started.device == "cpu" else self
        return VllmQueue(self._steps, self._slots, depth, lambda: self._started.dead, own)

    def copy(self, copy: Copy) -> None:
        """`target` holds what `source` holds, up to `copy.tokens`; its blocks are looked up when it is next fed."""
        self._call(lambda: self._slots.copy(copy))

    def held(self, slot: int) -> int:
        """Tokens that `slot` holds."""
        return self._slots.held(slot)

    def clear(self) -> None:
        """Empties every slot and the prefix cache."""
        self._call(self._slots.clear)

    def close(self) -> None:
        """Ends vLLM's workers and frees the model. Closing twice does nothing."""
        if not self._closed:
            self._call(self._started.close)
            self._closed = True
            self._thread.shutdown()

    # -- a step

    def _run(self, batch: Sequence[Slice], *, observed: bool = False) -> list[Task]:
        self._require_life()
        return self._call(lambda: self._tasks(batch, observed=observed))

    def _call(self, function: Callable[[], T]) -> T:
        if self._closed:
            raise EngineError("the engine is closed")
        if threading.current_thread() is self._own:
            return function()
        return self._thread.submit(function).result()

    def _launch(self, told: Any) -> Callable[[], list[Chosen]]:
        """See Started.launch. From another thread it waits for nothing."""
        if threading.current_thread() is self._own:
            return self._started.launch(told)
        launched = self._thread.submit(self._started.launch, told)

        def answers() -> list[Chosen]:
            return launched.result()()

        return answers

    def _tasks(self, batch: Sequence[Slice], *, observed: bool) -> list[Task]:
        try:
            return self._steps.run(batch, observed=observed)
        except EngineError:
            raise
        except Exception as error:
            self._require_life()
            self._slots.clear()
            raise failure(error) from error

    def _require_life(self) -> None:
        if self._started.dead:
            raise EngineDeadError(DEAD)

    def _describe(self, name: str, eos: frozenset[int]) -> EngineInfo:
        started = self._started
        return EngineInfo(
            engine="vllm",
            model=name,
            mode="fast",
            n_vocab=started.n_vocab,
            eos=eos,
            slots=len(self._slots.all),
            slot_tokens=self._slot_tokens,
            kv_tokens=min(started.kv_tokens, len(self._slots.all) * self._slot_tokens),
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
