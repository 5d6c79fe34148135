"""`python -m benchmarks overlap`: how far memory and arithmetic overlap in a step, from public measurements.

The roofline of `engines.emulated` has a step take (memory^p + compute^p)^(1/p) + launch. LMDeploy has published the
median time of a token for static batches on A100s, which is the time of a step: for one model, many batches and
contexts. For each p the share of the bandwidth and the launch that fit best are found, with the share of the arithmetic
given: 0.5, as in our profiles, or what the same page's prefill of 2,048 tokens reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from wisp.core.verify.cost import Load
from wisp.engines.emulated import hardware
from wisp.outputs import writable

SOURCE = "https://github.com/InternLM/lmdeploy/blob/3e391df4673326f79363eebe030876861a9b7090/docs/en/benchmark/a100_fp16.md"
BANDWIDTH, ARITHMETIC = 2039e9, 312e12  # of one A100-80GB: bytes and dense fp16 operations per second
PS = (*(1.0 + 0.05 * i for i in range(61)), math.inf)
CLOSE = 0.005  # errors so much larger than the least one still count as a fit
OUR_SHARE = 0.5
PROMPT = 2048  # tokens of the prompt whose prefill was timed


class Run(NamedTuple):
    """A static batch: sequences, tokens of prompt and output, and the median milliseconds of a token."""

    batch: int
    prompt: int
    output: int
    ms: float


class Published(NamedTuple):
    """A model: billions of parameters, KV bytes of a token, GPUs, ms of the prefill, runs that fitted into memory.

    With one sequence, ms is from the throughput; otherwise it is the published median, in whole milliseconds.
    """

    name: str
    billions: float
    kv_bytes: int
    gpus: int
    prefill_ms: float
    runs: tuple[Run, ...]


def _runs(lengths: tuple[tuple[int, int], ...], ms: dict[int, tuple[float, ...]]) -> tuple[Run, ...]:
    return tuple(
        Run(b, *length, t) for b, times in ms.items() for length, t in zip(lengths, times, strict=False)
    )


LENGTHS = ((1, 128), (128, 128), (128, 2048), (2048, 128), (2048, 2048))
SINGLE = ((1, 128), (128, 2048))
PUBLISHED = (
    Published("Llama-2-7B", 6.74, 524_288, 1, 139.0, (
        *_runs(SINGLE, {1: (10.0, 10.11)}),
        *_runs(LENGTHS, {16: (10, 11, 15, 20, 25), 32: (11, 12, 21, 31, 40), 64: (12, 14, 30)}),
    )),
    Published("Llama-2-13B", 13.0, 819_200, 1, 242.0, (
        *_runs(SINGLE, {1: (17.39, 18.09)}),
        *_runs(LENGTHS, {16: (18, 19, 26, 33, 40), 32: (19, 21, 34), 64: (20, 24)}),
    )),
    Published("InternLM-20B", 20.0, 1_228_800, 2, 217.0, (
        *_runs(SINGLE, {1: (16.36, 17.16)}),
        *_runs(LENGTHS, {16: (17, 18, 24, 29, 35), 32: (19, 20, 31, 42), 64: (21, 24)}),
    )),
    Published("Llama-2-70B", 69.0, 327_680, 4, 402.0, (
        *_runs(SINGLE, {1: (29.46, 30.88)}),
        *_runs(LENGTHS, {16: (30, 30, 33, 35, 36), 32: (32, 32, 36, 40, 43), 64: (37, 37, 43, 50, 55)}),
    )),
)  # fmt: skip


class Fit(NamedTuple):
    """error: root mean square of relative errors. bandwidth: share."""

    p: float
    error: float
    bandwidth: float
    launch_ms: float


def prefill_share(m: Published) -> float:
    """Share of the arithmetic that a prefill reaches, attention left out."""
    return 2 * m.billions * 1e9 * PROMPT / (m.prefill_ms / 1e3) / (ARITHMETIC * m.gpus)


def fit(m: Published, p: float, share: float) -> Fit:
    """The best bandwidth share and launch for this p."""
    return min(_fits(m, p, share), key=lambda f: f.error)


def _fits(m: Published, p: float, share: float) -> Iterator[Fit]:
    for percent in range(50, 100):
        bandwidth = percent / 100
        times = [(_roofline_ms(m, r, p, share, bandwidth), r.ms) for r in m.runs]
        weights = sum(1 / ms**2 for _, ms in times)
        launch = max(0.0, sum((ms - t) / ms**2 for t, ms in times) / weights)
        error = math.sqrt(sum(((t + launch - ms) / ms) ** 2 for t, ms in times) / len(times))
        yield Fit(p, error, bandwidth, launch)


def _roofline_ms(m: Published, r: Run, p: float, share: float, bandwidth: float) -> float:
    moved = m.billions * 2e9 + r.batch * (r.prompt + r.output / 2) * m.kv_bytes
    memory = moved / (BANDWIDTH * m.gpus * bandwidth) * 1e3
    compute = 2 * m.billions * 1e9 * r.batch / (ARITHMETIC * m.gpus * share) * 1e3
    high, low = max(memory, compute), min(memory, compute)
    return high if p == math.inf else high * (1 + (low / high) ** p) ** (1 / p)


class Found(msgspec.Struct):
    """Of one model under one assumption. low, high: of the p that fit nearly as well (inf: None)."""

    model: str
    gpus: int
    share: float
    p: float
    low: float
    high: float | None
    error: float
    error_at_1_3: float
    bandwidth: float
    launch_ms: float


def found(m: Published, share: float) -> Found:
    """The best p, and those close to it."""
    fits = [fit(m, p, share) for p in PS]
    best = min(fits, key=lambda f: f.error)
    close = [f.p for f in fits if f.error <= best.error + CLOSE]
    high = None if close[-1] == math.inf else round(close[-1], 2)
    old = fit(m, 1.3, share).error
    return Found(
        m.name, m.gpus, round(share, 2), round(best.p, 2), round(close[0], 2), high, best.error, old, best.bandwidth,
        best.launch_ms,
    )  # fmt: skip


def run_bench_overlap(out: Path | None) -> None:
    """Fit, and print or write the page. Raises ConfigError."""
    if out is not None:
        writable(out)
    page = "\n".join(_page())
    if out is not None:
        out.write_text(page + "\n")
    else:
        print(page)


def _page() -> Iterator[str]:
    yield "| model | GPUs | share of arithmetic | p | p nearly as good | error | error at 1.3 | bandwidth | launch ms |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for m in PUBLISHED:
        for share in (OUR_SHARE, prefill_share(m)):
            f = found(m, share)
            span = f"{f.low:g} to {f.high:g}" if f.high is not None else f"{f.low:g} and more"
            yield (
                f"| {f.model} | {f.gpus} | {f.share:.2f} | {f.p:g} | {span} | {f.error:.1%} | {f.error_at_1_3:.1%} "
                f"| {f.bandwidth:.2f} | {f.launch_ms:.1f} |"
            )
    yield ""
    yield "| profile | decode of | p = 1.3 | p = 2 | p = 3 |"
    yield "|---|---|---|---|---|"
    for name, context in (("a100-qwen3-32b", 300), ("h200-qwen3-32b", 300)):
        for n, rows in ((16, 1), (64, 1), (64, 5)):
            load = Load(n * rows, n * rows * context, n * context, n)
            profile = hardware(name)
            ms = [msgspec.structs.replace(profile, overlap=p).step_ms(load) for p in (1.3, 2.0, 3.0)]
            yield f"| {name} | {n} x {rows} | {ms[0]:.1f} ms | {ms[1]:.1f} ms | {ms[2]:.1f} ms |"
