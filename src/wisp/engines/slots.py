"""Checks shared by all engines: slices and copies must fit what their slots hold, and logits must be numbers."""

from __future__ import annotations

from collections.abc import Callable

from wisp.core.errors import EngineError
from wisp.core.protocol.step import Copy, Slice

NONSENSE = (
    "this model computes NaN or infinity where it should say how likely tokens are; fetch or convert it again"
)


def slice_problem(
    work: Slice, held: Callable[[int], int], *, slots: int, slot_tokens: int, n_vocab: int
) -> str:
    """What is wrong with a slice, or "". `held` says how many tokens a slot holds."""
    if not 0 <= work.slot < slots:
        return f"slot {work.slot} is not one of 0..{slots - 1}"
    if not work.tokens:
        return "a slice feeds at least one token"
    if not 0 <= work.n_draft < len(work.tokens) or (work.n_draft and not work.sample):
        return f"{work.n_draft} draft tokens do not fit a slice of {len(work.tokens)} tokens"
    if not 0 <= work.start <= held(work.slot):
        return f"slot {work.slot} holds {held(work.slot)} tokens, not the {work.start} to start from"
    if work.start + len(work.tokens) > slot_tokens:
        return f"{work.start} + {len(work.tokens)} tokens exceed the slot's {slot_tokens}"
    if min(work.tokens) < 0 or max(work.tokens) >= n_vocab:
        return f"a token id is outside the vocabulary of {n_vocab}"
    constraints = work.sampling.constraints
    if constraints is not None and constraints.choosing and work.sample and len(work.past) < work.position:
        return f"constraints need the {work.position} tokens generated so far, not {len(work.past)}"
    wrong = work.sampling.problem()
    return f"{wrong[0]} {wrong[1]}" if wrong else ""


def check_copy(copy: Copy, held: Callable[[int], int], *, slots: int) -> None:
    """Raises EngineError if a copy is impossible."""
    for slot in (copy.source, copy.target):
        if not 0 <= slot < slots:
            raise EngineError(f"slot {slot} is not one of 0..{slots - 1}")
    if copy.source == copy.target:
        raise EngineError(f"slot {copy.source} cannot be copied to itself")
    if not 0 <= copy.tokens <= held(copy.source):
        raise EngineError(f"slot {copy.source} holds {held(copy.source)} tokens, not {copy.tokens}")
