"""The same rows fed one a step and several a step: which logits keep their bits, and how far the others move.

With the library's own kernels, and with products of matrices padded to a fixed number of rows and attention row by row
("fixed"), which is what an exact mode on a GPU would have to do at least.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from benchmarks.gpu.report import write
from benchmarks.gpu.transformer import SHAPES, Transformer

MOST, CROWD, CACHED = 8, 64, 300  # draft tokens; sequences beside; tokens before
PADDED = 1024  # rows


class Found(msgspec.Struct):
    """Of `rows` rows in one step: are all logits those of single rows, bit for bit? `gap`: their largest difference;
    `flips`: rows whose likeliest id is another."""

    kernels: str
    sequences: int
    rows: int
    equal: bool
    gap: float
    flips: int


def run(name: str, out: Path, *, tiny: bool) -> None:
    """Figures of the first layers of a shape (more of them only repeat the first)."""
    with torch.inference_mode():
        found = _found(name, tiny=tiny)
    write(out, "bits", found)
    for kernels in ("default", "fixed"):
        some = [f for f in found if f.kernels == kernels]
        print(f"{kernels}: {sum(f.equal for f in some)} of {len(some)} steps keep every bit", flush=True)


def _found(name: str, *, tiny: bool) -> list[Found]:
    cuda = torch.cuda.is_available()
    shape = SHAPES["tiny" if tiny else name]._replace(layers=2)
    crowd, cached = (4, 12) if tiny else (CROWD, CACHED)
    found: list[Found] = []
    for kernels, rows in (("default", 0), ("fixed", (crowd * (MOST + 1)) if tiny else PADDED)):
        torch.manual_seed(1)
        model = Transformer(
            shape,
            "cuda" if cuda else "cpu",
            sequences=crowd,
            context=cached + MOST + 1 + 32 * shape.layers,
            dtype=torch.bfloat16 if cuda else torch.float32,
            rows=rows,
        )
        x = torch.randn((crowd, MOST + 1, shape.hidden), device=model.device).to(model.head.dtype)
        alone = torch.cat([model.step(x[:1, i : i + 1], cached + i, causal=True) for i in range(MOST + 1)])
        for sequences in (1, crowd):
            for n in range(1, MOST + 2):
                logits = model.step(x[:sequences, :n], cached, causal=True)[:n]
                flips = int((logits.argmax(1) != alone[:n].argmax(1)).sum())
                gap = float((logits.float() - alone[:n].float()).abs().max())
                found.append(Found(kernels, sequences, n, torch.equal(logits, alone[:n]), gap, flips))
        del model
    return found
