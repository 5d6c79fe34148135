"""A GGUF model opened by llama.cpp."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wisp.core.errors import EngineError, ModelError
from wisp.engines.llama.capi import api

_BROKEN = re.compile("tensor '([^']*)' has invalid data")  # what llama.cpp says of them


class Model:
    """An open model: weights (unless `vocab_only`) and vocabulary.

    repack:  let llama.cpp rearrange weights for speed; it changes results with the number of rows, so exact
             mode does without
    layers:  how many to put on accelerators, -1 for all; where the build knows none, none go
    split:   shares of the model for each accelerator (default: by their free memory)
    check:   refuse weights that are NaN or infinite; it reads all of them once, at the speed of memory
    vocab_only: read tokenizer and metadata only (milliseconds to tenths of a second, a few MB)

    Raises ModelError if the file is missing, is not a GGUF model, or is of a kind whose KV cannot be rolled back.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        repack: bool = True,
        layers: int = -1,
        split: Sequence[float] = (),
        check: bool = True,
        vocab_only: bool = False,
    ) -> None:
        self.path = Path(path)
        if not os.path.isfile(self.path):
            raise ModelError(f"no model file at {self.path}; fetch one with `wisp pull`, or check the path")
        self._api = api()
        lib, ffi = self._api.lib, self._api.ffi
        params = lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.use_extra_bufts = repack
        params.check_tensors = check
        params.n_gpu_layers = layers
        shares = ffi.new("float[]", int(lib.llama_max_devices()))  # alive while the model loads
        if split:
            shares[0 : len(split)] = list(split)
            params.tensor_split = shares
        self._api.log.clear()
        pointer = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if pointer == ffi.NULL:
            said = self._api.log.tail()
            if broken := _BROKEN.search(said):
                raise ModelError(
                    f"{self.path} has weights that are not finite numbers (in {broken[1]}): the file is damaged, or "
                    "was converted wrongly; fetch or convert it again"
                )
            raise ModelError(f"llama.cpp cannot load {self.path}: {said or 'no reason given'}")
        self._pointer: Any = pointer
        self._contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._free = weakref.finalize(self, lib.llama_model_free, pointer)
        if not vocab_only:
            self._refuse_unusable()

    @property
    def pointer(self) -> Any:
        """`llama_model *`. Raises EngineError once closed (a dangling pointer would end the process)."""
        if not self._free.alive:
            raise EngineError(f"the model {self.path.name} is closed")
        return self._pointer

    @property
    def vocab(self) -> Any:
        """`const llama_vocab *`, valid while the model is open."""
        return self._api.lib.llama_model_get_vocab(self.pointer)

    @property
    def n_vocab(self) -> int:
        return int(self._api.lib.llama_vocab_n_tokens(self.vocab))

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was trained for, tokens."""
        return int(self._api.lib.llama_model_n_ctx_train(self.pointer))

    @property
    def description(self) -> str:
        """Family, size and quantisation, e.g. "qwen2 1.5B Q4_K - Medium"."""
        buffer = self._api.ffi.new("char[]", 256)
        self._api.lib.llama_model_desc(self.pointer, buffer, 256)
        return str(self._api.ffi.string(buffer).decode("utf-8", "replace"))

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's default chat template."""
        text = self._api.lib.llama_model_chat_template(self.pointer, self._api.ffi.NULL)
        return None if text == self._api.ffi.NULL else self._api.ffi.string(text).decode("utf-8", "replace")

    @property
    def eos(self) -> frozenset[int]:
        """Every id that ends a generation."""
        lib, vocab = self._api.lib, self.vocab
        return frozenset(i for i in range(self.n_vocab) if lib.llama_vocab_is_eog(vocab, i))

    def adopt(self, context: Any) -> None:
        """`context` is to be closed before the model is."""
        self._contexts.add(context)

    def close(self) -> None:
        """Frees the model, and before it the contexts made from it. Closing twice does nothing."""
        for context in list(self._contexts):
            context.close()
        self._free()

    def _refuse_unusable(self) -> None:
        lib, pointer = self._api.lib, self.pointer
        kinds = {
            "an encoder": lib.llama_model_has_encoder,
            "a recurrent state": lib.llama_model_is_recurrent,
            "a hybrid state": lib.llama_model_is_hybrid,
            "diffusion": lib.llama_model_is_diffusion,
        }
        for kind, has in kinds.items():
            if has(pointer):
                self.close()
                raise ModelError(
                    f"{self.path.name} has {kind}: rejected drafts cannot be rolled back; use a plain decoder model"
                )
