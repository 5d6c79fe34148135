"""The data that target, scheduler and workers exchange: plain structs, free of vLLM and torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import TokenLogprob

_GREEDY = Sampling()
Blocks = tuple[Sequence[int], ...]  # of each group of layers


class Part(msgspec.Struct, gc=False):
    """How tokens are chosen along one sequence's share of a vLLM step.

    draft:    its last tokens, which are guesses; only those before them enter the prefix cache
    sample:   choose the target's tokens at the last len(draft) + 1 rows
    position: index, among the generated tokens, of the first to be chosen
    logprobs: None, or how many alternatives to report per token
    observed: send the logits of the sampled rows back, too
    edits:    what constraints make of the sampled rows' logits, () without any; none for rows behind a draft token that
              a grammar does not allow
    """

    draft: list[int]
    sample: bool
    position: int = 0
    sampling: Sampling = _GREEDY
    logprobs: int | None = None
    observed: bool = False
    edits: Sequence[Edit] = ()

    def __repr__(self) -> str:
        """Without the tokens: vLLM logs a step that failed, and logs hold no prompts."""
        return f"Part(draft={len(self.draft)}, sample={self.sample})"

    def edit(self, i: int) -> Edit | None:
        """Of the sampled row `i`."""
        return self.edits[i] if i < len(self.edits) else None

    @property
    def rows(self) -> int:
        """How many of the last rows need logits."""
        return len(self.draft) + 1 if self.sample else 0


class Batch(NamedTuple):
    """A step's sequences, in order. A worker knows a sequence by its slot, and of it nothing but its blocks.

    slots:  int64 [n]
    starts: int64 [n]; the place of each sequence's first token
    counts: int64 [n]; tokens of each
    tokens: int64 [total]; sequence by sequence
    wanted: int64 [n]; how many of its last rows need logits
    parts:  how they are chosen from
    blocks: (slot, how many blocks of it are known already, those that follow)
    open:   int64 [n]; which of its tokens is the one that the step before chose for its slot, and is on the device; -1:
            none, all are known
    keep:   leave what is chosen on the device: the next step may begin with it
    """

    slots: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.int64]
    parts: list[Part]
    blocks: list[tuple[int, int, Blocks]]
    open: npt.NDArray[np.int64]
    keep: bool = False

    def __repr__(self) -> str:
        """Without the tokens, as above."""
        return f"Batch(slots={self.slots.tolist()}, counts={self.counts.tolist()})"

    def ordered(self, order: npt.NDArray[np.int64]) -> Batch:
        """The same sequences in another order."""
        ends = np.cumsum(self.counts)
        pieces = [self.tokens[end - n : end] for end, n in zip(ends, self.counts, strict=True)]
        return Batch(
            self.slots[order],
            self.starts[order],
            self.counts[order],
            np.concatenate([pieces[i] for i in order]),
            self.wanted[order],
            [self.parts[i] for i in order],
            self.blocks,
            self.open[order],
            self.keep,
        )


class Chosen(NamedTuple):
    """What the target says along a part: the accepted draft tokens and one more, with what was asked for.

    finite: could they be chosen? False: the model computed a NaN or an infinity at one of their rows
    logits: float32 array [rows, vocabulary] of the sampled rows, or None
    """

    tokens: list[int]
    logprobs: list[TokenLogprob]
    logits: Any = None
    finite: bool = True
