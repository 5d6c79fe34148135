"""A slow decoder that is obviously right, to hold the engine against.

One sequence in a fresh context of its own, one token after another, nothing kept back but the last logits. Each
token is evaluated with a dummy row after it that is rolled back, because one-row calls use other kernels. It
drives the C API itself, so a mistake in batching, rolling back or copying cannot be shared with the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wisp.core.errors import EngineError
from wisp.core.protocol.edits import Edit, Matchers, Tracker
from wisp.core.protocol.sampling import FloatArray, Sampling, gumbels, target_token
from wisp.engines.llama.capi import api
from wisp.engines.llama.context import Logits
from wisp.engines.llama.model import Model


class Step(NamedTuple):
    """A generated token, the logits (own copy) it was chosen from, and how clearly.

    gap: by how much the token beat the next best, in logits (noise times temperature included): where it is less
         than an engine's `flip_gap`, another choice in fast mode is a tie. Truncation by top-k, top-p or min-p
         has edges of its own, at which two kernels may also part.
    """

    token: int
    logits: Logits
    gap: float


def reference_steps(
    model_path: str | Path,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    exact: bool = True,
    threads: int = 1,
    matchers: Matchers | None = None,
) -> Iterator[Step]:
    """Endless: the model's tokens after `prompt` (at least one id). `exact=False`: plain one-row calls with
    llama.cpp's default settings, as the fast mode has them without drafts. `matchers`: for a grammar."""
    lib, ffi = api().lib, api().ffi
    model = Model(model_path, repack=not exact, layers=0 if exact else -1)
    context, batch = ffi.NULL, lib.llama_batch_init(2, 0, 1)
    try:
        params = lib.llama_context_default_params()
        params.n_ctx = model.n_ctx_train
        params.n_batch = params.n_ubatch = 8
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1 if exact else -1
        context = lib.llama_init_from_model(model.pointer, params)
        if context == ffi.NULL:
            raise EngineError("the reference decoder has no context")

        def evaluate(token: int, place: int) -> Logits:
            batch.n_tokens = 2 if exact else 1
            for row in range(batch.n_tokens):
                batch.token[row], batch.pos[row] = token, place + row
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, 0, 1
            if lib.llama_decode(context, batch) != 0:
                raise EngineError(f"the reference decoder failed at token {place}")
            lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, place + 1, -1)
            memory = ffi.buffer(lib.llama_get_logits_ith(context, 0), 4 * model.n_vocab)
            return np.frombuffer(memory, np.float32).copy()

        for place, token in enumerate(prompt):
            logits = evaluate(token, place)
        said: list[int] = []
        for position in range(model.n_ctx_train - len(prompt)):
            edit = edit_afresh(sampling, matchers, [*prompt, *said], position)
            token = target_token(logits, sampling, position, edit)
            said.append(token)
            yield Step(token, logits, _gap(logits, token, sampling, position, edit))
            logits = evaluate(token, len(prompt) + position)
    finally:
        lib.llama_batch_free(batch)
        if context != ffi.NULL:
            lib.llama_free(context)
        model.close()


def reference_tokens(
    model_path: str | Path,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    eos: Collection[int] = (),
    *,
    exact: bool = True,
    threads: int = 1,
    gaps: list[float] | None = None,
    matchers: Matchers | None = None,
) -> list[int]:
    """At most `max_tokens` tokens after `prompt`, the last of them in `eos` if one came up. `gaps`, if given,
    receives each token's `Step.gap`."""
    tokens: list[int] = []
    steps = reference_steps(model_path, prompt, sampling, exact=exact, threads=threads, matchers=matchers)
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in eos):
        step = next(steps, None)
        if step is None:
            break
        tokens.append(step.token)
        if gaps is not None:
            gaps.append(step.gap)
    steps.close()  # type: ignore[attr-defined]
    return tokens


def edit_afresh(
    sampling: Sampling, matchers: Matchers | None, tokens: Sequence[int], position: int
) -> Edit | None:
    """The constraints' edit after `tokens` (prompt and output), by a tracker that has seen nothing else."""
    if sampling.constraints is None or not sampling.constraints.choosing:
        return None
    return next(Tracker(sampling, matchers).edits(tokens, position, ()))


def _gap(logits: Logits, token: int, sampling: Sampling, position: int, edit: Edit | None = None) -> float:
    """The winner's lead in logits: without it, whom would the same rule and noise choose?"""
    scores: FloatArray = logits if edit is None else edit.apply(logits)
    others = scores.copy()
    others[token] = -np.inf
    if not np.isfinite(others).any():
        return np.inf
    if sampling.greedy:
        return float(scores[token]) - float(others.max())
    pair = np.array([token, target_token(others, sampling, position)])
    both = scores[pair] + sampling.temperature * gumbels(sampling.seed, position, pair)
    return abs(float(both[0] - both[1]))
