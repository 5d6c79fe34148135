"""What the slots of the vLLM engine hold, and how much of it has KV.

A slot is a vLLM sequence: held while no slice names it, cut back when drafts are rejected, begun anew when a slice
starts where nothing is to be kept. What a slot *holds* is the verifier's business and is promised; how much of it
is *computed* is a cache: where blocks run short, sequences that are not in the step give theirs up, and what is
missing is fed again with their next slice (mostly from the prefix cache). So text never depends on memory.

Prefixes are shared only where the verifier copies one slot to another, or goes on in a slot: as everywhere in
WISP, what another customer has asked cannot be felt in the time to the first token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Copy
from wisp.engines.slots import check_copy

if TYPE_CHECKING:
    from wisp.engines.vllm.scheduler import Held, StepScheduler
    from wisp.engines.vllm.stepping import Task

NOTHING = (-2, 0)  # of `Slot.last`: no step has this number


class Slot:
    """`tokens` are held; the first `computed` of them have KV, in the blocks of `sequence` (None: no blocks), or will
    have it once all steps that were launched have run.

    known:    so many of its tokens are decided; behind them is a draft, or what a step in flight chooses
    life:     how often it was begun anew
    newest:   the newest task that builds on what it holds, until its results are there
    last:     (step, the last token that this step chose)
    broken:   its last slice failed, and nothing was begun in it since
    anchor:   it can be cut back to here or further on; before that, blocks are shared or dropped
    salt:     sequences of one salt may share blocks
    used:     when it last took part, in steps
    sampling: the parameters that were last found to be in order
    """

    __slots__ = (
        "anchor", "broken", "computed", "index", "known", "last", "life", "newest", "salt", "sampling", "sequence",
        "tokens", "used",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.sequence: Held | None = None
        self.computed = self.anchor = self.used = self.known = self.life = 0
        self.newest: Task | None = None
        self.last = NOTHING
        self.broken = False
        self.salt = ""
        self.sampling: Sampling | None = None


class Slots:
    """All slots of an engine, and their blocks in `scheduler`."""

    def __init__(self, n: int, scheduler: StepScheduler) -> None:
        self.all = [Slot(index) for index in range(n)]
        self.scheduler = scheduler

    def held(self, slot: int) -> int:
        """Tokens that `slot` holds, whatever steps in flight say."""
        return self.all[slot].known

    def is_broken(self, slot: int) -> bool:
        """See Slot."""
        return 0 <= slot < len(self.all) and self.all[slot].broken

    def copy(self, copy: Copy) -> None:
        """`target` holds what `source` holds, up to `copy.tokens`; its blocks are looked up when it is next fed."""
        check_copy(copy, self.held, slots=len(self.all))
        source, target = self.all[copy.source], self.all[copy.target]
        self.empty(target)
        target.tokens, target.known, target.salt = source.tokens[: copy.tokens], copy.tokens, source.salt

    def begin(self, slot: Slot, firm: int) -> None:
        """A new sequence for what it holds, of which the first `firm` tokens are no guesses. What the prefix cache
        still has need not be computed."""
        slot.sequence, slot.computed = self.scheduler.open(slot.index, slot.tokens[:firm], slot.salt)
        slot.anchor = slot.computed

    def cut(self, slot: Slot, tokens: int) -> None:
        """It holds its first `tokens` tokens, of which not all need be computed."""
        if tokens >= len(slot.tokens):
            return
        del slot.tokens[tokens:]
        slot.computed, slot.known = min(slot.computed, tokens), min(slot.known, tokens)
        if slot.sequence is None:
            return
        if tokens < slot.anchor:
            self.drop_blocks(slot)
        else:
            slot.sequence.cut(tokens, self.scheduler.hash_block_size)

    def make_room(self, busy: set[int], others: Iterable[Slot]) -> bool:
        """Take the blocks of the slot that was idle longest, of those that are not `busy`; if there is none, of one of
        the `others`. False if there is nothing to take."""
        idle = [s for s in self.all if s.sequence is not None and s.index not in busy]
        idle = idle or [s for s in others if s.sequence is not None]
        if not idle:
            return False
        self.drop_blocks(min(idle, key=lambda s: s.used))
        return True

    def drop_blocks(self, slot: Slot) -> None:
        """It holds what it holds, but none of that is computed any more."""
        if slot.sequence is not None:
            self.scheduler.close(slot.sequence)
        slot.sequence, slot.computed, slot.anchor = None, 0, 0

    def empty(self, slot: Slot) -> None:
        """It holds nothing."""
        self.drop_blocks(slot)
        slot.tokens, slot.known, slot.newest, slot.last = [], 0, None, NOTHING
        slot.broken = False
        slot.life += 1

    def clear(self) -> None:
        """None holds anything, and the prefix cache is empty."""
        self.scheduler.reset()
        for slot in self.all:
            slot.sequence = None
            self.empty(slot)
