"""Make the tiny pair again: `python -m tools.tiny.train --out DIR`, about a quarter of an hour on one core.

Needs `pip install torch==2.13.0 gguf==0.19.0` (the CPU build will do), which the project itself does not.
The same seed gives the same text and vocabulary anywhere, and the same weights on the same kind of machine.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import gguf
import torch

from tools.tiny.model import EPSILON, ROPE_BASE, Phase, Shape, Weights, train
from tools.tiny.text import CHAT_TEMPLATE, END, SPECIALS, STOP, documents
from tools.tiny.vocabulary import Vocabulary, gguf_tokens, learn

VOCABULARY = 512
TARGET = Shape(width=192, layers=5, heads=6, kv_heads=2, hidden=512, vocabulary=VOCABULARY)
DRAFT = Shape(width=96, layers=2, heads=3, kv_heads=1, hidden=192, vocabulary=VOCABULARY)
DOCUMENTS = 12_000  # nine million tokens, more than training looks at
PEAK = 0.008  # learning rate

TARGET_PHASES = [Phase(steps=1300, batch=8, length=256), Phase(steps=250, batch=2, length=1024)]
# Stopped early on purpose: a fully trained drafter agrees with the target nine times in ten, too often for a test.
DRAFT_PHASES = [Phase(steps=140, batch=8, length=256), Phase(steps=30, batch=2, length=1024)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more threads would change the order of sums, and so the weights

    texts = list(islice(documents(arguments.seed), DOCUMENTS))
    vocabulary = learn("".join(texts[:300]), VOCABULARY)
    data = torch.tensor([token for text in texts for token in vocabulary.encode(text)])
    print(f"{len(data)} tokens of text")
    for name, shape, phases in (("tiny-draft", DRAFT, DRAFT_PHASES), ("tiny-target", TARGET, TARGET_PHASES)):
        weights = train(shape, data, phases, PEAK, arguments.seed)
        path = arguments.out / f"{name}.gguf"
        write(path, name, shape, weights, vocabulary)
        parameters = sum(tensor.numel() for tensor in weights.values())
        print(f"{path}: {parameters} parameters, {path.stat().st_size} bytes")


def write(path: Path, name: str, shape: Shape, weights: Weights, vocabulary: Vocabulary) -> None:
    """A GGUF file of 32-bit floats. Without an output matrix, llama.cpp takes the embedding for it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_description("Trained on generated text, for tests and demos.")
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_shape(writer, shape)
    _add_vocabulary(writer, vocabulary)
    for tensor_name, tensor in weights.items():
        writer.add_tensor(tensor_name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    tokens, merges = gguf_tokens(vocabulary)
    plain = len(tokens) - len(SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * plain + [gguf.TokenType.CONTROL] * len(SPECIALS))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocabulary.special[STOP])
    writer.add_eos_token_id(vocabulary.special[END])
    writer.add_pad_token_id(vocabulary.special[STOP])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


if __name__ == "__main__":
    main()
