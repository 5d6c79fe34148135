"""From the name of a target to a folder that vLLM loads, and its tokenizer.

Qwen/Qwen3-32B       a model of the Hugging Face hub, through its own client
./folder             a model in Hugging Face format
name, ./my.gguf      as for llama.cpp: turned into such a folder, in the cache (float32: for trying things out)
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from wisp.core.errors import ModelError
from wisp.engines.base import Tokenizer
from wisp.engines.huggingface import HfTokenizer, end_ids
from wisp.engines.models import Progress, cache_dir, resolve
from wisp.engines.vllm.converting import TOKENIZER, converted

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def fetched(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The folder of a target. Downloads what is missing, unless `offline`. Raises ModelError or ConfigError."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model in Hugging Face format: it has no config.json")
        return path
    if _HUB.fullmatch(name) and not name.endswith(".gguf") and not path.exists():
        return _from_hub(name, offline)
    source = resolve(name, offline=offline, progress=progress)
    stat = source.stat()
    mark = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]
    return converted(source, cache_dir() / "vllm" / f"{source.stem}-{mark}")


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder. Raises ModelError."""
    if (folder / TOKENIZER).is_file():
        from wisp.engines.llama.tokenizer import LlamaTokenizer

        return LlamaTokenizer.open(folder / TOKENIZER)
    return HfTokenizer.open(folder, _n_vocab(folder))


def ends(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a generation: what the model's settings say, and the tokenizer."""
    return end_ids(folder) | tokenizer.eos


def _n_vocab(folder: Path) -> int:
    try:
        config = json.loads((folder / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} does not tell the size of the vocabulary ({error!r})"
        ) from None


def _from_hub(name: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, local_files_only=offline))
    except LocalEntryNotFoundError:
        why = "and is not to be downloaded (offline)" if offline else "and the hub cannot be reached"
        raise ModelError(f"{name} is not in the Hugging Face cache, {why}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"cannot fetch {name} from the hub: {str(error).splitlines()[0]}") from None
