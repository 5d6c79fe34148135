"""Tokenizers in Hugging Face's format (`tokenizer.json`), behind our protocol: for models without a GGUF file.

Ids and bytes are the same as those of a GGUF file of the same model, and so is the fingerprint: real tokens with
their bytes, added ones (control tokens among them) with their text. Two kinds of vocabulary are known: byte-level
(GPT-2's mapping of bytes to characters), and SentencePiece's (a mark for the space, and tokens for single bytes).

The blob is one JSON object with `tokenizer.json` and the few settings that belong to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wisp.core.errors import ConfigError, ModelError
from wisp.engines.base import Check
from wisp.engines.special import Special, SpecialTokens, StandIns
from wisp.engines.tokenizing import MOST_IDS, ModelTokenizer

FORMAT = "wisp-tokenizer-1"
FILE = "tokenizer.json"

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's mark

# Steps on the way to ids that leave no character out; normal forms write up to four bytes in one.
_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_SHORTEST_FORM = 4
_WHOLE = frozenset(
    {"Sequence", "ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "Prepend", "Replace"}
)


class HfTokenizer(ModelTokenizer):
    """Tokenizer protocol over `tokenizer.json`. Encoding is safe from several threads.

    n_vocab: ids below this are valid for the model, which may have more than the tokenizer
    """

    def __init__(self, blob: bytes) -> None:
        """From what `blob()` returned. Raises ModelError or, without the package `tokenizers`, ConfigError."""
        super().__init__()
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ConfigError("this verifier's tokenizer needs a package: pip install tokenizers") from None
        try:
            about = json.loads(blob)
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}")
            definition = about["tokenizer"]
            text = json.dumps(definition)
            self._parsing, self._literal = Tokenizer.from_str(text), Tokenizer.from_str(text)
            self._literal.encode_special_tokens = True
            self.n_vocab = int(about["n_vocab"])
            if not 0 < self.n_vocab <= MOST_IDS:
                raise ValueError(f"it says that it has {self.n_vocab} tokens")
            self.eos = frozenset(int(i) for i in about["eos"])
            self.bos_token, self.eos_token = str(about["bos_token"]), str(about["eos_token"])
            self.chat_template: str | None = about["chat_template"]
            added = {int(t["id"]): t for t in definition.get("added_tokens") or ()}
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"not a tokenizer that can be used here: {error}") from None
        self._blob = blob
        self._added = {i: str(t["content"]).encode() for i, t in added.items()}
        self._control = {i for i, t in added.items() if t.get("special")}
        self._special = SpecialTokens(
            Special(i, str(t["content"]), True, bool(t.get("lstrip")), bool(t.get("rstrip")))
            for i, t in added.items()
            if i in self._control
        )
        later = json.dumps(definition | {"pre_tokenizer": _within(definition.get("pre_tokenizer"))})
        self._later = Tokenizer.from_str(later) if later != text else self._literal
        self._later.encode_special_tokens = True
        self._shrinks = 0 if self._special.strips else _shrinks(definition)
        self._bytes_of = _reading(definition)
        self._bos = self._parsing.token_to_id(self.bos_token) if self.bos_token else None
        first = self._parsing.encode("a").ids[:1]
        self._adds_bos = first == [self._bos]

    @classmethod
    def open(cls, folder: Path, n_vocab: int) -> HfTokenizer:
        """From a model's folder. Raises ModelError."""
        try:
            definition = json.loads((folder / FILE).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(
                f"{folder} has no readable {FILE} ({error}); other tokenizers are not known"
            ) from None
        settings = _read(folder / "tokenizer_config.json")
        about = {
            "format": FORMAT,
            "tokenizer": definition,
            "n_vocab": n_vocab,
            "eos": sorted(end_ids(folder)),
            "bos_token": _content(settings.get("bos_token")),
            "eos_token": _content(settings.get("eos_token")),
            "chat_template": _template(folder, settings),
        }
        return cls(json.dumps(about).encode())

    def _real(self) -> Iterator[tuple[int, bytes]]:
        for token in range(self.n_vocab):
            text = self._parsing.id_to_token(token)
            if text is not None:
                yield token, self._added.get(token) or self._bytes_of(text)

    def _encoded(self, text: str, parse_special: bool, stand_ins: StandIns, check: Check) -> list[int]:
        """The library finds special tokens by itself, in linear time; only where some are not to be found does it get
        the pieces between the others."""
        if parse_special and stand_ins:
            return self._encode_guarded(text, stand_ins, check)
        tokenizer = self._parsing if parse_special else self._literal
        ids: list[int] = tokenizer.encode(text.translate(stand_ins), add_special_tokens=False).ids
        return ids

    def _encode_guarded(self, text: str, stand_ins: StandIns, check: Check) -> list[int]:
        ids: list[int] = []
        tokenizer = self._literal
        for part in self._special.split(text, control=True, stand_ins=stand_ins):
            check()
            ids += [part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False).ids
            tokenizer = self._later
        return ids

    def fewest(self, text: str) -> int:
        """No token stands for more bytes than the longest has; 0 for a vocabulary that may leave text out."""
        if not self._shrinks:
            return 0
        return len(text.encode("utf-8", "replace")) // (self._vocabulary[1] * self._shrinks)

    def _rendered(self, token: int) -> bytes:
        text = (
            None
            if token in self._control or not 0 <= token < self.n_vocab
            else self._parsing.id_to_token(token)
        )
        return b"" if text is None else self._added.get(token) or self._bytes_of(text)

    def blob(self) -> bytes:
        return self._blob

    def close(self) -> None:
        """Nothing is held."""


def _within(step: Any) -> Any:
    """A pre-tokenizer for text that is not the beginning: some put a space only before that."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        return step | {"pretokenizers": [_within(s) for s in step.get("pretokenizers") or ()]}
    return step | {"prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step


def _shrinks(definition: dict[str, Any]) -> int:
    """How many bytes of text may become one byte before tokens are made of it; 0 where nothing bounds it."""
    steps = [*_steps(definition.get("normalizer")), *_steps(definition.get("pre_tokenizer"))]
    kinds = {str(s.get("type")) for s in steps}
    removes = any(s.get("behavior") == "Removed" for s in steps if s.get("type") == "Split")
    replaces = any(s.get("pattern") != {"String": " "} for s in steps if s.get("type") == "Replace")
    unknown = "ByteLevel" not in kinds and not definition["model"].get("byte_fallback")
    if removes or replaces or unknown or not kinds <= _WHOLE | _FORMS:
        return 0
    return _SHORTEST_FORM if kinds & _FORMS else 1


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    if isinstance(step, dict):
        yield step
        for inner in (*(step.get("normalizers") or ()), *(step.get("pretokenizers") or ())):
            yield from _steps(inner)


def end_ids(folder: Path) -> frozenset[int]:
    """The ids that end a generation, by the model's own settings."""
    for name in ("generation_config.json", "config.json"):
        found = _read(folder / name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {t["name"]: t["template"] for t in found}.get("default")
    return found if isinstance(found, str) else None


def _reading(definition: dict[str, Any]) -> Callable[[str], bytes]:
    """How the vocabulary writes bytes. Raises ModelError."""
    kinds = set(_kinds(definition.get("decoder")))
    if "ByteLevel" in kinds:
        table = byte_level()
        return lambda text: bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentence_piece
    raise ModelError(f"a vocabulary of an unknown kind (decoder {', '.join(sorted(kinds)) or 'none'})")


def _kinds(decoder: Any) -> Iterator[str]:
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for inner in decoder.get("decoders") or ():
            yield from _kinds(inner)


def _sentence_piece(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()


def byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones are themselves, the others follow from 256 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}
