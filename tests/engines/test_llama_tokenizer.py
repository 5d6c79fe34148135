"""Text to ids and back, and the blob that carries a tokenizer to an edge."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from wisp.core.errors import ModelError
from wisp.engines.llama import gguf
from wisp.engines.llama.tokenizer import LlamaTokenizer

TEXTS = [
    "",
    "plain words, and a number 1234567890.",
    "  leading, trailing and   inner spaces  ",
    "def f(x):\n\treturn x  # tab\r\n",
    "a\0b",
    "héllo wörld, 漢字, русский",
    "😀 👨‍👩‍👧 🇺🇳 \U0010ffff",
    "it's we'll THEY'RE",
    *(chr(i) for i in range(0x80)),
]
LONG = [
    "a" * 30_000,
    " " * 30_000,
    "\n" * 20_000,
    "1" * 20_000,
    "ab " * 20_000,
    "漢字" * 10_000,
    "😀" * 5_000,
]


def encode(tokenizer: LlamaTokenizer, text: str, special: bool = False) -> list[int]:
    return tokenizer.encode(text, add_bos=False, parse_special=special)


def written(tokenizer: LlamaTokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.piece, ids))


@pytest.mark.parametrize("text", TEXTS + LONG, ids=lambda text: ascii(text[:12]))
def test_pieces_join_to_the_text(tokenizer: LlamaTokenizer, text: str) -> None:
    assert written(tokenizer, encode(tokenizer, text)) == text.encode()


def test_every_byte_has_a_token(tokenizer: LlamaTokenizer) -> None:
    """So any text can be written, in whatever encoding of it the model comes up with."""
    pieces = {tokenizer.piece(token) for token in range(tokenizer.n_vocab)}
    used_in_utf8 = set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert {bytes([byte]) for byte in used_in_utf8} <= pieces


def test_lone_surrogates_become_question_marks(tokenizer: LlamaTokenizer) -> None:
    assert written(tokenizer, encode(tokenizer, "a\ud83db")) == b"a?b"


def test_control_tokens_are_read_on_request_and_never_shown(tokenizer: LlamaTokenizer) -> None:
    text = f"one{tokenizer.eos_token}two"
    ids = encode(tokenizer, text, special=True)
    assert tokenizer.eos & set(ids)
    assert written(tokenizer, ids) == b"onetwo"
    assert not tokenizer.eos & set(encode(tokenizer, text))
    assert written(tokenizer, encode(tokenizer, text)) == text.encode()


def test_ids_out_of_range_have_no_bytes(tokenizer: LlamaTokenizer) -> None:
    assert tokenizer.piece(-1) == tokenizer.piece(tokenizer.n_vocab) == b""


def test_bos_is_added_at_most_once_and_only_on_request(tokenizer: LlamaTokenizer) -> None:
    plain = tokenizer.encode("text", add_bos=False, parse_special=True)
    with_bos = tokenizer.encode("text", add_bos=True, parse_special=True)
    assert with_bos[-len(plain) :] == plain
    assert len(with_bos) - len(plain) <= 1


def test_a_blob_makes_the_same_tokenizer(tokenizer: LlamaTokenizer, tiny_target: Path) -> None:
    blob = tokenizer.blob()
    assert len(blob) < tiny_target.stat().st_size
    copy = LlamaTokenizer.from_blob(blob)
    assert copy.fingerprint == tokenizer.fingerprint
    assert len(copy.fingerprint) == 64
    assert (copy.eos, copy.n_vocab, copy.chat_template) == (
        tokenizer.eos,
        tokenizer.n_vocab,
        tokenizer.chat_template,
    )
    assert (copy.bos_token, copy.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    for text in TEXTS + LONG:
        assert encode(copy, text) == encode(tokenizer, text)
    assert copy.blob() == blob
    copy.close()


def test_target_and_draft_of_the_shipped_pair_share_their_vocabulary(
    tokenizer: LlamaTokenizer, tiny_draft: Path
) -> None:
    draft = LlamaTokenizer.open(tiny_draft)
    assert draft.fingerprint == tokenizer.fingerprint
    draft.close()


@pytest.mark.parametrize("size", [0, 3, 24, 100, 2000])
def test_a_blob_cut_short_is_refused(tokenizer: LlamaTokenizer, size: int) -> None:
    with pytest.raises(ModelError):
        LlamaTokenizer.from_blob(tokenizer.blob()[:size])


def test_a_blob_with_tensors_or_absurd_lengths_is_refused(tokenizer: LlamaTokenizer) -> None:
    blob = bytearray(tokenizer.blob())
    with pytest.raises(ModelError, match="tensors"):
        gguf.check_blob(bytes(blob[:8] + struct.pack("<Q", 1) + blob[16:]))
    with pytest.raises(ModelError, match="damaged"):
        gguf.check_blob(bytes(blob[:24] + struct.pack("<Q", 1 << 62) + blob[32:]))
    with pytest.raises(ModelError, match="not a GGUF"):
        gguf.check_blob(b"GGML" + bytes(blob[4:]))
    with pytest.raises(ModelError):
        LlamaTokenizer.from_blob(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))


def test_arrays_of_arrays_are_refused_at_any_depth(tokenizer: LlamaTokenizer) -> None:
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    pair = struct.pack("<Q", 1) + b"x" + nested
    with pytest.raises(ModelError, match="array of unknown type 9"):
        gguf.check_blob(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + pair)


def test_a_vocabulary_with_a_token_twice_is_refused_before_it_ends_the_process(
    tokenizer: LlamaTokenizer,
) -> None:
    blob = tokenizer.blob()
    at = blob.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 16
    first, second = (struct.pack("<Q", 2) + c.encode() for c in "\u0100\u0101")
    assert blob[at:].startswith(first + second)
    with pytest.raises(ModelError, match="a token twice"):
        LlamaTokenizer.from_blob(blob[:at] + first + first + blob[at + len(first + second) :])
    number = blob.replace(b"tokenizer.ggml.tokens\t", b"tokenizer.ggml.tokens\x04")
    with pytest.raises(ModelError, match="no list of texts"):
        gguf.check_blob(number)
