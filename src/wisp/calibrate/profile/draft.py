"""`wisp profile --draft`: the drafting speed of this device, and the cost of the predictor beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from wisp.core.draft.policies import Judgement
from wisp.core.draft.predictor import Calibration
from wisp.core.draft.signals import Signal, signal
from wisp.core.protocol.sampling import Sampling
from wisp.engines.build import load_drafter, read_predictor, served_name
from wisp.engines.models import RichProgress, resolve

PROMPT = "def fibonacci(n):\n    # the n-th Fibonacci number, by iteration\n"


def profile_draft(draft: str, *, steps: int, threads: int | None, offline: bool, as_json: bool) -> None:
    """Time draft steps, the statistics of their logits, and a prediction; print medians. Raises WispError."""
    from wisp.engines.llama.tokenizer import LlamaTokenizer

    with RichProgress() as progress:
        engine, _ = load_drafter(draft, threads=threads, offline=offline, progress=progress)
        path: Path = resolve(draft, offline=offline, progress=progress)
    assert engine is not None
    tokenizer = LlamaTokenizer.open(path)
    context = tokenizer.encode(PROMPT, add_bos=True, parse_special=False)
    times = []
    sampling = Sampling(temperature=0.7, seed=1)
    for position in range(steps):
        started = time.perf_counter()
        proposal = engine.propose("profile", context, position, sampling)
        times.append((time.perf_counter() - started) * 1e3)
        if proposal is None:
            break
        context = [*context, proposal.token]
    step_ms = median(times[1:])  # the first reads the prompt
    n_vocab = tokenizer.n_vocab
    engine.close()
    logits = np.random.default_rng(0).normal(scale=2.5, size=n_vocab).astype(np.float32)
    judgement = Judgement(read_predictor(), Calibration(), Calibration(), 0.7)
    signal_ms = _median_ms(lambda: signal(logits, 5, sampling, 3))
    judge_ms = _median_ms(lambda: judgement.judge(Signal(0.7, 1.0, 0.5, 2.5, 1.0), [0.9, 0.8]))
    result = {
        "draft": served_name(draft),
        "vocabulary": n_vocab,
        "steps": len(times),
        "tokens_per_s": round(1e3 / step_ms, 2),
        "step_ms": round(step_ms, 3),
        "signal_ms": round(signal_ms, 4),
        "predict_ms": round(judge_ms, 4),
        "share_of_step": round((signal_ms + judge_ms) / step_ms, 4),
    }
    if as_json:
        print(json.dumps(result))
        return
    console = Console(highlight=False)
    console.print(
        f"{result['draft']} drafts {result['tokens_per_s']} tokens/s here ({step_ms:.1f} ms a token)."
    )
    console.print(
        f"Statistics of {n_vocab} logits take {signal_ms:.2f} ms, a prediction {judge_ms * 1e3:.0f} µs: "
        f"{result['share_of_step']:.1%} of a step."
    )


def _median_ms(call: Callable[[], object], times: int = 100) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1e3)
    return median(taken)
