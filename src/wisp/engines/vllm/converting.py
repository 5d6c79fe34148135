"""A GGUF file as a folder in Hugging Face format, which vLLM loads: for tests and the demo, not for production.

Weights become float32; a quantised file gives the values that it stands for.
The tokenizer comes along as the file's own metadata (`tokenizer.gguf`), which `load_target` prefers. Known are the
plain llama and qwen2/qwen3 families.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from wisp.core.errors import ConfigError, ModelError
from wisp.engines.llama.gguf import header_only

TOKENIZER = "tokenizer.gguf"  # where it is in a folder, it is the tokenizer
_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def converted(source: Path, folder: Path) -> Path:
    """`folder` with the model of `source` in it: made now, unless it is there. Raises ModelError or ConfigError."""
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            convert(source, part)
            try:
                os.replace(part, folder)
            except OSError:
                if not (folder / "config.json").is_file():  # otherwise another process was first
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def convert(source: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and tokenizer.gguf into `folder`. Raises ModelError or ConfigError."""
    try:
        import gguf  # type: ignore[import-not-found, unused-ignore]
        from safetensors.numpy import save_file  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"converting a GGUF file needs {error.name}: pip install gguf safetensors"
        ) from None
    reader = gguf.GGUFReader(source)

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(key)
        return default if field is None else field.contents()

    family = value("general.architecture")
    if family not in _FAMILIES:
        raise ModelError(f"{source.name} is of family {family!r}; known are {', '.join(_FAMILIES)}")
    heads = value(f"{family}.attention.head_count")
    groups = value(f"{family}.attention.head_count_kv", heads)
    tensors: dict[str, Any] = {}
    for tensor in reader.tensors:
        data = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = _renamed(tensor.name)
        if name is None:
            raise ModelError(
                f"{source.name} has a tensor {tensor.name}, which is not known of the family {family}"
            )
        if family == "llama" and tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            data = _halves(data, heads if "attn_q" in tensor.name else groups)
        tensors[name] = np.ascontiguousarray(data)
    rows, width = tensors["model.embed_tokens.weight"].shape
    config = {
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": value(f"{family}.feed_forward_length"),
        "num_hidden_layers": value(f"{family}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": value(f"{family}.attention.key_length", width // heads),
        "max_position_embeddings": value(f"{family}.context_length"),
        "rms_norm_eps": value(f"{family}.attention.layer_norm_rms_epsilon"),
        "rope_theta": value(f"{family}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / TOKENIZER).write_bytes(header_only(source))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _renamed(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None if there is none."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, what = stem.split(".", 2)
        return f"model.layers.{layer}.{_NAMES[what]}.{kind}" if what in _NAMES else None
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else None


def _halves(weight: Any, heads: int) -> Any:
    """GGUF's llama rotates neighbouring rows of a head, Hugging Face's the two halves: put the rows in that order."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
