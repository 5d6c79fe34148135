"""The tiny pair as shipped: small, one vocabulary, text worth sampling, a drafter worth verifying."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import wisp.engines
from tools.tiny.text import CHAT_TEMPLATE, END, KINDS, SPECIALS, START, STOP, documents, turn
from tools.tiny.vocabulary import Vocabulary, gguf_tokens, learn
from wisp.core.protocol.sampling import Sampling
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.llama.reference import reference_tokens
from wisp.engines.llama.tokenizer import LlamaTokenizer

DATA = Path(wisp.engines.__file__).parent / "data"
TARGET, DRAFT = DATA / "tiny-target.gguf", DATA / "tiny-draft.gguf"
PROMPTS = [
    turn("user", "Hello") + START + "assistant\n",
    turn("user", "Explain the sky to me, please") + START + "assistant\n",
    "Once upon a time",
    "def fibonacci(n):\n",
    "Day 3: ",
]
NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY, F32 = 8, 9, 0


class Gguf(NamedTuple):
    """A file's metadata, and for each tensor its shape (innermost first) and GGML type."""

    pairs: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]


def read_gguf(path: Path) -> Gguf:
    with path.open("rb") as file:
        assert file.read(8) == b"GGUF" + struct.pack("<I", 3)
        tensors, pairs = number(file, "<Q"), number(file, "<Q")
        metadata = {value(file, STRING): value(file, number(file, "<I")) for _ in range(pairs)}
        return Gguf(metadata, dict(tensor(file) for _ in range(tensors)))


def number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]


def value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return file.read(number(file, "<Q")).decode()
    if kind == ARRAY:
        of, count = number(file, "<I"), number(file, "<Q")
        return [value(file, of) for _ in range(count)]
    return number(file, NUMBERS[kind])


def tensor(file: BinaryIO) -> tuple[str, tuple[tuple[int, ...], int]]:
    name = value(file, STRING)
    shape = tuple(number(file, "<Q") for _ in range(number(file, "<I")))
    kind, _offset = number(file, "<I"), number(file, "<Q")
    return name, (shape, kind)


@pytest.fixture(scope="module")
def target() -> Gguf:
    return read_gguf(TARGET)


@pytest.fixture(scope="module")
def draft() -> Gguf:
    return read_gguf(DRAFT)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """As the training script learns it."""
    return learn("".join(islice(documents(0), 300)), 512)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[LlamaTokenizer]:
    tokenizer = LlamaTokenizer.open(TARGET)
    yield tokenizer
    tokenizer.close()


def parameters(model: Gguf) -> int:
    total = 0
    for shape, _ in model.tensors.values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def test_the_pair_is_small(target: Gguf, draft: Gguf) -> None:
    assert TARGET.stat().st_size + DRAFT.stat().st_size < 9_800_000
    assert 1_900_000 < parameters(target) < 2_200_000
    assert 8 < parameters(target) / parameters(draft) < 12


@pytest.mark.parametrize("path", [TARGET, DRAFT], ids=["target", "draft"])
def test_a_model_is_a_float_llama_of_1024_tokens(path: Path) -> None:
    model = read_gguf(path)
    assert model.pairs["general.architecture"] == "llama"
    assert model.pairs["llama.context_length"] == 1024
    assert model.pairs["llama.attention.key_length"] in (32, 64)
    assert {kind for _, kind in model.tensors.values()} == {F32}
    assert model.pairs["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_both_have_the_vocabulary_that_the_script_learns(
    target: Gguf, draft: Gguf, vocabulary: Vocabulary
) -> None:
    def of(model: Gguf) -> dict[str, Any]:
        return {key: value for key, value in model.pairs.items() if key.startswith("tokenizer.")}

    assert of(target) == of(draft)
    tokens, merges = gguf_tokens(vocabulary)
    assert of(target)["tokenizer.ggml.tokens"] == tokens
    assert of(target)["tokenizer.ggml.merges"] == merges


def test_special_tokens_end_generations_and_none_is_put_first(
    tokenizer: LlamaTokenizer, vocabulary: Vocabulary
) -> None:
    assert tokenizer.n_vocab == len(vocabulary) == 512
    assert tokenizer.eos_token == END
    assert tokenizer.eos == {vocabulary.special[END], vocabulary.special[STOP]}
    assert tokenizer.encode("".join(SPECIALS), add_bos=True, parse_special=True) == [509, 510, 511]


def test_training_and_llama_cpp_cut_text_alike(tokenizer: LlamaTokenizer, vocabulary: Vocabulary) -> None:
    odd = "It's 12,5 % of naïve_x — 漢字 🙂\t\tтекст  \n\n  end \r\n²½ ok  "
    pieces = [*vocabulary.pieces, *(special.encode() for special in SPECIALS)]
    for text in [odd, *islice(documents(77), 60)]:
        ids = vocabulary.encode(text)
        assert tokenizer.encode(text, add_bos=False, parse_special=True) == ids
        assert b"".join(pieces[i] for i in ids) == text.encode()


def test_the_generator_is_a_function_of_its_seed() -> None:
    first, again, other = (list(islice(documents(seed), 40)) for seed in (5, 5, 6))
    assert first == again
    assert not set(first) & set(other)
    assert all(text.endswith(STOP) and text.count(STOP) == 1 for text in first)
    assert any(text.startswith(START) for text in first)
    assert len(KINDS) == 6


@pytest.mark.parametrize(
    "options", [{}, {"trim_blocks": True, "lstrip_blocks": True}], ids=["plain", "trimmed"]
)
def test_the_chat_template_writes_what_the_models_were_trained_on(options: dict[str, bool]) -> None:
    template = ImmutableSandboxedEnvironment(**options).from_string(CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "Be calm.\n"}, {"role": "user", "content": " Hi"}]
    chat = turn("system", "Be calm.\n") + turn("user", " Hi")
    assert template.render(messages=messages) == chat
    assert template.render(messages=messages, add_generation_prompt=True) == f"{chat}{START}assistant\n"


def test_the_chat_template_renders_tools_calls_and_parts() -> None:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky"}}]},
        {"role": "tool", "content": "rain"},
    ]
    text = template.render(messages=messages, tools=[{"function": {"name": "sky"}}])
    assert text == (
        turn("system", 'Tools:\n{"function": {"name": "sky"}}\n')
        + turn("user", "Weather?")
        + turn("assistant", '{"name": "sky"}')
        + turn("tool", "rain")
    )


def generate(vocabulary: Vocabulary, prompt: str, sampling: Sampling, count: int) -> list[int]:
    return reference_tokens(TARGET, vocabulary.encode(prompt), sampling, count)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt[-12:]))
def test_greedy_text_is_long_and_varied(vocabulary: Vocabulary, prompt: str) -> None:
    tokens = generate(vocabulary, prompt, Sampling(), 250)
    assert not {vocabulary.special[END], vocabulary.special[STOP]} & set(tokens)
    runs = [tuple(tokens[i : i + 12]) for i in range(len(tokens) - 12)]
    assert len(set(runs)) > 0.5 * len(runs)


@pytest.mark.parametrize("question", ["What is 12 + 7?", "Briefly: Hi"])
def test_a_short_answer_ends(vocabulary: Vocabulary, question: str) -> None:
    prompt = turn("user", question) + START + "assistant\n"
    assert vocabulary.special[END] in generate(vocabulary, prompt, Sampling(), 60)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_drafter_agrees_often_but_not_always(vocabulary: Vocabulary, temperature: float) -> None:
    drafter, agreed, total = LlamaDraft(DRAFT, slots=1, threads=1), 0, 0
    for seed, prompt in enumerate(PROMPTS):
        sampling = Sampling(temperature=temperature, seed=seed)
        ids, tokens = vocabulary.encode(prompt), generate(vocabulary, prompt, sampling, 100)
        for position, token in enumerate(tokens):
            proposal = drafter.propose(str(seed), ids + tokens[:position], position, sampling)
            agreed += proposal is not None and proposal.token == token
        total += len(tokens)
    drafter.close()
    assert 0.5 < agreed / total < 0.9


def test_sampling_has_something_to_sample(vocabulary: Vocabulary) -> None:
    """Another seed gives another text within a few tokens."""
    texts = {
        tuple(generate(vocabulary, PROMPTS[1], Sampling(temperature=1.0, seed=seed), 12)) for seed in range(8)
    }
    assert len(texts) >= 6
