"""Scoring of prompts: `echo`, and the log probabilities of the prompt's tokens.

A prompt is scored by generating it: a grammar allows, at each place, the prompt's own next token alone, and log
probabilities are of the raw logits. So scoring is a session like any other: it is cut into steps that take turns with
other sessions, and a device drafts the forced tokens for free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import msgspec

from wisp.api.answers import answers
from wisp.api.backend import Backend, Generation, Target
from wisp.api.output import Entry, Output
from wisp.api.prepare import Prepared
from wisp.api.requests import GenerationRequest, Prompt
from wisp.api.responses import Json
from wisp.api.shape import Echo
from wisp.api.spelling import finite, spelled, written
from wisp.api.sse import cancel
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import TokenLogprob
from wisp.engines.base import Tokenizer

MOST_FORCED = 8192  # tokens of one grammar; more of them may not fit its source


async def echoes(backend: Backend, ask: GenerationRequest, prepared: Prepared, target: Target) -> list[Echo]:
    """What comes before each answer's text; none where nothing was asked for."""
    wanted = ask.prompt_logprobs is not None
    if not (ask.echo or wanted):
        return []
    prompts = [g.prompt for g in prepared.generations[:: ask.n]]
    tops = [t for t in (ask.prompt_logprobs, ask.logprobs if ask.echo else None) if t is not None]
    scored: Sequence[list[TokenLogprob]] = [[] for _ in prompts]
    if tops:
        first = prepared.generations[0]
        tasks = [
            asyncio.create_task(_scores(backend, first, p, max(tops), target.tokenizer)) for p in prompts
        ]
        try:
            scored = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one fails, nobody wants the others
                await cancel(task)
    found = []
    for said, prompt, scores in zip(ask.prompts, prompts, scored, strict=True):
        text, entries = _told(said, prompt, scores, target.tokenizer)
        found += [
            Echo(
                text if ask.echo else "",
                entries if ask.echo and ask.logprobs is not None else [],
                prompt[0],
                _listed(prompt, scores, target.tokenizer) if wanted else None,
            )
        ] * ask.n
    return found


async def _scores(
    backend: Backend, first: Generation, prompt: list[int], top: int, tokenizer: Tokenizer
) -> list[TokenLogprob]:
    """The log probabilities of all tokens but the first, which follows nothing."""
    found: list[TokenLogprob] = []
    for start in range(1, len(prompt), MOST_FORCED):
        tokens = prompt[start : start + MOST_FORCED]
        forced = Grammar("tokens", msgspec.json.encode(tokens).decode())
        task = msgspec.structs.replace(
            first,
            prompt=prompt[:start],
            sampling=Sampling(constraints=Constraints(grammar=forced)),
            max_tokens=len(tokens),
            ignore_eos=True,
            logprobs=top,
        )
        output = Output(tokenizer, (), logprobs=True)
        async with aclosing(answers(backend, [task], [output])) as deltas:
            found += [entry.logprob async for _, delta in deltas for entry in delta.entries]
    return found


def _told(
    said: Prompt, prompt: list[int], scores: list[TokenLogprob], tokenizer: Tokenizer
) -> tuple[str, list[Entry]]:
    """The prompt as text, and its tokens with what was found of them. `said`: the prompt as the client gave it."""
    pieces = [written(tokenizer, token) for token in prompt]
    if not tokenizer.piece(prompt[0]) and isinstance(said, str) and not said.startswith(pieces[0].decode()):
        pieces[0] = b""  # a beginning of sequence that is not the client's
    entries, before = [], pieces[0]
    for score, piece in zip(scores, pieces[1:], strict=False):
        entries.append(Entry(score, len(before.decode("utf-8", "ignore"))))
        before += piece
    return b"".join(pieces).decode("utf-8", "replace"), entries


def _listed(prompt: list[int], scores: list[TokenLogprob], tokenizer: Tokenizer) -> list[Json | None]:
    """`prompt_logprobs` as vLLM has it: for each token its own and the likeliest, by id."""
    listed: list[Json | None] = [None]
    for score in scores:
        ranked = {t.token: (t.logprob, i + 1) for i, t in enumerate(score.top)}
        ranked.setdefault(score.token, (score.logprob, 0))
        listed.append({str(t): _one(tokenizer, t, *found) for t, found in ranked.items()})
    return listed


def _one(tokenizer: Tokenizer, token: int, logprob: float, rank: int) -> Json:
    return {"logprob": finite(logprob), "rank": rank or None, "decoded_token": spelled(tokenizer, token)}
