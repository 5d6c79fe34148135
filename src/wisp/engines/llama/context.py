"""KV slots, batches and logits of one model.

A batch lives in numpy arrays that llama.cpp reads in place, so filling one costs microseconds.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wisp.core.errors import EngineError, ModelError
from wisp.engines.llama.capi import api
from wisp.engines.llama.model import Model

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

_FLASH = {"auto": -1, "off": 0, "on": 1}
_F16 = 1
_PAD = 256  # llama.cpp rounds a sequence's cells up to this


def physical_cores() -> int:
    """Cores this process may run on, hardware threads of one core counted once."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def _free(lib: Any, pointer: Any, _model: Model) -> None:
    """Frees a context. Holding the model until then keeps the two from being freed in the wrong order."""
    lib.llama_free(pointer)


class DecodeError(EngineError):
    """llama_decode failed with `code`: 1 no room in the KV cache, 2 aborted, -1 bad batch, below that fatal."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(
            f"llama.cpp could not evaluate a batch (code {code}){': ' if detail else ''}{detail}"
        )
        self.code = code


class Context:
    """`slots` KV slots (llama.cpp: sequences), each with room for `slot_tokens` tokens.

    rows:    most rows in one batch
    unified: all slots share one pool of cells (faster batches of several slots); otherwise each slot has a stream
             of its own, and its results cannot depend on what other slots do
    flash:   "on": insist on flash attention; "auto": llama.cpp chooses
    kv_type: ggml's number for the type of KV
    offload: let an accelerator, where there is one, keep KV and take large operations

    Fill with `add`, then `decode`, then read `logits`. Raises ModelError if llama.cpp cannot make the context.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        slot_tokens: int,
        rows: int,
        threads: int,
        unified: bool = False,
        flash: str = "on",
        offload: bool = False,
        kv_type: int = _F16,
    ) -> None:
        self._api = api()
        lib, ffi = self._api.lib, self._api.ffi
        self.model, self.slots, self.rows, self.unified = model, slots, rows, unified
        self.n_vocab = model.n_vocab
        self.rows_evaluated = 0  # since the context was made
        cells = -(-slot_tokens // _PAD) * _PAD
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells * slots, slots
        params.n_batch = params.n_ubatch = max(rows, slots)  # llama.cpp reserves an output for each slot
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _FLASH[flash]
        params.type_k = params.type_v = kv_type
        params.kv_unified = unified
        params.offload_kqv = params.op_offload = offload
        self.kv_types = (int(params.type_k), int(params.type_v))  # ggml's numbers for them
        self._api.log.clear()
        pointer = lib.llama_init_from_model(model.pointer, params)
        if pointer == ffi.NULL:
            raise ModelError(
                f"llama.cpp cannot make a context of {slots} x {slot_tokens} tokens for {model.path.name}: "
                f"{self._api.log.tail() or 'no reason given'}; try fewer slots or a shorter context"
            )
        self._pointer: Any = pointer
        self._memory: Any = lib.llama_get_memory(pointer)
        self._free = weakref.finalize(self, _free, lib, pointer, model)
        self._make_batch(rows)
        model.adopt(self)

    def _make_batch(self, rows: int) -> None:
        ffi = self._api.ffi
        self._token = np.zeros(rows, np.int32)
        self._position = np.zeros(rows, np.int32)
        self._one = np.ones(rows, np.int32)
        self._wanted = np.zeros(rows, np.int8)
        # Each row needs a pointer to its list of sequences: all point into one table of single ids.
        self._ids = np.arange(self.slots, dtype=np.int32)
        self._id_pointer = np.zeros(rows, np.uintp)
        self._batch = ffi.new("llama_batch *")
        self._batch.token = ffi.cast("int32_t *", self._token.ctypes.data)
        self._batch.pos = ffi.cast("int32_t *", self._position.ctypes.data)
        self._batch.n_seq_id = ffi.cast("int32_t *", self._one.ctypes.data)
        self._batch.seq_id = ffi.cast("int32_t **", self._id_pointer.ctypes.data)
        self._batch.logits = ffi.cast("int8_t *", self._wanted.ctypes.data)
        self._filled = 0

    def add(self, slot: int, start: int, tokens: Tokens, wanted: int) -> None:
        """Appends rows: `tokens` at places start, start + 1, ... of `slot`; logits of the last `wanted` of them."""
        first, end = self._filled, self._filled + len(tokens)
        if end > self.rows:
            raise EngineError(f"a batch has room for {self.rows} rows, not {end}")
        self._token[first:end] = tokens
        self._position[first:end] = np.arange(start, start + len(tokens), dtype=np.int32)
        self._id_pointer[first:end] = self._ids.ctypes.data + self._ids.itemsize * slot
        self._wanted[first:end] = 0
        self._wanted[end - wanted : end] = 1
        self._filled = end

    def decode(self) -> Logits:
        """Evaluates the batch. Returns logits, shape [rows wanted, n_vocab], in the order added.

        The array is llama.cpp's own memory: read it before the next call. Raises DecodeError; slots that had
        rows in the batch are then in an unknown state and are to be dropped.
        """
        self._check_open()
        n, self._filled = self._filled, 0
        self._batch.n_tokens = n
        self._api.log.clear()
        code = self._api.lib.llama_decode(self._pointer, self._batch[0])
        if code != 0:
            raise DecodeError(code, self._api.log.tail())
        self.rows_evaluated += n
        outputs = int(self._wanted[:n].sum())
        if outputs == 0:
            return np.empty((0, self.n_vocab), np.float32)
        pointer = self._api.lib.llama_get_logits(self._pointer)
        buffer = self._api.ffi.buffer(pointer, outputs * self.n_vocab * 4)
        return np.frombuffer(buffer, np.float32).reshape(outputs, self.n_vocab)

    def discard(self) -> None:
        self._filled = 0

    def drop(self, slot: int, start: int = 0) -> None:
        """Forgets what `slot` holds from place `start` on."""
        self._check_open()
        if not self._api.lib.llama_memory_seq_rm(self._memory, slot, start, -1):
            raise EngineError(f"llama.cpp cannot roll slot {slot} back to {start} tokens")

    def copy(self, source: int, target: int, tokens: int) -> None:
        """`target` becomes the first `tokens` tokens of `source` (another slot, holding at least as many)."""
        if source == target:
            raise EngineError(f"slot {source} cannot be copied onto itself")
        self.drop(target)
        if tokens == 0:
            return
        # A shared pool only marks the cells as the target's, too. Between separate streams a partial copy aborts
        # the process: copy all, then cut the tail off.
        end = tokens if self.unified else -1
        self._api.lib.llama_memory_seq_cp(self._memory, source, target, 0 if self.unified else -1, end)
        self.drop(target, tokens)

    def clear(self, *, wipe: bool = False) -> None:
        """Forgets what every slot holds. `wipe`: and zeroes it, where it may be what nothing can be multiplied by."""
        self._check_open()
        self.discard()
        self._api.lib.llama_memory_clear(self._memory, wipe)

    def close(self) -> None:
        """Frees the context. Closing twice does nothing."""
        self._free()

    def _check_open(self) -> None:
        if not self._free.alive:
            raise EngineError("the engine is closed")
