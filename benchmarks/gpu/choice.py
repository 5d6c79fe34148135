"""The choice of tokens on a device: equal to the rule, and how long it takes beside plain torch."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.gpu.report import write
from wisp.core.protocol.sampling import Sampling
from wisp.engines.vllm.parts import Part

DRAFT = 4
KINDS = {
    "plain": (Sampling(temperature=0.7), None),
    "top-p": (Sampling(temperature=0.7, top_p=0.95), None),
    "top-k": (Sampling(temperature=0.7, top_k=40), None),
    "log probabilities": (Sampling(temperature=0.7, top_p=0.95), 20),
}


class Time(msgspec.Struct):
    """Medians, ms. torch_ms: softmax and one draw of each row by torch, which does not even take a seed."""

    kind: str
    rows: int
    fused_ms: float
    torch_ms: float


def run(out: Path, *, tiny: bool) -> None:
    """Equality on `checked` rows, and times. Skipped by name without the parts it needs."""
    try:
        from wisp.engines.vllm import choosing, fused, rows
    except ImportError as error:
        write(out, "choice", {"skipped": f"{error}"})
        return
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    size = 128 if tiny else 151936
    dtype = torch.bfloat16 if cuda else torch.float32
    if choosing._way(str(torch.empty(0, device=device).device), dtype, size) is choosing.begin:
        write(out, "choice", {"skipped": f"Triton builds no kernels for {device}"})
        return
    wrong, checked = 0, 0
    sizes = (8,) if tiny else (64, 256, 1024, 2048)
    times: list[Time] = []
    for kind, (sampling, logprobs) in KINDS.items():
        for n in sizes:
            logits = (torch.randn((n, size), device=device) * 3).to(dtype)
            parts = _parts(n, size, sampling, logprobs)
            asked = rows.rows_of(parts, size)
            if n == sizes[0]:
                choice = choosing.choose(logits, parts, here=False)
                by_rule = choosing.choose(logits.float().cpu(), parts, here=True).chosen()
                if cuda:
                    torch.cuda.synchronize()
                said = choice.chosen()
                wrong += sum(a.tokens != b.tokens for a, b in zip(said, by_rule, strict=True))
                checked += n
            ours = _median_ms(lambda logits=logits, asked=asked: fused.answers(logits, asked), cuda=cuda)  # type: ignore[misc]
            torchs = _median_ms(lambda logits=logits: _by_torch(logits), cuda=cuda)  # type: ignore[misc]
            times.append(Time(kind, n, ours, torchs))
    write(out, "choice", {"rows_checked": checked, "parts_wrong": wrong, "times": times})
    print(f"choice: {wrong} wrong of {checked} rows", flush=True)


def _parts(n: int, size: int, sampling: Sampling, logprobs: int | None) -> list[Part]:
    rng = random.Random(n)
    parts = []
    for i in range(max(1, n // (DRAFT + 1))):
        count = DRAFT if i else n - (DRAFT + 1) * (max(1, n // (DRAFT + 1)) - 1) - 1
        how = msgspec.structs.replace(sampling, seed=i)
        draft = [rng.randrange(size) for _ in range(count)]
        parts.append(Part(draft, True, i, how, logprobs))
    return parts


def _by_torch(logits: torch.Tensor) -> Any:
    return torch.multinomial(torch.softmax(logits.float() / 0.7, dim=1), 1).tolist()


def _median_ms(work: Callable[[], Any], *, cuda: bool) -> float:
    times = []
    for _ in range(12 if cuda else 1):  # the interpreter's times say nothing
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) * 1e3)
    return round(statistics.median(times[2:] or times), 4)  # the first ones warm up
