"""What travels between target, scheduler and workers: plain data, free of vLLM and torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import TokenLogprob


class Part(NamedTuple):
    """One sequence's share of one vLLM step: `tokens` go to the places start, start + 1, ...

    draft:    the last of `tokens`, which are guesses; only the others enter the prefix cache
    sample:   choose the target's tokens at the last len(draft) + 1 rows
    position: index, among the generated tokens, of the first to be chosen
    logprobs: None, or how many alternatives to report per token
    observed: send the logits of the sampled rows back, too
    edits:    what constraints make of the sampled rows' logits, () without any; none for rows behind a draft token that
              a grammar does not allow
    """

    start: int
    tokens: list[int]
    draft: list[int]
    sample: bool
    position: int
    sampling: Sampling
    logprobs: int | None = None
    observed: bool = False
    edits: Sequence[Edit] = ()

    def __repr__(self) -> str:
        """Without the tokens: vLLM logs a step that failed, and logs hold no prompts."""
        return f"Part(start={self.start}, tokens={len(self.tokens)}, draft={len(self.draft)}, sample={self.sample})"

    def edit(self, i: int) -> Edit | None:
        """Of the sampled row `i`."""
        return self.edits[i] if i < len(self.edits) else None

    @property
    def rows(self) -> int:
        """How many of the last rows need logits."""
        return len(self.draft) + 1 if self.sample else 0

    @property
    def firm(self) -> int:
        """Tokens of the sequence, after this part, that are no guesses."""
        return self.start + len(self.tokens) - len(self.draft)


class Chosen(NamedTuple):
    """What the target says along a part: the accepted draft tokens and one more, with what was asked for.

    finite: could they be chosen? False: the model computed a NaN or an infinity at one of their rows
    logits: float32 array [rows, vocabulary] of the sampled rows, or None
    """

    tokens: list[int]
    logprobs: list[TokenLogprob]
    logits: Any = None
    finite: bool = True
