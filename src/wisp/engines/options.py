"""An operator's options for engines. Each option belongs to certain engines, and is refused with others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from wisp.core.errors import ConfigError

if TYPE_CHECKING:
    from wisp.engines.llama.devices import LlamaOptions

LLAMA, VLLM = "llama.cpp", "vllm"


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """As on the command line; defaults leave the choice to the engine.

    kv_type: of the KV cache (llama.cpp: see `LlamaOptions`; vllm: see its Wanted)
    gpu_layers, flash_attention, tensor_split, batch_rows: of llama.cpp
    runner, quantization, prefix_caching: of vLLM
    """

    kv_type: str = ""
    gpu_layers: int | None = None
    flash_attention: str = "auto"
    tensor_split: str = ""
    batch_rows: int | None = None
    runner: str = ""
    quantization: str = ""
    prefix_caching: bool = True

    def check(self, engine: str) -> None:
        """Raises ConfigError where an option is another engine's."""
        owners = {
            "kv_type": (LLAMA, VLLM),
            "gpu_layers": (LLAMA,),
            "flash_attention": (LLAMA,),
            "tensor_split": (LLAMA,),
            "batch_rows": (LLAMA,),
            "runner": (VLLM,),
            "quantization": (VLLM,),
            "prefix_caching": (VLLM,),
        }
        for name, engines in owners.items():
            if engine not in engines and getattr(self, name) != getattr(USUAL, name):
                option = "--no-prefix-caching" if name == "prefix_caching" else f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is for --engine {' and '.join(engines)}, not for {engine}")

    def of_llama(self) -> LlamaOptions:
        """Raises ConfigError for what has no meaning; what the build lacks is found when a model is loaded."""
        from wisp.engines.llama.devices import LlamaOptions, parse_split

        return LlamaOptions(
            gpu_layers=self.gpu_layers,
            kv_type=self.kv_type,
            flash_attention=self.flash_attention,
            tensor_split=parse_split(self.tensor_split),
            batch_rows=self.batch_rows,
        )


USUAL = EngineOptions()
