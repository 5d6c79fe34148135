"""A device that does nothing until somebody waits for it, out of vLLM's CPU build.

A GPU runs behind the host: what it is told waits in its queue while the host goes on. On a CPU all is done at once,
and a step that reads what the host has overwritten meanwhile would not be noticed. Here all that touches tensors during
a launch is put into a queue, in order, and done when an event is waited for, and not before:

- copies from host memory that is used again (V1's) read what is there then
- no answer of a step exists before it is waited for
- host memory that may be used again is poisoned: V1's once it has waited for its copies, a batch's once it was launched

What a launch does to tensors is also done at once: vLLM's attention on a CPU plans by the values of its inputs. But
the model, the choice, KV and the tokens that are kept are left to the queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from wisp.engines.vllm import choosing, runner_v1, runner_v2, worker
from wisp.engines.vllm.choosing import Choice

GARBAGE = 509  # an id of the tiny model; no place, length or block of it
OF_THE_HOST = ("numpy", "__get__")
PLAN = "get_scheduler_metadata"  # of attention on a CPU, made anew by what the device has
HOST_MEMORY = ("input_ids", "query_start_loc")  # of V1, besides its tables


class LateDevice(TorchFunctionMode):  # type: ignore[misc]
    """The queue.

    late:      launches so far that began before the one before them was done
    fail_next: whoever waits for the next choice hears of this
    spoils:    does the model compute nonsense in this slot?
    """

    def __init__(self, hooks: Any) -> None:
        super().__init__()
        self.hooks = hooks
        self.queue: deque[Callable[[], Any]] = deque()
        self.done = 0  # of all that was ever queued
        self._unseen = False
        self._before: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # what a launch has written to, and what was there
        self.late = 0
        self.fail_next = ""
        self.spoils: Callable[[int], bool] = lambda slot: False
        left = [hooks.last, *_kv(hooks.runner)]
        self._left = {tensor.untyped_storage().data_ptr() for tensor in left}

    def run(self, until: int) -> None:
        """All up to that place of the queue."""
        with self.unseen(), torch.inference_mode():
            while self.done < until:
                self.done += 1
                self.queue.popleft()()

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is done meanwhile is not put into the queue."""
        self._unseen = True
        try:
            yield
        finally:
            self._unseen = False

    @property
    def told(self) -> int:
        return self.done + len(self.queue)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._unseen or function.__name__ in OF_THE_HOST:
            return function(*args, **kwargs)
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        writes = (
            function.__name__ == "__setitem__" or function.__name__.rstrip("_") + "_" == function.__name__
        )
        if target is not None and writes and target.untyped_storage().data_ptr() in self._left:
            self.queue.append(lambda: function(*args, **kwargs))
            return target
        if target is not None and writes:
            self._before.append((target, target.clone()))
        found = function(*args, **kwargs)
        if function.__name__ == PLAN:
            self.queue.append(lambda: found.set_(function(*args, **kwargs)))
            return found
        self.queue.append(lambda: _again(function(*args, **kwargs), found))
        return found

    def __exit__(self, *error: Any) -> None:
        """A launch is over: tensors are again as the device has them."""
        super().__exit__(*error)
        with torch.inference_mode():
            while self._before:
                target, before = self._before.pop()
                target.copy_(before)

    # -- what is left to the queue

    def leave(self, shape: tuple[int, ...], function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor of that shape, as `function` finds it."""
        found = torch.full(shape, torch.nan)
        self.queue.append(lambda: found.copy_(function()))
        return found

    def choose(self, logits: torch.Tensor, parts: Any, *, here: bool) -> Choice:
        tokens = torch.full((len(logits),), GARBAGE)
        box: list[Any] = []
        fails, self.fail_next = self.fail_next, ""
        ends = np.cumsum([part.rows for part in parts]).tolist()
        spoiled = [
            slice(end - part.rows, end)
            for slot, part, end in zip(self.hooks.batch.slots.tolist(), parts, ends, strict=True)
            if part.rows and self.spoils(slot)
        ]

        def choose() -> None:
            for rows in spoiled:
                logits[rows] = torch.nan
            choice = choosing.choose(logits, parts, here=here)
            tokens[: len(choice.tokens)] = choice.tokens
            box.extend(choice.chosen())

        def chosen() -> list[Any]:
            if fails:
                raise RuntimeError(fails)
            return list(box)

        self.queue.append(choose)
        return Choice(tokens, chosen)


class Event:
    """Behind all that the device was told so far."""

    def __init__(self, device: LateDevice, then: Callable[[], None] = lambda: None) -> None:
        self._device, self._then = device, then
        self._at = 0

    def record(self) -> None:
        self._at = self._device.told

    def synchronize(self) -> None:
        self._device.run(self._at)
        with self._device.unseen():
            self._then()


@contextmanager
def late_device(engine: Any) -> Iterator[LateDevice]:
    """The engine's device while this lasts. All calls have to come from the engine's own thread (`inside`)."""
    started = engine.started
    hooks = started.core.model_executor.driver_worker.worker.wisp_hooks
    runner, model, launch = hooks.runner, hooks.runner.model, started.launch
    device = LateDevice(hooks)
    forward, compute_logits, there = model.forward, model.compute_logits, async_tensor_h2d
    width = started.core.vllm_config.model_config.get_hidden_size()

    def late_forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        context = get_forward_context()
        inputs = kwargs["input_ids"]

        def run() -> Any:
            with override_forward_context(context):
                return forward(*args, **kwargs)

        return device.leave((len(inputs), width), run)

    def late_logits(hidden: torch.Tensor) -> torch.Tensor:
        return device.leave((len(hidden), started.n_vocab), lambda: compute_logits(hidden))

    def private(data: Any, **kwargs: Any) -> torch.Tensor:
        """From host memory of its own, as where memory is pinned."""
        return there(np.array(data) if isinstance(data, np.ndarray) else data, **kwargs)

    def late_launch(told: Any) -> Any:
        device.late += bool(device.queue)
        with device:
            answers = launch(told)
        poison_batch(told.wisp_batch)
        poison_batch(hooks.batch)
        return answers

    def mark() -> Event:
        event = Event(device)
        event.record()
        return event

    changed: list[tuple[Any, str, Any]] = [
        (model, "forward", late_forward),
        (model, "compute_logits", late_logits),
        (started, "launch", late_launch),
        (hooks, "mark", mark),
        (worker, "choose", device.choose),
        *((module, "async_tensor_h2d", private) for module in (worker, runner_v1, runner_v2)),
    ]
    if isinstance(hooks, runner_v1.HooksV1):
        buffers = _host_buffers(runner)
        changed += [(buffer, "gpu", buffer.cpu.clone()) for buffer in buffers]
        fence = Event(device, lambda: poison_v1(runner, buffers))
        changed.append((runner, runner_v1.EVENT, fence))
    with _changed(changed):
        yield device
        device.run(device.told)


def poison_batch(batch: Any) -> None:
    for column in (batch.slots, batch.starts, batch.counts, batch.tokens, batch.wanted, batch.open):
        column[:] = GARBAGE


def poison_v1(runner: Any, buffers: list[Any]) -> None:
    """The memory that V1's copies to the device are made from."""
    for buffer in buffers:
        buffer.cpu.fill_(GARBAGE)
    runner.optimistic_seq_lens_cpu.fill_(GARBAGE)
    runner.input_batch.num_computed_tokens_cpu[:] = GARBAGE


def _host_buffers(runner: Any) -> list[Any]:
    tables = runner.input_batch.block_table.block_tables
    return [
        *(getattr(runner, name) for name in HOST_MEMORY),
        *(buffer for table in tables for buffer in (table.block_table, table.slot_mapping)),
    ]


def _kv(runner: Any) -> list[torch.Tensor]:
    layers = runner.compilation_config.static_forward_context.values()
    return [layer.kv_cache for layer in layers if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)]


def _again(now: Any, before: Any) -> None:
    """What a function found when it was queued is what it finds now."""
    if isinstance(before, torch.Tensor) and now.data_ptr() != before.data_ptr():
        before.copy_(now)


@contextmanager
def _changed(changed: list[tuple[Any, str, Any]]) -> Iterator[None]:
    missing = object()
    before = [(owner, name, vars(owner).get(name, missing)) for owner, name, _ in changed]
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
