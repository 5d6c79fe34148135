"""A decoder with random weights in the shape of a known model, which takes the time of that model and says nothing.

Sequences are equally long, and each step feeds the same number of rows to each. Weights differ from layer to layer.
The cached keys and values of all layers are one buffer, since those of 512 sequences would not fit; it is far larger
than any cache on the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention, silu


class Shape(NamedTuple):
    """`parameters`: in all, billions, for the roofline."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @property
    def parameters(self) -> float:
        """That a step reads, in billions."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.mlp
        return (self.layers * layer + self.hidden * self.vocabulary) / 1e9


SHAPES = {
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-32b": Shape(64, 5120, 64, 8, 128, 25600, 151936),
    "tiny": Shape(2, 64, 4, 2, 16, 128, 512),
}


class Layer(NamedTuple):
    """Weights, stored as they are multiplied with."""

    qkv: torch.Tensor
    out: torch.Tensor
    up: torch.Tensor  # gate and up
    down: torch.Tensor


class Transformer:
    """`step` gives logits. `sequences` and `context` bound the KV buffer.

    rows: pad every product of matrices to so many rows, so that its kernel is the same whatever the step (0: as it is)
    """

    def __init__(
        self, shape: Shape, device: str, *, sequences: int, context: int, dtype: torch.dtype, rows: int = 0
    ) -> None:
        self.shape, self.device, self.rows = shape, device, rows
        s = shape

        def weights(*size: int) -> torch.Tensor:
            return torch.empty(size, device=device, dtype=dtype).normal_(0.0, size[0] ** -0.5)

        self.layers = [
            Layer(
                weights(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim),
                weights(s.heads * s.head_dim, s.hidden),
                weights(s.hidden, 2 * s.mlp),
                weights(s.mlp, s.hidden),
            )
            for _ in range(s.layers)
        ]
        self.head = weights(s.hidden, s.vocabulary)
        self.keys = torch.empty(
            (sequences, s.kv_heads, context, s.head_dim), device=device, dtype=dtype
        ).normal_()
        self.values = torch.empty_like(self.keys).normal_()

    def step(self, x: torch.Tensor, cached: int, *, causal: bool = False) -> torch.Tensor:
        """Logits [sequences * rows, vocabulary] of embeddings `x` [sequences, rows, hidden] behind `cached` tokens.

        causal: a row sees those before it. Times need no mask, without which every kernel of torch's may be taken.
        """
        sequences, rows, hidden = x.shape
        flat = x.reshape(-1, hidden)
        for i, layer in enumerate(self.layers):
            flat = self._layer(flat, layer, i, sequences, rows, cached, causal)
        return self._times(_normal(flat), self.head)

    def _layer(
        self,
        x: torch.Tensor,
        layer: Layer,
        index: int,
        sequences: int,
        rows: int,
        cached: int,
        causal: bool,
    ) -> torch.Tensor:
        s, end = self.shape, cached + rows
        heads = self._times(_normal(x), layer.qkv).view(sequences, rows, s.heads + 2 * s.kv_heads, s.head_dim)
        q, k, v = heads.transpose(1, 2).split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        keys, values = self.keys[:sequences], self.values[:sequences]
        if causal:  # bits are of interest: layers must not read each other's
            at = slice(index * 32, index * 32 + end)
            keys, values = keys[:, :, at], values[:, :, at]
        keys[:, :, cached:end] = k
        values[:, :, cached:end] = v
        keys, values = keys[:, :, :end], values[:, :, :end]
        if not causal:
            seen = scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        elif self.rows:  # row by row: the same kernel over the same keys
            each = [
                scaled_dot_product_attention(
                    q[:, :, i : i + 1], keys[:, :, : cached + i + 1], values[:, :, : cached + i + 1],
                    enable_gqa=True,
                )
                for i in range(rows)
            ]  # fmt: skip
            seen = torch.cat(each, dim=2)
        else:
            ahead = torch.arange(end, device=x.device) <= torch.arange(cached, end, device=x.device)[:, None]
            seen = scaled_dot_product_attention(q, keys, values, attn_mask=ahead, enable_gqa=True)
        seen = seen.transpose(1, 2).reshape(sequences * rows, -1)
        x = x + self._times(seen, layer.out)
        gate, up = self._times(_normal(x), layer.up).chunk(2, dim=1)
        return x + self._times(silu(gate) * up, layer.down)

    def _times(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        if n >= self.rows:
            return x @ weights
        return (pad(x, (0, 0, 0, self.rows - n)) @ weights)[:n]


def _normal(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, x.shape[-1:])
