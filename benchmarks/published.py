"""How far memory and arithmetic overlap in a step, from measurements that others published.

The roofline of `engines.emulated` has a step take (memory^p + compute^p)^(1/p) + launch. LMDeploy has published the
median time of a token for static batches on A100s, which is the time of a step: for one model, many batches and
contexts. For each p the share of the bandwidth and the launch that fit best are found, with the share of the arithmetic
given: 0.5, as in our profiles, or what the same page's prefill of 2,048 tokens reached.

NVIDIA has published the throughput of static batches under TensorRT-LLM on A100s and H100s, prefill included. A few of
them are so large that reading and arithmetic take about as long as each other, where p shows most: one batch is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

SOURCE = "https://github.com/InternLM/lmdeploy/blob/3e391df4673326f79363eebe030876861a9b7090/docs/en/benchmark/a100_fp16.md"
BANDWIDTH, ARITHMETIC = 2039e9, 312e12  # of one A100-80GB: bytes and dense fp16 operations per second
PS = (*(1.0 + 0.05 * i for i in range(61)), math.inf)
CLOSE = 0.005  # errors so much larger than the least one still count as a fit
OUR_SHARE = 0.5
BEFORE = 1.3  # p, a guess, of profiles before these measurements were looked at; pages name it
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
    error_before: float
    bandwidth: float
    launch_ms: float


def found(m: Published, share: float) -> Found:
    """The best p, and those close to it."""
    fits = [fit(m, p, share) for p in PS]
    best = min(fits, key=lambda f: f.error)
    close = [f.p for f in fits if f.error <= best.error + CLOSE]
    high = None if close[-1] == math.inf else round(close[-1], 2)
    old = fit(m, BEFORE, share).error
    return Found(
        m.name, m.gpus, round(share, 2), round(best.p, 2), round(close[0], 2), high, best.error, old, best.bandwidth,
        best.launch_ms,
    )  # fmt: skip


# --- large batches, whose prefill has to be taken off

TENSORRT_LLM = "https://github.com/NVIDIA/TensorRT-LLM/blob/138f96d45f90b9667426f7c47297d8c06bafac73/docs/source/performance.md"
BANDWIDTH_SHARE, LAUNCH_MS = 0.87, 2.3  # what LMDeploy's Llama-2-7B fits
BALANCED = 0.5  # the shorter part is at least this share of the longer one


class Offline(NamedTuple):
    """Static batches of one model: bytes of a weight and of a token's KV, peaks of the device in bytes and operations
    per second, ms to the first of one prompt's tokens (2,048 of them), and (batch, prompt, output, tokens per s)."""

    model: str
    device: str
    billions: float
    weight_bytes: float
    kv_bytes: int
    bandwidth: float
    arithmetic: float
    first_ms: float
    runs: tuple[tuple[int, int, int, float], ...]


H100 = 3350e9, 1979e12  # bytes and dense fp8 operations per second
OFFLINE = (
    Offline("GPT-J 6B", "A100, fp16", 6.05, 2, 458_752, BANDWIDTH, ARITHMETIC, 129.0, (
        (512, 128, 128, 6374), (60, 2048, 128, 670),
    )),
    Offline("Llama-2-7B", "A100, fp16", 6.74, 2, 524_288, BANDWIDTH, ARITHMETIC, 133.0, (
        (384, 128, 128, 5586), (60, 128, 2048, 1928), (52, 2048, 128, 591),
    )),
    Offline("GPT-J 6B", "H100, fp8", 6.05, 1, 229_376, *H100, 29.0, (
        (1024, 128, 128, 26150), (120, 128, 2048, 8011), (64, 2048, 128, 2551), (64, 2048, 2048, 3327),
    )),
    Offline("Llama-2-7B", "H100, fp8", 6.74, 1, 262_144, *H100, 36.0, (
        (768, 128, 128, 19694), (112, 128, 2048, 6818), (80, 2048, 128, 2244), (48, 2048, 2048, 2740),
    )),
)  # fmt: skip


class Balanced(msgspec.Struct):
    """A batch with which both parts of a step matter. p None: the step takes no longer than its longer part."""

    model: str
    device: str
    batch: int
    share: float
    step_ms: float
    memory_ms: float
    compute_ms: float
    p: float | None


def balanced() -> Iterator[Balanced]:
    """Of all published batches those whose p shows, under both assumptions about the arithmetic's share."""
    for m in OFFLINE:
        reached = 2 * m.billions * 1e9 * PROMPT / (m.first_ms / 1e3) / m.arithmetic
        for run in m.runs:
            for share in (OUR_SHARE, reached):
                found = _of_batch(m, run, share, reached)
                if min(found.memory_ms, found.compute_ms) >= BALANCED * max(
                    found.memory_ms, found.compute_ms
                ):
                    yield found


def _of_batch(m: Offline, run: tuple[int, int, int, float], share: float, reached: float) -> Balanced:
    batch, prompt, output, per_s = run
    operations = 2 * m.billions * 1e9 * batch
    prefill_s = operations * prompt / (m.arithmetic * reached)
    step_ms = (batch * output / per_s - prefill_s) / (output - 1) * 1e3
    moved = m.billions * 1e9 * m.weight_bytes + batch * (prompt + output / 2) * m.kv_bytes
    memory = moved / (m.bandwidth * BANDWIDTH_SHARE) * 1e3
    compute = operations / (m.arithmetic * share) * 1e3
    p = solved(memory, compute, step_ms - LAUNCH_MS)
    return Balanced(m.model, m.device, batch, round(share, 2), step_ms, memory, compute, p)


def solved(memory: float, compute: float, both: float) -> float | None:
    """The p with which both parts together take so long, at least 1; None where they take no longer than one."""
    high, low = max(memory, compute), min(memory, compute)
    if both <= high:
        return None
    fewest, most = 1.0, 64.0
    for _ in range(40):
        p = (fewest + most) / 2
        if high * (1 + (low / high) ** p) ** (1 / p) > both:
            fewest = p
        else:
            most = p
    return fewest
