"""llama.cpp's C API through cffi, in ABI mode: only what is used is declared, nothing is compiled.

The `xllamacpp` wheel has one shared object that exports the whole C API. It is opened by path, without
importing the Python module. Struct layouts change between builds of llama.cpp, so the declarations below hold
for one version (`PIN`); `api()` refuses another, and refuses a library whose default parameters do not read
back as that version's.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisp.core.errors import EngineError

PIN = "2026.10.11549"  # llama.cpp build b11549

_DECLARATIONS = """
typedef struct llama_model llama_model;
typedef struct llama_context llama_context;
typedef struct llama_vocab llama_vocab;
typedef struct llama_memory_i llama_memory_i;

struct llama_model_params {
  void *devices, *tensor_buft_overrides;
  int32_t n_gpu_layers; int split_mode, load_mode, lazy_mode; int32_t main_gpu;
  const float *tensor_split;
  void *progress_callback, *progress_callback_user_data, *kv_overrides;
  bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
};
struct llama_context_params {
  uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
  int32_t n_threads, n_threads_batch;
  int ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
  float rope_freq_base, rope_freq_scale;
  float yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
  uint32_t yarn_orig_ctx;
  float defrag_thold;
  void *cb_eval, *cb_eval_user_data;
  int type_k, type_v;
  void *abort_callback, *abort_callback_data, *reserved;
  bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
  void *samplers; size_t n_samplers; void *ctx_other;
};
typedef struct llama_batch {
  int32_t n_tokens; int32_t *token; float *embd; int32_t *pos; int32_t *n_seq_id; int32_t **seq_id; int8_t *logits;
} llama_batch;

typedef struct ggml_backend_device *ggml_backend_dev_t;

size_t ggml_backend_dev_count(void);
ggml_backend_dev_t ggml_backend_dev_get(size_t);
const char *ggml_backend_dev_name(ggml_backend_dev_t);
const char *ggml_backend_dev_description(ggml_backend_dev_t);
int ggml_backend_dev_type(ggml_backend_dev_t);
void ggml_backend_dev_memory(ggml_backend_dev_t, size_t *, size_t *);
size_t llama_max_devices(void);

void llama_backend_init(void);
void llama_log_set(void (*callback)(int, const char *, void *), void *);
const char *llama_print_system_info(void);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);

llama_model *llama_model_load_from_file(const char *, struct llama_model_params);
void llama_model_free(llama_model *);
const llama_vocab *llama_model_get_vocab(const llama_model *);
int32_t llama_model_n_ctx_train(const llama_model *);
int32_t llama_model_desc(const llama_model *, char *, size_t);
const char *llama_model_chat_template(const llama_model *, const char *);
bool llama_model_has_encoder(const llama_model *);
bool llama_model_is_recurrent(const llama_model *);
bool llama_model_is_hybrid(const llama_model *);
bool llama_model_is_diffusion(const llama_model *);

llama_context *llama_init_from_model(llama_model *, struct llama_context_params);
void llama_free(llama_context *);
llama_batch llama_batch_init(int32_t, int32_t, int32_t);
void llama_batch_free(llama_batch);
int32_t llama_decode(llama_context *, llama_batch);
float *llama_get_logits(llama_context *);
float *llama_get_logits_ith(llama_context *, int32_t);
llama_memory_i *llama_get_memory(const llama_context *);
void llama_memory_clear(llama_memory_i *, bool);
bool llama_memory_seq_rm(llama_memory_i *, int32_t, int32_t, int32_t);
void llama_memory_seq_cp(llama_memory_i *, int32_t, int32_t, int32_t, int32_t);

int llama_vocab_type(const llama_vocab *);
int32_t llama_vocab_n_tokens(const llama_vocab *);
const char *llama_vocab_get_text(const llama_vocab *, int32_t);
int llama_vocab_get_attr(const llama_vocab *, int32_t);
bool llama_vocab_is_eog(const llama_vocab *, int32_t);
bool llama_vocab_get_add_bos(const llama_vocab *);
int32_t llama_vocab_bos(const llama_vocab *);
int32_t llama_vocab_eos(const llama_vocab *);
int32_t llama_tokenize(const llama_vocab *, const char *, int32_t, int32_t *, int32_t, bool, bool);
int32_t llama_token_to_piece(const llama_vocab *, int32_t, char *, int32_t, int32_t, bool);
"""

# What the default-parameter functions of the pinned build return. A shifted field cannot read back right:
# the values alternate between 0, -1, true and others (fields whose default is NULL are all listed, too).
_MODEL_DEFAULTS: dict[str, float] = {
    "devices": 0, "tensor_buft_overrides": 0, "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1,
    "main_gpu": 0, "tensor_split": 0, "progress_callback": 0, "progress_callback_user_data": 0, "kv_overrides": 0,
    "vocab_only": 0, "check_tensors": 0, "use_extra_bufts": 1, "no_host": 0, "no_alloc": 0, "load_mtp": 0,
}  # fmt: skip
_CONTEXT_DEFAULTS: dict[str, float] = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0, "rope_freq_scale": 0,
    "yarn_ext_factor": -1, "yarn_attn_factor": -1, "yarn_beta_fast": -1, "yarn_beta_slow": -1, "yarn_orig_ctx": 0,
    "defrag_thold": -1, "cb_eval": 0, "cb_eval_user_data": 0, "type_k": 1, "type_v": 1, "abort_callback": 0,
    "abort_callback_data": 0, "reserved": 0, "embeddings": 0, "offload_kqv": 1, "no_perf": 1, "op_offload": 1,
    "swa_full": 1, "kv_unified": 0, "samplers": 0, "n_samplers": 0, "ctx_other": 0,
}  # fmt: skip

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # ggml_log_level


class Log:
    """llama.cpp's log: silent, but the last warnings and errors are kept to be quoted."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=64)
        self._keeping = False

    def add(self, level: int, text: str) -> None:
        if level == _CONTINUED:
            if self._keeping and self._lines:
                self._lines[-1] += text
            return
        self._keeping = level in (_WARN, _ERROR)
        if self._keeping:
            self._lines.append(text)

    def clear(self) -> None:
        self._lines.clear()

    def tail(self) -> str:
        """The last three lines on one line, to end an error message with; "" if there were none."""
        return "; ".join(line.strip() for line in list(self._lines)[-3:] if line.strip())


@dataclass(frozen=True)
class Api:
    """The loaded library. `ffi` and `lib` are cffi's; every call through `lib` releases the GIL."""

    ffi: Any
    lib: Any
    log: Log
    keep: tuple[Any, ...]  # objects that C holds pointers to


_lock = threading.Lock()


def api() -> Api:
    """The library, loaded and checked once per process. Raises EngineError, saying what to install."""
    with _lock:
        return _load()


def kernels() -> str:
    """The kinds of kernels that this machine's processor gets: the same ones compute the same bits."""
    text: bytes = api().ffi.string(api().lib.llama_print_system_info())
    return text.decode("utf-8", "replace")


@functools.cache
def _load() -> Api:
    import cffi

    path = _shared_object()
    # Idle OpenMP threads that spin take the cores from every other process: a 2.4 ms batch took 1,096 ms with
    # two engines on two cores. The runtime reads this once, when the library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    try:
        lib = ffi.dlopen(str(path))
    except OSError as error:
        raise EngineError(f"llama.cpp's library {path.name} does not load here: {error}") from None
    log = Log()

    def on_log(level: int, text: Any, _user: Any) -> None:
        log.add(level, ffi.string(text).decode("utf-8", "replace"))

    callback = ffi.callback("void(int, const char *, void *)", on_log)
    _check_defaults(ffi, "llama_model_params", lib.llama_model_default_params(), _MODEL_DEFAULTS)
    _check_defaults(ffi, "llama_context_params", lib.llama_context_default_params(), _CONTEXT_DEFAULTS)
    lib.llama_log_set(callback, ffi.NULL)
    lib.llama_backend_init()
    return Api(ffi, lib, log, (callback,))


def _shared_object() -> Path:
    install = (
        f"install the exact version that this release of wisp was built for: pip install xllamacpp=={PIN}"
    )
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(f"the llama.cpp engine needs the package xllamacpp; {install}")
    version = importlib.metadata.version("xllamacpp")
    if version != PIN:
        raise EngineError(f"xllamacpp {version} is installed, with another layout of its structs; {install}")
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(p for p in folder.glob("xllamacpp*") if p.suffix in (".so", ".pyd", ".dylib"))
    if not found:
        raise EngineError(f"xllamacpp is installed without its shared library; re{install}")
    return found[0]


def _check_defaults(ffi: Any, name: str, params: Any, expected: dict[str, float]) -> None:
    """Every field of a default-parameters struct has its known value."""
    fields = [field for field, _ in ffi.typeof(f"struct {name}").fields]
    assert fields == list(expected), "declaration and table of defaults list the same fields"
    for field in fields:
        value = getattr(params, field)
        number = float(int(ffi.cast("intptr_t", value))) if isinstance(value, ffi.CData) else float(value)
        if not math.isclose(number, expected[field]):
            raise EngineError(
                f"llama.cpp's {name}.{field} reads {number:g} where {expected[field]:g} is expected: this library "
                f"has another layout than xllamacpp {PIN}; reinstall it (pip install --force-reinstall "
                f"xllamacpp=={PIN})"
            )
