"""Phase 1 of recording: the target's text for a group of prompts, all in the same batches.

read the first prompt; the others begin like it, so copy that much and read the rest of each
copy each prompt to one slot per sampling
decode every slot, a row each, until all have ended
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wisp.core.errors import EngineError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.engines.llama.target import LlamaTarget


def target_texts(
    engine: LlamaTarget,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sequence[Sampling]],
    max_tokens: int,
    report: Callable[[float], None] = lambda share: None,
) -> list[list[list[int]]]:
    """[prompt][sampling] -> at most `max_tokens` tokens, the last an end-of-sequence token where one came up.

    samplings: for each prompt, as many as for the others; a slot of the engine for each
    report:    told the share of the steps done

    Raises EngineError.
    """
    width = len(samplings[0])
    engine.clear()
    _read_prompts(engine, prompts, width)
    texts: list[list[list[int]]] = [[[] for _ in range(width)] for _ in prompts]
    for step in range(max_tokens):
        batch = []
        for p, prompt in enumerate(prompts):
            for s, text in enumerate(texts[p]):
                if not (text and text[-1] in engine.info.eos):
                    batch.append(_decode_step(p * width + s, prompt, text, samplings[p][s]))
        if not batch:
            break
        for result in _run(engine, batch):
            texts[result.session // width][result.session % width] += result.tokens
        report((step + 1) / max_tokens)
    report(1.0)
    return texts


def common_length(lists: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all `lists` (at least one) share."""
    columns = enumerate(zip(*lists, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, lists)))


def _decode_step(slot: int, prompt: list[int], text: list[int], sampling: Sampling) -> Slice:
    last = (text or prompt)[-1]
    start = len(prompt) - 1 + len(text)
    return Slice(slot, slot, start, [last], position=len(text), sampling=sampling)


def _read_prompts(engine: LlamaTarget, prompts: Sequence[list[int]], width: int) -> None:
    """All but the last token of prompt p into slots p * width, ..., p * width + width - 1."""
    # A copy between slots is a copy of whole slots in exact mode, and marks shared cells in fast mode.
    common = common_length([prompt[:-1] for prompt in prompts])
    if common:
        _run(engine, [Slice(0, 0, 0, prompts[0][:common], sample=False)])
        for p in range(1, len(prompts)):
            engine.copy(Copy(0, p * width, common))
    rest = [(p * width, prompt[common:-1]) for p, prompt in enumerate(prompts)]
    _run(engine, [Slice(slot, slot, common, tokens, sample=False) for slot, tokens in rest if tokens])
    for p, prompt in enumerate(prompts):
        for s in range(1, width):
            engine.copy(Copy(p * width, p * width + s, len(prompt) - 1))


def _run(engine: LlamaTarget, batch: list[Slice]) -> list[SliceResult]:
    results = engine.run(batch)
    for result in results:
        if result.error:
            raise EngineError(f"the target cannot be traced: {result.error}")
    return results
