"""One slice on its way through a step: which rows need logits, and what the target says at each.

The rule: at each sampled row the target's own token is chosen; while it equals the draft token that was fed next,
go on; the first that does not is the correction, and the one after a draft accepted whole is the bonus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from wisp.core.errors import GrammarError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import log_probability, target_token
from wisp.core.protocol.step import (
    ENGINE_ERROR,
    NO_TOKEN,
    NOT_FINITE,
    Slice,
    SliceResult,
    TokenLogprob,
    TopLogprob,
)
from wisp.engines.constraining import code_of
from wisp.engines.llama.context import Logits, Tokens

Tap = Callable[[int, int, Logits], None]  # (slot, place, logits) of a sampled row; the logits are only lent


class Run:
    """State of one slice. `done` once nothing more is to be evaluated, `error` if it failed."""

    def __init__(self, work: Slice, tap: Tap | None, edits: Iterator[Edit] | None = None) -> None:
        """`edits`: of the constraints, for each row that is chosen from; None without any."""
        self.work = work
        self._edits = edits
        self.fed = 0  # rows evaluated
        self.accepted = 0
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.error = self.code = ""
        self.done = False
        self._tap = tap
        self.feed: Tokens = np.empty(0, np.int32)

    @property
    def first_sampled(self) -> int:
        """Index of the first row whose logits are needed."""
        work = self.work
        return len(work.tokens) - work.n_draft - 1 if work.sample else len(work.tokens)

    @property
    def kept(self) -> int:
        """Tokens that the slot is to hold once the slice is done."""
        work = self.work
        return work.start + len(work.tokens) - work.n_draft + self.accepted

    def wanted(self, rows: int) -> int:
        """Of the next `rows` rows, how many need logits. They are the last ones."""
        return min(rows, max(0, self.fed + rows - self.first_sampled))

    def take(self, rows: int, logits: Logits) -> None:
        """`rows` more rows were evaluated; `logits` are those of the last `wanted(rows)` of them."""
        self.fed += rows
        for index, row in enumerate(logits, self.fed - len(logits)):
            if self._tap is not None:
                self._tap(self.work.slot, self.work.start + index, row)
            self._choose(index - self.first_sampled, row)
            if self.done:
                return
        self.done = self.fed == len(self.work.tokens)

    def _choose(self, step: int, row: Logits) -> None:
        """The target's token after `step` accepted draft tokens; done unless the draft says the same."""
        work = self.work
        if not np.isfinite(row).all():
            self.fail(NO_TOKEN, NOT_FINITE)
            return
        try:
            edit = next(self._edits) if self._edits is not None else None
        except GrammarError as error:
            self.fail(str(error), code_of(error))
            return
        token = target_token(row, work.sampling, work.position + step, edit)
        self.tokens.append(token)
        if work.logprobs is not None:
            chosen, top = log_probability(row, token, work.logprobs)
            self.logprobs.append(TokenLogprob(token, chosen, [TopLogprob(*pair) for pair in top]))
        if step < work.n_draft and token == work.tokens[self.first_sampled + 1 + step]:
            self.accepted += 1
        else:
            self.done = True

    def fail(self, error: str, code: str = ENGINE_ERROR) -> None:
        self.error, self.code, self.done = error, code, True

    def result(self) -> SliceResult:
        if self.error:
            return SliceResult(self.work.session, error=self.error, code=self.code)
        return SliceResult(self.work.session, self.accepted, self.tokens, self.logprobs)
