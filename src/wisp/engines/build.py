"""Builds engines from their names on the command line. The only module that knows all engines."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from wisp.core.draft.policies import Policies
from wisp.core.draft.predictor import Predictor
from wisp.core.errors import ConfigError, ModelError
from wisp.engines.base import DraftEngine, TargetEngine, Tokenizer
from wisp.engines.emulated import EmulatedTarget, Hardware, Written, hardware, is_hardware
from wisp.engines.grammars import Grammars
from wisp.engines.models import Progress, resolve
from wisp.engines.options import USUAL, EngineOptions

_GGUF = b"GGUF"
PREDICTOR = Path(__file__).parent / "data" / "predictor.json"
ENGINES = ("llama.cpp", "vllm", "emulated", "null")
SLOTS = {"llama.cpp": 8, "vllm": 64, "null": 256}  # where none are asked for
MOST_SLOTS = {"llama.cpp": 256, "vllm": 1024}  # llama.cpp: sequences in one context
CONTEXT = 2048  # where nothing else is asked for


def drafting_policies(spec: str, predictor: Path | None = None) -> Policies:
    """Drafting policies by their command-line form, with the predictor in a file (default: the one that ships)."""
    return Policies(spec, read_predictor(predictor))


def read_predictor(path: Path | None = None) -> Predictor:
    """The predictor in a file (default: the one that ships). Raises ConfigError."""
    path = path or PREDICTOR
    try:
        return Predictor.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the predictor {path}: {error}") from None


def served_name(name: str) -> str:
    """What clients call the model: the catalogue's name, or the file's without its ending."""
    name = name.encode("utf-8", "replace").decode()  # a file's name may be no UTF-8, which cannot be sent
    return Path(name.removeprefix("hf:")).name.removesuffix(".gguf").removesuffix(".toml")


def fetch_target(
    name: str, *, engine: str = "llama.cpp", offline: bool = False, progress: Progress | None = None
) -> Path | None:
    """Where the target is, once what is missing is fetched; None: no model is needed. Raises WispError."""
    check_engine(engine)
    if engine in ("emulated", "null"):
        return None
    if engine == "vllm":
        from wisp.engines.vllm.models import fetched
        from wisp.engines.vllm.starting import require

        require()
        return fetched(name, offline=offline, progress=progress)
    if is_hardware(name):
        raise ConfigError(f"{name} is a hardware profile, not a model: it goes with --engine emulated")
    return resolve(name, offline=offline, progress=progress)


def load_target(
    name: str,
    *,
    engine: str = "llama.cpp",
    mode: str | None = None,
    slots: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    tensor_parallel: int = 1,
    memory: float = 0.9,
    offline: bool = False,
    progress: Progress | None = None,
    kv_tokens: int | None = None,
    written: Written | None = None,
    options: EngineOptions | Mapping[str, Any] = USUAL,
) -> tuple[TargetEngine, Tokenizer]:
    """The target's engine, with the grammars of its vocabulary, and its tokenizer. Raises ConfigError or ModelError.

    tensor_parallel, memory: of vLLM (see its Wanted)
    kv_tokens, written: of the emulated engine, whose `name` is that of a hardware profile or a TOML file: its room for
    KV, and its text, if not what the profile says and a hash.
    options: of llama.cpp and vLLM, also as they are written
    """
    if not isinstance(options, EngineOptions):
        options = msgspec.convert(options, EngineOptions)
    check_engine(engine, mode=mode, kv_tokens=kv_tokens, options=options)
    if engine == "emulated":
        profile = emulated_hardware(name, slots=slots, context=context, kv_tokens=kv_tokens)
        return _with_grammars(*_emulated(served_name(name), profile, written))
    slots = slots or SLOTS[engine]
    if slots > MOST_SLOTS.get(engine, slots):
        raise ConfigError(f"{engine} holds at most {MOST_SLOTS[engine]} slots, not {slots}")
    path = fetch_target(name, engine=engine, offline=offline, progress=progress)
    if path is None:
        from wisp.engines.null import NullTarget
        from wisp.engines.plain import PlainTokenizer

        return _with_grammars(NullTarget(slots=max(slots, SLOTS["null"])), PlainTokenizer())
    if engine == "vllm":
        from wisp.engines.vllm.models import ends, tokenizer_of
        from wisp.engines.vllm.starting import Wanted
        from wisp.engines.vllm.target import VllmTarget

        tokenizer = tokenizer_of(path)
        wanted = Wanted(
            model=str(path),
            slots=slots,
            slot_tokens=context or CONTEXT,
            tensor_parallel=tensor_parallel,
            threads=threads,
            memory=memory,
            offline=offline,
            kv_type=options.kv_type,
            quantization=options.quantization,
            prefix_caching=options.prefix_caching,
            runner=options.runner,
            exact=mode == "exact",
        )
        return _with_grammars(
            VllmTarget(wanted, name=served_name(name), eos=ends(path, tokenizer)), tokenizer
        )
    from wisp.engines.llama.target import LlamaTarget
    from wisp.engines.llama.tokenizer import LlamaTokenizer

    with _ctrl_c_ends_it():
        target = LlamaTarget(
            path,
            name=served_name(name),
            mode="fast" if mode == "fast" else "exact",
            slots=slots,
            slot_tokens=context,
            threads=threads,
            options=options.of_llama(),
        )
        return _with_grammars(target, LlamaTokenizer.open(path))


def _with_grammars(target: TargetEngine, tokenizer: Tokenizer) -> tuple[TargetEngine, Tokenizer]:
    target.constraints.grammars = Grammars(tokenizer)
    return target, tokenizer


def check_engine(
    engine: str,
    *,
    mode: str | None = None,
    kv_tokens: int | None = None,
    options: EngineOptions = USUAL,
) -> None:
    """Raises ConfigError where there is no such engine or mode, or an option is another engine's."""
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; choose one of: {', '.join(ENGINES)}")
    if mode not in (None, "exact", "fast"):
        raise ConfigError(f"unknown mode {mode!r}; choose exact or fast")
    if kv_tokens is not None and engine != "emulated":
        raise ConfigError(
            "--kv-tokens is for --engine emulated; others have room for --slots times --context"
        )
    options.check(engine)


def emulated_hardware(
    name: str, *, slots: int | None = None, context: int | None = None, kv_tokens: int | None = None
) -> Hardware:
    """A hardware profile with changes. Raises ConfigError."""
    asked = {"slots": slots, "slot_tokens": context, "kv_tokens": kv_tokens}
    return msgspec.structs.replace(hardware(name), **{k: v for k, v in asked.items() if v is not None})


def _emulated(name: str, profile: Hardware, written: Written | None) -> tuple[TargetEngine, Tokenizer]:
    from wisp.engines.plain import NumberTokenizer, PlainTokenizer

    if written is None:
        return EmulatedTarget(name, profile), PlainTokenizer()
    text, n_vocab, eos, digest = written
    target = EmulatedTarget(name, profile, text, n_vocab=n_vocab, eos=eos, digest=digest)
    return target, NumberTokenizer(n_vocab, eos)


def read_tokenizer(blob: bytes) -> Tokenizer:
    """The tokenizer that a verifier hands over as `blob`, all of it read. Raises ModelError or ConfigError."""
    try:
        tokenizer = _read_tokenizer(blob)
        _ = tokenizer.fingerprint
    except (ModelError, ConfigError):
        raise
    except BaseException as error:  # whatever else is in it: libraries raise bare Exceptions, and Rust panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"this tokenizer is damaged: {error!s:.200}") from None
    return tokenizer


def _read_tokenizer(blob: bytes) -> Tokenizer:
    from wisp.engines.plain import read_plain

    if blob.startswith(_GGUF):
        from wisp.engines.llama.tokenizer import LlamaTokenizer

        return LlamaTokenizer.from_blob(blob)
    if (plain := read_plain(blob)) is not None:
        return plain
    from wisp.engines.huggingface import HfTokenizer

    return HfTokenizer(blob)


def load_drafter(
    name: str,
    *,
    slots: int = 8,
    threads: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    options: EngineOptions = USUAL,
) -> tuple[DraftEngine | None, str]:
    """The draft engine, and its vocabulary's fingerprint ("" where it has none of its own).

    `slots`: sessions whose context the model holds at once; with more, it reads contexts over and over.
    `name`: a model as `resolve` takes it, "ngram", "ngram+MODEL", or "none" (then the engine is None).
    """
    if name in ("none", "ngram"):
        _require_usual(name, options)
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
            rest, slots=slots, threads=threads, offline=offline, progress=progress, options=options
        )
        if model is None or not fingerprint:
            raise ConfigError(f"--draft {name}: what follows ngram+ must be a model")
        return NgramThenModel(NgramDraft(), model), fingerprint
    from wisp.engines.llama.draft import LlamaDraft
    from wisp.engines.llama.tokenizer import LlamaTokenizer

    path = resolve(name, offline=offline, progress=progress)
    with _ctrl_c_ends_it():
        tokenizer = LlamaTokenizer.open(path)
        fingerprint = tokenizer.fingerprint
        tokenizer.close()
        drafter = LlamaDraft(
            path,
            slots=slots,
            slot_tokens=2048,
            threads=threads,
            name=served_name(name),
            options=options.of_llama(),
        )
    return drafter, fingerprint


def _require_usual(name: str, options: EngineOptions) -> None:
    if options != USUAL:
        raise ConfigError(f"--draft {name} has no model: leave out the options for its device and KV")


@contextlib.contextmanager
def _ctrl_c_ends_it() -> Iterator[None]:
    """Python takes no signals while native code runs, and to load a model takes up to a minute: meanwhile Ctrl-C ends
    the process without asking it. In other threads, and where somebody else handles it, it is left alone.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
