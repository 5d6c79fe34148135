"""What llama.cpp computes on: the accelerators that the installed library can use, and an operator's options for them.

The library's own list is asked (`ggml_backend_dev_*`), so what a build lacks is known before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from wisp.core.errors import ConfigError
from wisp.engines.llama.capi import PIN, api

# ggml's numbers for the types that a KV cache can have
KV_TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip
WHOLE_TYPES = ("f32", "f16", "bf16")  # the others are quantised
FLASH_ATTENTION = ("auto", "on", "off")
MORE_WHEELS = (
    f"install xllamacpp=={PIN} from the project's own index of CUDA, ROCm or Vulkan wheels, which its README names "
    "(on a Mac, the usual wheel has Metal)"
)

_KINDS = {1: "GPU", 2: "integrated GPU", 3: "accelerator"}  # ggml_backend_dev_type; 0 is the CPU
_MIB = 1 << 20


class Accelerator(msgspec.Struct, frozen=True):
    """A device of the library's list that is no CPU. `memory_mib`: of all there is, 0 if it does not say."""

    name: str
    description: str
    kind: str
    memory_mib: int

    @property
    def holds_layers(self) -> bool:
        """Can layers of a model be put there? (Others only help the CPU with its matrices.)"""
        return self.kind != _KINDS[3]

    def __str__(self) -> str:
        memory = f", {self.memory_mib} MiB" if self.memory_mib else ""
        return f"{self.name} ({self.description}, {self.kind}{memory})"


class LlamaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is spread over devices, and how it computes there.

    gpu_layers:      layers to put on accelerators, -1 for all (default: all in fast mode, where the build can)
    kv_type:         of the KV cache, one of KV_TYPES (default: f16)
    flash_attention: "auto": llama.cpp chooses
    tensor_split:    shares of the model for each accelerator, in the order of `wisp doctor` (default: by free memory)
    batch_rows:      most rows in one call (default: 512 with an accelerator, 128 on the CPU)
    """

    gpu_layers: int | None = None
    kv_type: str = ""
    flash_attention: str = "auto"
    tensor_split: tuple[float, ...] = ()
    batch_rows: int | None = None

    @property
    def kv_number(self) -> int:
        """ggml's number for the KV type."""
        return KV_TYPES[self.kv_type or "f16"]

    def check(self, *, exact: bool) -> None:
        """Raises ConfigError, saying what to do, for values that are not known, that do not go together, that this
        build lacks, or (`exact`) that exact mode cannot have."""
        if self.kv_type and self.kv_type not in KV_TYPES:
            raise ConfigError(
                f"unknown KV type {self.kv_type!r} for llama.cpp; choose one of: {', '.join(KV_TYPES)}"
            )
        if self.flash_attention not in FLASH_ATTENTION:
            raise ConfigError(
                f"--flash-attention is auto, on or off, not {self.flash_attention!r} (llama.cpp)"
            )
        if self.kv_type and self.kv_type not in WHOLE_TYPES and self.flash_attention == "off":
            raise ConfigError(
                f"--kv-type {self.kv_type} needs flash attention: leave out --flash-attention off"
            )
        if self.gpu_layers is not None and self.gpu_layers < -1:
            raise ConfigError(f"--gpu-layers is a number of layers, or -1 for all, not {self.gpu_layers}")
        if self.batch_rows is not None and not 8 <= self.batch_rows <= 8192:
            raise ConfigError(f"--batch-rows is from 8 to 8192, not {self.batch_rows}")
        if exact:
            self._check_exact()
        self._check_build()

    def _check_exact(self) -> None:
        on_device = self.gpu_layers not in (None, 0) or self.tensor_split
        fixed = {
            "--gpu-layers and --tensor-split": on_device,
            "--batch-rows": self.batch_rows is not None,
            "--flash-attention off": self.flash_attention == "off",
        }
        for option, given in fixed.items():
            if given:
                raise ConfigError(
                    f"{option}: exact mode computes on the CPU, with flash attention, in calls of 2 to 7 rows; "
                    "add --mode fast"
                )

    def _check_build(self) -> None:
        devices = [d for d in accelerators() if d.holds_layers]
        if self.gpu_layers not in (None, 0) and not devices:
            raise ConfigError(
                f"--gpu-layers {self.gpu_layers}: the installed llama.cpp can use no accelerator here; {MORE_WHEELS}"
            )
        if not self.tensor_split:
            return
        if len(self.tensor_split) > len(devices):
            raise ConfigError(
                f"--tensor-split has {len(self.tensor_split)} shares, but the installed llama.cpp can use "
                f"{len(devices)} accelerators here ({named(devices)}); give as many shares at most"
            )
        if self.gpu_layers == 0:
            raise ConfigError("--tensor-split does not go with --gpu-layers 0, which puts no layer anywhere")


USUAL = LlamaOptions()


def accelerators() -> list[Accelerator]:
    """Devices besides the CPU that the installed library can use on this machine. Raises EngineError without one."""
    ffi, lib = api().ffi, api().lib
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        kind = int(lib.ggml_backend_dev_type(device))
        if kind == 0:
            continue
        free, total = ffi.new("size_t *"), ffi.new("size_t *")
        lib.ggml_backend_dev_memory(device, free, total)
        name, description = (
            ffi.string(text).decode("utf-8", "replace")
            for text in (lib.ggml_backend_dev_name(device), lib.ggml_backend_dev_description(device))
        )
        found.append(Accelerator(name, description, _KINDS.get(kind, _KINDS[3]), int(total[0]) // _MIB))
    return found


def named(devices: Sequence[Accelerator]) -> str:
    """For a message."""
    return ", ".join(map(str, devices)) or "none"


def parse_split(text: str) -> tuple[float, ...]:
    """`3,1`: three quarters on the first accelerator, one on the second. Raises ConfigError."""
    if not text:
        return ()
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        raise ConfigError(f"--tensor-split is numbers by comma, such as 3,1, not {text!r}") from None
    if not all(0.0 <= share < 1e9 for share in shares) or not any(shares):
        raise ConfigError(f"--tensor-split is shares of 0 or more, not all of them 0, not {text!r}")
    return shares
