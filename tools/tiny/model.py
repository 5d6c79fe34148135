"""A llama-architecture language model in plain torch functions, and its training on one CPU thread.

A model is a dict of tensors under their GGUF names: what is trained is what is written. Rotary embeddings turn
neighbouring pairs (2i, 2i + 1), as llama.cpp does for this architecture, so no weight needs permuting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as fn

Tensor = Any  # torch is no dependency of the project, so its types are unknown to it
Weights = dict[str, Tensor]

ROPE_BASE = 10000.0
EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `width` is the residual stream's, `hidden` the feed-forward layer's."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    head: int = 32
    context: int = 1024


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` batches of `batch` windows of `length` tokens."""

    steps: int
    batch: int
    length: int


def initial(shape: Shape, seed: int) -> Weights:
    """Random weights; matrices are [out, in]. The output layer is the embedding, transposed."""
    rng = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=rng) * (scale / math.sqrt(columns))

    query, cache = shape.heads * shape.head, shape.kv_heads * shape.head
    weights = {"token_embd.weight": torch.randn(shape.vocabulary, shape.width, generator=rng) * 0.02}
    shrink = 1.0 / math.sqrt(2 * shape.layers)  # keeps the residual stream's size independent of depth
    for i in range(shape.layers):
        weights |= {
            f"blk.{i}.attn_norm.weight": torch.ones(shape.width),
            f"blk.{i}.attn_q.weight": matrix(query, shape.width),
            f"blk.{i}.attn_k.weight": matrix(cache, shape.width),
            f"blk.{i}.attn_v.weight": matrix(cache, shape.width),
            f"blk.{i}.attn_output.weight": matrix(shape.width, query, shrink),
            f"blk.{i}.ffn_norm.weight": torch.ones(shape.width),
            f"blk.{i}.ffn_gate.weight": matrix(shape.hidden, shape.width),
            f"blk.{i}.ffn_up.weight": matrix(shape.hidden, shape.width),
            f"blk.{i}.ffn_down.weight": matrix(shape.width, shape.hidden, shrink),
        }
    return weights | {"output_norm.weight": torch.ones(shape.width)}


def forward(weights: Weights, shape: Shape, tokens: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] after each of `tokens` [batch, length]."""
    x = weights["token_embd.weight"][tokens]
    turns = _turns(tokens.shape[1], shape.head)
    for i in range(shape.layers):
        layer = {name: weights[f"blk.{i}.{name}.weight"] for name in _LAYER}
        x = x + _attention(layer, shape, _norm(x, layer["attn_norm"]), turns)
        h = _norm(x, layer["ffn_norm"])
        h = fn.silu(fn.linear(h, layer["ffn_gate"])) * fn.linear(h, layer["ffn_up"])
        x = x + fn.linear(h, layer["ffn_down"])
    return fn.linear(_norm(x, weights["output_norm.weight"]), weights["token_embd.weight"])


_LAYER = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return fn.rms_norm(x.float(), (x.shape[-1],), gain, EPSILON)


def _turns(length: int, head: int) -> tuple[Tensor, Tensor]:
    """(cosines, sines) [length, head / 2] of the rotary angles."""
    rates = ROPE_BASE ** (-torch.arange(0, head, 2) / head)
    angles = torch.outer(torch.arange(length).float(), rates)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turns
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rotated.flatten(-2).to(x.dtype)


def _attention(layer: Weights, shape: Shape, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    batch, length, _ = x.shape

    def split(name: str, heads: int) -> Tensor:
        return fn.linear(x, layer[name]).view(batch, length, heads, shape.head).transpose(1, 2)

    groups = shape.heads // shape.kv_heads
    q = _rotate(split("attn_q", shape.heads), turns)
    k = _rotate(split("attn_k", shape.kv_heads), turns).repeat_interleave(groups, 1)
    v = split("attn_v", shape.kv_heads).repeat_interleave(groups, 1)
    mixed = fn.scaled_dot_product_attention(q, k, v, is_causal=True)
    return fn.linear(mixed.transpose(1, 2).reshape(batch, length, -1), layer["attn_output"])


def train(shape: Shape, data: Tensor, phases: list[Phase], peak: float, seed: int) -> Weights:
    """Weights after `phases` over random windows of `data` [tokens]; `peak` is the highest learning rate."""
    weights = initial(shape, seed)
    for tensor in weights.values():
        tensor.requires_grad_(True)
    optimisers = _optimisers(weights, peak)
    steps, started = sum(phase.steps for phase in phases), time.monotonic()
    for step, batch in enumerate(_batches(data, phases, seed)):
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = peak * _schedule(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(weights, shape, batch[:, :-1])
        loss = fn.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"  step {step:5d}/{steps}  loss {loss.item():.4f}  {seconds:6.1f} s", flush=True)
    return {name: tensor.detach() for name, tensor in weights.items()}


def _optimisers(weights: Weights, peak: float) -> list[Any]:
    """Muon (Jordan 2024) for the layers' matrices; Adam, which alone took many times the steps, for the rest."""
    matrices = [w for name, w in weights.items() if name.startswith("blk.") and w.ndim == 2]
    others = [w for name, w in weights.items() if not (name.startswith("blk.") and w.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(others, lr=peak, betas=(0.9, 0.98)),
    ]


def _batches(data: Tensor, phases: list[Phase], seed: int) -> Iterator[Tensor]:
    """Windows [batch, length + 1] from random places."""
    rng = torch.Generator().manual_seed(seed)
    for phase in phases:
        for _ in range(phase.steps):
            starts = torch.randint(len(data) - phase.length, (phase.batch, 1), generator=rng)
            yield data[starts + torch.arange(phase.length + 1)]


def _schedule(step: int, steps: int) -> float:
    """Warm up over 2 % of the steps, hold, then fall linearly to 2 % over the last half."""
    return min((step + 1) / (0.02 * steps + 1), 1.0, max(0.02, 2.0 * (1.0 - step / steps)))
