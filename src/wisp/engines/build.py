"""From names on a command line to engines: the one place that knows which engines there are."""

from __future__ import annotations

import json
from pathlib import Path

from wisp.core.drafting import Policies
from wisp.core.errors import ConfigError
from wisp.core.predictor import Predictor
from wisp.engines.base import DraftEngine, TargetEngine, Tokenizer
from wisp.engines.models import Progress, resolve

PREDICTOR = Path(__file__).parent / "data" / "predictor.json"
ENGINES = ("llama.cpp", "vllm", "null")
SLOTS = {"llama.cpp": 8, "vllm": 64}  # where none are asked for


def drafting_policies(spec: str, predictor: Path | None = None) -> Policies:
    """Drafting policies by their command-line form, with the predictor in a file (default: the one that ships)."""
    return Policies(spec, read_predictor(predictor))


def read_predictor(path: Path | None = None) -> Predictor:
    """The predictor in a file (default: the one that ships). Raises ConfigError."""
    path = path or PREDICTOR
    try:
        return Predictor.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the predictor {path}: {error}") from None


def served_name(name: str) -> str:
    """What clients call the model: the catalogue's name, or the file's without its ending."""
    return Path(name.removeprefix("hf:")).name.removesuffix(".gguf")


def fetch_target(
    name: str, *, engine: str = "llama.cpp", offline: bool = False, progress: Progress | None = None
) -> Path | None:
    """Where the target is, after fetching what is missing. Raises ConfigError or ModelError."""
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; choose one of: {', '.join(ENGINES)}")
    if engine == "null":
        return None
    if engine == "vllm":
        from wisp.engines.vllm.models import fetched
        from wisp.engines.vllm.starting import require

        require()
        return fetched(name, offline=offline, progress=progress)
    return resolve(name, offline=offline, progress=progress)


def load_target(
    name: str,
    *,
    engine: str = "llama.cpp",
    mode: str | None = None,
    slots: int | None = None,
    context: int = 2048,
    threads: int | None = None,
    tensor_parallel: int = 1,
    memory: float = 0.9,
    offline: bool = False,
    progress: Progress | None = None,
) -> tuple[TargetEngine, Tokenizer]:
    """The target's engine and tokenizer. Raises ConfigError or ModelError.

    tensor_parallel, memory: of vLLM (see VllmTarget)
    """
    path = fetch_target(name, engine=engine, offline=offline, progress=progress)
    if path is None:
        from wisp.engines.null import ByteTokenizer, NullTarget

        return NullTarget(slots=max(slots or 0, 256)), ByteTokenizer()
    slots = slots or SLOTS[engine]
    if mode not in (None, "exact", "fast"):
        raise ConfigError(f"unknown mode {mode!r}; choose exact or fast")
    if engine == "vllm":
        if mode == "exact":
            raise ConfigError(
                "--engine vllm has no exact mode: its kernels round differently from batch to batch"
            )
        from wisp.engines.vllm.models import ends, tokenizer_of
        from wisp.engines.vllm.target import VllmTarget

        tokenizer = tokenizer_of(path)
        return VllmTarget(
            str(path),
            name=served_name(name),
            eos=ends(path, tokenizer),
            slots=slots,
            slot_tokens=context,
            tensor_parallel=tensor_parallel,
            threads=threads,
            memory=memory,
            offline=offline,
        ), tokenizer
    from wisp.engines.llama.target import LlamaTarget
    from wisp.engines.llama.tokenizer import LlamaTokenizer

    target = LlamaTarget(
        path,
        name=served_name(name),
        mode="fast" if mode == "fast" else "exact",
        slots=slots,
        slot_tokens=context,
        threads=threads,
    )
    return target, LlamaTokenizer.open(path)


def load_drafter(
    name: str,
    *,
    slots: int = 8,
    threads: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> tuple[DraftEngine | None, str]:
    """The draft engine, and its vocabulary's fingerprint ("" where it has none of its own).

    `slots`: sessions whose context the model holds at once; with more, it reads contexts over and over.
    `name`: a model as `resolve` takes it, "ngram", "ngram+MODEL", or "none" (then the engine is None).
    """
    if name == "none":
        return None, ""
    if name == "ngram":
        from wisp.engines.ngram import NgramDraft

        return NgramDraft(), ""
    if name.startswith("ngram+"):
        from wisp.engines.both import NgramThenModel
        from wisp.engines.ngram import NgramDraft

        rest = name.removeprefix("ngram+")
        model, fingerprint = load_drafter(
            rest, slots=slots, threads=threads, offline=offline, progress=progress
        )
        if model is None or not fingerprint:
            raise ConfigError(f"--draft {name}: what follows ngram+ must be a model")
        return NgramThenModel(NgramDraft(), model), fingerprint
    from wisp.engines.llama.draft import LlamaDraft
    from wisp.engines.llama.tokenizer import LlamaTokenizer

    path = resolve(name, offline=offline, progress=progress)
    tokenizer = LlamaTokenizer.open(path)
    fingerprint = tokenizer.fingerprint
    tokenizer.close()
    drafter = LlamaDraft(path, slots=slots, slot_tokens=2048, threads=threads, name=served_name(name))
    return drafter, fingerprint
