"""A vocabulary in Hugging Face's format is the same one as in a GGUF file: same fingerprint, same ids, same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wisp.engines
from hf_files import metadata, tokenizer_files
from wisp.core.errors import ModelError
from wisp.engines.build import read_tokenizer
from wisp.engines.huggingface import HfTokenizer, end_ids
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.plain import NumberTokenizer, PlainTokenizer

TINY = Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf"
TEXTS = (
    "Tell me a story about Belomi.",
    "  two  spaces, a\ttab\nand\r\nlines ",
    "naïve 中文 🙂 \u0001 \u00ff",
    "it's 1234 times we've said: don't",
    "lone \ud800 surrogate",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    tokenizer_files(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HfTokenizer:
    return HfTokenizer.open(folder, 512)


def specials() -> list[str]:
    about = metadata(TINY)
    return [
        t
        for t, kind in zip(about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"], strict=True)
        if kind == 3
    ]


def test_the_fingerprint_is_the_gguf_files(theirs: HfTokenizer, tokenizer: LlamaTokenizer) -> None:
    assert theirs.fingerprint == tokenizer.fingerprint
    assert theirs.eos <= tokenizer.eos
    assert (theirs.n_vocab, theirs.bos_token, theirs.eos_token, theirs.chat_template) == (
        tokenizer.n_vocab,
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.chat_template,
    )


@pytest.mark.parametrize("parse_special", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_text_becomes_the_same_ids(
    theirs: HfTokenizer, tokenizer: LlamaTokenizer, parse_special: bool, add_bos: bool
) -> None:
    for text in (*TEXTS, f"{specials()[0]}Hi{specials()[-1]}"):
        ours = tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)
        assert theirs.encode(text, add_bos=add_bos, parse_special=parse_special) == ours, text


def test_ids_become_the_same_bytes(theirs: HfTokenizer, tokenizer: LlamaTokenizer) -> None:
    ids = range(-1, theirs.n_vocab + 1)
    assert [theirs.piece(i) for i in ids] == [tokenizer.piece(i) for i in ids]
    assert theirs.piece(metadata(TINY)["tokenizer.ggml.eos_token_id"]) == b""


def test_a_blob_makes_the_same_tokenizer_elsewhere(theirs: HfTokenizer) -> None:
    again = HfTokenizer(theirs.blob())
    assert again.fingerprint == theirs.fingerprint
    assert again.encode(TEXTS[2], add_bos=True, parse_special=True) == theirs.encode(
        TEXTS[2], add_bos=True, parse_special=True
    )


def test_another_vocabulary_has_another_fingerprint(folder: Path, theirs: HfTokenizer) -> None:
    about = json.loads(theirs.blob())
    vocabulary: dict[str, int] = about["tokenizer"]["model"]["vocab"]
    a, b = [t for t, i in vocabulary.items() if i in (300, 301)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    assert HfTokenizer(json.dumps(about).encode()).fingerprint != theirs.fingerprint


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "wisp-tokenizer-9"}, "format"),
        ({"tokenizer": {}}, "not a tokenizer"),
        ({"eos": None}, "not a tokenizer"),
    ],
)
def test_a_blob_that_is_none_is_refused(theirs: HfTokenizer, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        HfTokenizer(json.dumps(json.loads(theirs.blob()) | change).encode())


def test_a_decoder_of_an_unknown_kind_is_refused(theirs: HfTokenizer) -> None:
    about = json.loads(theirs.blob())
    about["tokenizer"]["decoder"] = None
    with pytest.raises(ModelError, match="unknown kind"):
        HfTokenizer(json.dumps(about).encode())


def test_a_sentence_piece_vocabulary_gives_spaces_and_bytes() -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "<0xFF>": 4, "\u2581the": 5, "\u2581": 6, "t": 7}
    added = [
        {"id": i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False}
        | {"rstrip": False}
        for t, i in words.items()
        if i < 3
    ]
    definition = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": words, "merges": [], "byte_fallback": True, "unk_token": "<unk>"},
    }
    about = {"format": "wisp-tokenizer-1", "tokenizer": definition, "n_vocab": 9, "eos": [2]}
    about |= {"bos_token": "<s>", "eos_token": "</s>", "chat_template": None}
    tokenizer = HfTokenizer(json.dumps(about).encode())
    assert [tokenizer.piece(i) for i in range(9)] == [b"", b"", b"", b"\n", b"\xff", b" the", b" ", b"t", b""]


def test_without_a_tokenizer_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no readable tokenizer\.json"):
        HfTokenizer.open(tmp_path, 512)
    assert end_ids(tmp_path) == frozenset()


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: about | {"n_vocab": 1 << 40},
        lambda about: about | {"n_vocab": 0},
        lambda about: about["tokenizer"]["added_tokens"][0].pop("content") and about,
        lambda about: about["tokenizer"]["model"]["merges"].append("a") or about,
        lambda about: about["tokenizer"]["model"].update(merges=[["a", "zz"]]) or about,
        lambda about: about["tokenizer"].update(decoder=[[[]]]) or about,
        lambda about: about["tokenizer"]["model"]["vocab"].update({"a": 1 << 40}) or about,
        lambda about: about | {"eos": [[]]},
    ],
)
def test_a_blob_that_is_damaged_anywhere_is_refused(
    theirs: HfTokenizer, damage: Callable[[Any], Any]
) -> None:
    with pytest.raises(ModelError):
        read_tokenizer(json.dumps(damage(json.loads(theirs.blob()))).encode())


@pytest.mark.parametrize(
    "blob", [b'{"a": ' * 5000, b'{"wisp.tokenizer": ' + b"[" * 5000, b"{", b"", b"GGUF", b"\xff"]
)
def test_a_blob_that_is_no_tokenizer_at_all_is_refused(blob: bytes) -> None:
    with pytest.raises(ModelError):
        read_tokenizer(blob)


def test_ids_that_no_vocabulary_has_stand_for_nothing(theirs: HfTokenizer, tokenizer: LlamaTokenizer) -> None:
    for one in (theirs, tokenizer, PlainTokenizer(), NumberTokenizer(300, frozenset({299}))):
        assert [one.piece(i) for i in (-1, one.n_vocab, 1 << 31, 1 << 40)] == [b""] * 4
