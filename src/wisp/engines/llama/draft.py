"""The drafter's llama.cpp engine: a small model that guesses what the target will say.

Nothing here has to be exact, since a wrong guess costs time and never text; so it runs with llama.cpp's fast
settings, one row a call once a context has been caught up with.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from wisp.core.draft.signals import signal
from wisp.core.errors import EngineError, ModelError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling, second_choice, target_token
from wisp.core.verify.kv import common_prefix
from wisp.engines.base import Proposal
from wisp.engines.llama.context import Context, Logits, Tokens, physical_cores
from wisp.engines.llama.devices import USUAL, LlamaOptions
from wisp.engines.llama.model import Model
from wisp.engines.slots import NONSENSE

log = logging.getLogger("wisp.draft")

_ROWS = 128
_SAMPLE = 8  # tokens read at the start, to see that the model computes anything
_NEVER = 60.0  # logits below the best: as good as impossible
_WORTH_COPYING = 16  # tokens; a copy moves a whole slot, which takes about as long as evaluating a few rows


class LlamaDraft:
    """DraftEngine over a GGUF file.

    n_vocab:     ids from here on are never proposed (the target's vocabulary; default: the drafter's own)
    slots:       sessions whose KV is held at once; one more takes the place of the least recently used
    slot_tokens: context length of each (default 4096, or the model's training context if shorter); beyond it
                 `propose` returns None
    threads:     default: one per physical core
    options:     devices and types

    A session for which it computes NaN or infinity gets no more proposals. Raises ModelError if the model cannot be
    loaded, or has weights that are not finite, and ConfigError for options that this build cannot have.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_vocab: int | None = None,
        slots: int = 4,
        slot_tokens: int = 4096,
        threads: int | None = None,
        name: str | None = None,
        options: LlamaOptions = USUAL,
    ) -> None:
        if slots < 1:
            raise EngineError("a drafter needs at least one slot")
        self.name = name or Path(path).stem
        options.check(exact=False)
        layers = -1 if options.gpu_layers is None else options.gpu_layers
        self._model = Model(path, layers=layers, split=options.tensor_split)
        self._slot_tokens = min(slot_tokens, self._model.n_ctx_train)
        try:
            self._context = Context(
                self._model,
                slots=slots,
                slot_tokens=self._slot_tokens,
                rows=options.batch_rows or _ROWS,
                threads=threads or physical_cores(),
                flash=options.flash_attention,
                offload=options.gpu_layers != 0,
                kv_type=options.kv_number,
            )
        except ModelError:
            self._model.close()
            raise
        self._n_own = self._model.n_vocab
        self._n_vocab = min(n_vocab or self._n_own, self._n_own)
        self._held: list[list[int]] = [[] for _ in range(slots)]  # what each slot's KV is of
        self._sharers = [""] * slots  # and those who may begin with it
        self._sessions: OrderedDict[str, int] = OrderedDict()  # slot of each, least recently used first
        self._lost: set[str] = set()  # sessions for which it computes nonsense
        if not np.isfinite(self._evaluate(0, 0, np.arange(min(_SAMPLE, self._n_own), dtype=np.int32))).all():
            self.close()
            raise ModelError(f"{path}: {NONSENSE}")
        self._context.drop(0)

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        """The drafter's token after `context` (see DraftEngine.propose); None also where `context` is empty, longer
        than a slot, or has ids the drafter does not know. Raises EngineError; the session then starts afresh."""
        tokens = list(context)
        if not 0 < len(tokens) <= self._slot_tokens or session in self._lost:
            return None
        slot = self._slot_for(session, tokens)
        # The last token is evaluated even if it is held: its logits are wanted, and are gone.
        common = min(common_prefix(self._held[slot], tokens), len(tokens) - 1)
        feed = np.array(tokens[common:], np.int32)
        if feed.min() < 0 or feed.max() >= self._n_own:
            return None
        logits = self._evaluate(slot, common, feed)[: self._n_vocab]
        if not np.isfinite(logits).all():
            self._give_up(session)
            return None
        self._held[slot] = tokens
        if edit is None:
            token = target_token(logits, sampling, position)
            return Proposal(
                token,
                signal(logits, token, sampling, position),
                other=second_choice(logits, token, sampling, position),
            )
        return _constrained(logits, sampling, position, edit)

    @property
    def rows_evaluated(self) -> int:
        """Rows the model has evaluated so far: what syncing with contexts cost."""
        return self._context.rows_evaluated

    def forget(self, session: str) -> None:
        """The session is over. Its slot is free, but what it holds may still serve a session that begins alike."""
        self._sessions.pop(session, None)
        self._lost.discard(session)

    def _give_up(self, session: str) -> None:
        """No more drafts for it. What was computed must not stay where attention masks it by multiplying with 0."""
        log.warning(
            "the draft model %s computes NaN or infinity here; this answer goes on without drafts", self.name
        )
        self._lost.add(session)
        self._context.clear(wipe=True)
        self._held = [[] for _ in self._held]

    def close(self) -> None:
        self._model.close()

    def _slot_for(self, session: str, tokens: list[int]) -> int:
        """The session's slot; a new session gets the one whose content helps most, or a copy of it."""
        if session in self._sessions:
            self._sessions.move_to_end(session)
            return self._sessions[session]
        sharers = session.rpartition("/")[0]
        common = [
            common_prefix(held, tokens) if whose == sharers else 0
            for held, whose in zip(self._held, self._sharers, strict=True)
        ]
        used = set(self._sessions.values())
        free = [slot for slot in range(len(self._held)) if slot not in used]
        best = max(range(len(common)), key=common.__getitem__)
        if best in free:
            slot = best
        elif free:
            slot = min(free, key=lambda s: len(self._held[s]))
        else:
            _, slot = self._sessions.popitem(last=False)
        if self._sharers[slot] != sharers:
            self._context.drop(slot)
            self._held[slot], self._sharers[slot] = [], sharers
        if common[best] >= common[slot] + _WORTH_COPYING:
            self._context.copy(best, slot, common[best])
            self._held[slot] = self._held[best][: common[best]]
        self._sessions[session] = slot
        return slot

    def _evaluate(self, slot: int, start: int, feed: Tokens) -> Logits:
        """Logits [n_vocab] after `feed`, placed from `start` on. Valid until the next evaluation."""
        try:
            if start < len(self._held[slot]):
                self._context.drop(slot, start)
            rows = self._context.rows
            for first in range(0, len(feed), rows):
                piece = feed[first : first + rows]
                last = first + len(piece) == len(feed)
                self._context.add(slot, start + first, piece, int(last))
                logits = self._context.decode()
        except EngineError:
            self._held[slot] = []
            self._context.drop(slot)
            raise
        row: Logits = logits[0]
        return row


def _constrained(logits: Logits, sampling: Sampling, position: int, edit: Edit) -> Proposal | None:
    """The proposal and its statistics over the ids that may be chosen; None if this model does not have those."""
    token = target_token(logits, sampling, position, edit)
    if not edit.allows(token):
        return None
    scores = edit.apply(logits)
    floor = float(scores.max()) - _NEVER  # statistics want numbers
    told = signal(np.maximum(scores, floor).astype(np.float32), token, sampling, position)
    return Proposal(token, msgspec.structs.replace(told, spread=float(logits.std())))
