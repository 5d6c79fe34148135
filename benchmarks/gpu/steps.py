"""Step times over rows and cached tokens, as a CUDA graph each; what the roofline and the cost model make of them.

Of the roofline, `overlap`, the two shares and the two overheads are fitted. The cost model is fitted to two thirds of
the cells; its errors are those on the rest.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.gpu.report import device_name, write
from benchmarks.gpu.transformer import SHAPES, Shape, Transformer
from wisp.core.verify.cost import Load, errors, fit
from wisp.engines.emulated import Hardware

PEAKS = {"H200": (4800.0, 989.0), "H100": (3350.0, 989.0), "A100": (2039.0, 312.0), "4090": (1008.0, 165.0)}
UNKNOWN = (100.0, 1.0)  # GB/s, TFLOPS: then the shares say nothing, and the rest does
SEQUENCES, ROWS, CACHED = (1, 8, 16, 32, 64, 128, 256, 512), (1, 5), (0, 512, 2048, 4096)
REPEATS = 15
CLOSE = 0.005  # an overlap whose error is so much larger than the least one fits nearly as well


class Cell(msgspec.Struct):
    """A step of `sequences` with `rows` new tokens and `cached` ones each; the median of its times, ms."""

    sequences: int
    rows: int
    cached: int
    ms: float

    @property
    def load(self) -> Load:
        new = self.sequences * self.rows
        total = self.cached + self.rows
        return Load(new, new * total, self.sequences * self.cached, self.sequences)


def run(names: list[str], out: Path, *, tiny: bool, limit_s: float) -> None:
    """Measure each of the shapes for at most `limit_s` seconds, and write figures and a profile of each."""
    for name in names:
        shape = SHAPES["tiny" if tiny else name]
        try:
            cells = list(_cells(shape, tiny=tiny, limit_s=limit_s))
        except torch.OutOfMemoryError as error:
            write(out, f"steps-{name}", {"skipped": f"it does not fit: {str(error).splitlines()[0]}"})
            continue
        hardware, rms = roofline(shape, cells)
        kept, left = cells[::3] + cells[1::3], cells[2::3]
        fitted = fit([c.load for c in kept], [c.ms for c in kept])
        cost = errors(fitted, [c.load for c in left], [c.ms for c in left])
        figures = {
            "shape": shape._asdict(),
            "cells": cells,
            "roofline": hardware,
            "roofline_relative_rms": round(rms, 4),
            "cost_model": cost,
        }
        write(out, f"steps-{name}", figures)
        (out / f"{name}.toml").write_text(_toml(hardware))
        print(f"{name}: overlap {hardware.overlap}, R2 {cost.r2:.4f}, MAPE {cost.mape:.1%}", flush=True)


def _cells(shape: Shape, *, tiny: bool, limit_s: float) -> Iterator[Cell]:
    cuda = torch.cuda.is_available()
    sequences = (1, 2, 4, 8) if tiny else SEQUENCES
    cached = (0, 16, 64) if tiny else CACHED
    dtype = torch.bfloat16 if cuda else torch.float32
    model = Transformer(
        shape,
        "cuda" if cuda else "cpu",
        sequences=sequences[-1],
        context=cached[-1] + max(ROWS),
        dtype=dtype,
    )
    begun = time.monotonic()
    grid = [(n, r, c) for c in cached for n in sequences for r in ROWS]
    # Far apart first, so that a limit leaves cells of all kinds.
    for at in sorted(range(len(grid)), key=lambda i: (i * 7) % len(grid)):
        if time.monotonic() - begun > limit_s:
            return
        n, r, c = grid[at]
        x = torch.zeros((n, r, shape.hidden), device=model.device, dtype=dtype)
        with torch.inference_mode():
            ms = _median_ms(functools.partial(model.step, x, c), cuda=cuda)
        yield Cell(n, r, c, round(ms, 4))


def _median_ms(step: Callable[[], Any], *, cuda: bool) -> float:
    if not cuda:
        step()
        return statistics.median(_timed(step) for _ in range(REPEATS))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(float(first.elapsed_time(last)))
    del graph
    return statistics.median(times)


def _timed(step: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    step()
    return (time.perf_counter() - begun) * 1e3


def roofline(shape: Shape, cells: list[Cell]) -> tuple[Hardware, float]:
    """The profile that is nearest to the cells' times, and the root mean square of its relative errors."""
    peaks = next((peaks for name, peaks in PEAKS.items() if name in device_name()), UNKNOWN)
    fits = []
    for overlap in np.arange(1.0, 4.01, 0.1):
        found = _shares(_hardware(shape, peaks, round(float(overlap), 1)), cells)
        fits.append((_rms(found, cells), found))
    least, best = min(fits, key=lambda fit: fit[0])
    near = [found.overlap for error, found in fits if error <= least + CLOSE]
    rounded = {name: round(getattr(best, name), 6) for name in _FITTED}
    return msgspec.structs.replace(best, **rounded, overlap_measured=(near[0], best.overlap, near[-1])), least


def _hardware(shape: Shape, peaks: tuple[float, float], overlap: float) -> Hardware:
    about = f"Measured on {device_name()}: random weights, CUDA graphs, without a host; benchmarks/gpu.sh."
    return Hardware(
        about=about,
        parameters=round(shape.parameters, 6),
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        bandwidth=peaks[0],
        tflops=peaks[1],
        kv_tokens=100_000,
        overlap=overlap,
        overlap_source="Fitted to the same steps.",
        graphs=(),
    )


_FITTED = ("bandwidth_share", "tflops_share", "launch_ms", "sequence_ms")


def _shares(hardware: Hardware, cells: list[Cell]) -> Hardware:
    """Gauss-Newton on the logarithms of the four that are fitted, for one overlap."""
    at = np.log([0.8, 0.5, 0.1, 1e-3])
    damping = 1e-2
    residual = _residuals(_with(hardware, at), cells)
    for _ in range(60):
        slope = np.stack(
            [(_residuals(_with(hardware, at + d), cells) - residual) / 1e-4 for d in 1e-4 * np.eye(4)], 1
        )
        normal = slope.T @ slope
        move = -np.linalg.solve(normal + damping * np.eye(4), slope.T @ residual)
        then = _residuals(_with(hardware, at + move), cells)
        if then @ then < residual @ residual:
            at, residual, damping = at + move, then, damping / 3
        else:
            damping *= 4
    return _with(hardware, at)


def _with(hardware: Hardware, at: Any) -> Hardware:
    values = dict(zip(_FITTED, np.exp(np.clip(at, -14, 14)).tolist(), strict=True))
    return msgspec.structs.replace(hardware, **values)


def _residuals(hardware: Hardware, cells: list[Cell]) -> Any:
    return np.log([max(1e-9, hardware.step_ms(c.load)) / c.ms for c in cells])


def _rms(hardware: Hardware, cells: list[Cell]) -> float:
    return float(np.sqrt(np.mean(_residuals(hardware, cells) ** 2)))


def _toml(hardware: Hardware) -> str:
    """As `wisp sim` and `wisp serve --engine emulated` read it."""
    lines = []
    for name, value in msgspec.structs.asdict(hardware).items():
        if name != "graphs" and value is not None:
            lines.append(f"{name} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines) + "\ngraphs = []\n"
