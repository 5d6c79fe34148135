"""Special tokens in a text: llama.cpp's and Hugging Face's ids, at a cost that is linear in the text."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wisp.engines
from hf_files import metadata, tokenizer_files
from wisp.engines.huggingface import HfTokenizer
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.special import Special, SpecialTokens

TINY = Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf"

# Kinds of token (GGUF): 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte
MARKERS = {
    "<s>": 3,
    "</s>": 3,
    "<|im_start|>": 3,
    "<|im_end|>": 3,
    "<|im": 3,
    "<think>": 4,
    "</think>": 4,
    "\n\n": 4,
}
MARKERS |= {"\n\n\n": 4, "[INST]": 3}
PARTS = [
    *MARKERS,
    "<unk>",
    "<|",
    "|>",
    "im_",
    "<",
    ">",
    " ",
    "  ",
    "\n",
    "a",
    "hello",
    "é",
    "漢",
    "end|>",
    "[",
    "INST]",
]
texts = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


def gguf_file(path: Path, pairs: dict[str, Any]) -> Path:
    """A model file of metadata alone."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(v: Any) -> bytes:
        if isinstance(v, bool):
            return struct.pack("<I?", 7, v)
        if isinstance(v, int):
            return struct.pack("<II", 4, v)
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        kind = 8 if isinstance(v[0], str) else 6 if isinstance(v[0], float) else 5
        item = string if kind == 8 else struct.Struct("<f" if kind == 6 else "<i").pack
        return struct.pack("<IIQ", 9, kind, len(v)) + b"".join(map(item, v))

    body = b"".join(string(name) + value(v) for name, v in pairs.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + body + b"\0" * 64)
    return path


def sentence_piece(path: Path, **more: Any) -> Path:
    """A vocabulary of SentencePiece's kind, which puts a space before text that follows a special token."""
    words = [
        "hello",
        "\u2581hello",
        "\u2581",
        "\u2581a",
        "a",
        "<",
        ">",
        "|",
        "im",
        "_",
        "end",
        "\u2581\u2581",
        "he",
        "llo",
    ]
    tokens = ["<unk>", *MARKERS, *words, *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, *MARKERS.values(), *[1] * len(words), *[6] * 256]
    about = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return gguf_file(path, about | more)


def byte_level(path: Path) -> Path:
    """The tiny vocabulary, with markers of all kinds in the place of its last words."""
    about = {k: v for k, v in metadata(TINY).items() if k.startswith("tokenizer.ggml")}
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    extra = {text: kind for text, kind in MARKERS.items() if text not in tokens}
    about["tokenizer.ggml.tokens"] = [*tokens, *extra]
    about["tokenizer.ggml.token_type"] = [*kinds, *extra.values()]
    return gguf_file(path, {"general.architecture": "llama"} | about)


@pytest.fixture(scope="module", params=["sentence piece", "sentence piece, no space", "byte level"])
def various(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaTokenizer:
    path = tmp_path_factory.mktemp("gguf") / "vocabulary.gguf"
    if request.param == "byte level":
        return LlamaTokenizer.open(byte_level(path))
    more = {"tokenizer.ggml.add_space_prefix": False} if "no space" in request.param else {}
    return LlamaTokenizer.open(sentence_piece(path, **more))


def llama(tokenizer: LlamaTokenizer, text: str, special: bool) -> list[int]:
    """What llama.cpp itself says."""
    api, data = tokenizer._api, text.encode()
    out = api.ffi.new("int32_t[]", len(data) + 64)
    n = api.lib.llama_tokenize(tokenizer._model.vocab, data, len(data), out, len(data) + 64, False, special)
    return api.ffi.unpack(out, n) if n else []


def test_ids_are_llama_cpps(various: LlamaTokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(texts, st.booleans())
    def same(text: str, special: bool) -> None:
        if text:
            ours = various.encode(text, add_bos=False, parse_special=special)
            assert ours == llama(various, text, special)

    same()


def test_stand_ins_that_nothing_has_change_nothing_and_those_in_a_marker_make_it_text(
    various: LlamaTokenizer,
) -> None:
    @settings(max_examples=100, deadline=None)
    @given(texts)
    def same(text: str) -> None:
        plain = various.encode(text, add_bos=False, parse_special=True)
        assert various.encode(text, add_bos=False, parse_special=True, stand_ins={0x2800: "<"}) == plain
        veiled = text.translate({ord("<"): "\u2800", ord("["): "\u2801"})
        stand_ins = {0x2800: "<", 0x2801: "["}
        ids = various.encode(veiled, add_bos=False, parse_special=True, stand_ins=stand_ins)
        assert ids == various.encode(text, add_bos=False, parse_special=False)

    same()


def test_a_text_of_markers_is_gone_over_once(various: LlamaTokenizer) -> None:
    """llama.cpp's part is to be given the text between markers, each piece once, and nothing else."""
    given_: list[bytes] = []
    original = various._tokenize

    def tokenize(data: bytes) -> list[int]:
        given_.append(data)
        return original(data)

    various._tokenize = tokenize  # type: ignore[method-assign]
    try:
        ids = various.encode("<|im_start|>" * 50_000 + "<think>a" * 10, add_bos=False, parse_special=True)
    finally:
        various._tokenize = original  # type: ignore[method-assign]
    assert len(ids) >= 50_020
    assert given_ == [b"a"] * 10


def test_a_bos_that_the_text_begins_with_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.open(
        sentence_piece(tmp_path / "v.gguf", **{"tokenizer.ggml.add_bos_token": True})
    )
    hi = tokenizer.encode("a", add_bos=True, parse_special=True)
    assert hi[0] == 1
    assert tokenizer.encode("<s>a", add_bos=True, parse_special=True) == hi
    assert tokenizer.encode("<s>a", add_bos=True, parse_special=False)[0] == 1


def test_work_can_be_given_up_between_markers(various: LlamaTokenizer) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        various.encode("<s>a" * 1000, add_bos=False, parse_special=True, check=check)


def test_no_text_has_fewer_tokens_than_its_size_says(various: LlamaTokenizer) -> None:
    @settings(max_examples=100, deadline=None)
    @given(texts)
    def holds(text: str) -> None:
        assert various.fewest(text) <= len(various.encode(text, add_bos=False, parse_special=True))

    holds()
    longest = max(various.controls, key=len)
    assert various.fewest(longest * 1000) == 1000


def test_white_space_beside_a_marker_that_takes_it_is_gone() -> None:
    tokens = SpecialTokens(
        [Special(1, "<l>", True, lstrip=True), Special(2, "<r>", True, rstrip=True), Special(3, "<u>", False)]
    )
    assert list(tokens.split("a <l> b <r> \n c <u> ", control=True)) == ["a", 1, " b ", 2, "c ", 3, " "]
    assert list(tokens.split(" <l> <r> <u>", control=False)) == [" <l> <r> ", 3]
    assert list(tokens.split("<r>  ", control=True)) == [2]
    assert list(tokens.split("", control=True)) == []
    assert list(SpecialTokens([]).split("<l>", control=True)) == ["<l>"]


def test_the_longest_marker_at_a_place_is_taken() -> None:
    names = ["<", "<a", "<ab>", "<abc>", "\n", "\n\n", "\n\n\n"]
    tokens = SpecialTokens(Special(i, text, True) for i, text in enumerate(names))
    assert list(tokens.split("<ab<abc><ax\n\n\n\n\n", control=True)) == [1, "b", 3, 1, "x", 6, 5]


# --- Hugging Face's


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[HfTokenizer, LlamaTokenizer]:
    """The same vocabulary in both formats."""
    folder = tmp_path_factory.mktemp("pair")
    path = byte_level(folder / "vocabulary.gguf")
    about = metadata(TINY)
    tokenizer_files(path, folder, about={"tokenizer.chat_template": about["tokenizer.chat_template"]})
    ours = LlamaTokenizer.open(path)
    return HfTokenizer.open(folder, ours.n_vocab), ours


def test_both_routes_give_the_same_ids(pair: tuple[HfTokenizer, LlamaTokenizer]) -> None:
    theirs, ours = pair
    assert theirs.fingerprint == ours.fingerprint
    assert theirs.controls == ours.controls

    @settings(max_examples=150, deadline=None)
    @given(texts, st.booleans(), st.sampled_from([{}, {0x2800: "<"}, {0x2800: "<", 0x2801: "["}]))
    def same(text: str, special: bool, stand_ins: dict[int, str]) -> None:
        for stand_in, char in stand_ins.items():
            text = text.replace(char + "|im_end", chr(stand_in) + "|im_end").replace(
                "[INST", chr(stand_in) + "INST"
            )
        how: dict[str, Any] = {"add_bos": True, "parse_special": special, "stand_ins": stand_ins}
        assert theirs.encode(text, **how) == ours.encode(text, **how)
        assert theirs.fewest(text) == ours.fewest(text)

    same()


def metaspace(scheme: str, **more: Any) -> HfTokenizer:
    words = ["<unk>", "<s>", "</s>", "\u2581a", "a", "\u2581", "b", *(f"<0x{i:02X}>" for i in range(256))]
    added = [
        {"id": i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False}
        | {"rstrip": False}
        for i, t in enumerate(words[:3])
    ]
    definition = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme,
            "split": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(words)}, "merges": [["\u2581", "a"]]}
        | {"byte_fallback": True, "unk_token": "<unk>"},
    } | more
    about = {"format": "wisp-tokenizer-1", "tokenizer": definition, "n_vocab": len(words), "eos": [2]}
    about |= {"bos_token": "<s>", "eos_token": "</s>", "chat_template": None}
    return HfTokenizer(json.dumps(about).encode())


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_pieces_of_a_text_get_the_space_that_the_whole_would_give_them(scheme: str) -> None:
    tokenizer = metaspace(scheme)
    for text in ("a<s>a b</s> a", "<s>a", "a", "<s>", ""):
        plain = tokenizer.encode(text, add_bos=False, parse_special=True)
        guarded = tokenizer.encode(text, add_bos=False, parse_special=True, stand_ins={0x2800: "<"})
        assert guarded == plain, text


def test_a_vocabulary_that_may_leave_text_out_has_no_bound() -> None:
    assert metaspace("always").fewest("a" * 4000) == 800  # "<unk>" is the longest
    assert metaspace("always", normalizer={"type": "NFKC"}).fewest("a" * 4000) == 200
    for normalizer in ({"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "StripAccents"}):
        assert metaspace("always", normalizer=normalizer).fewest("a" * 4000) == 0
