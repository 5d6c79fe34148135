"""N-grams before a model: where a text repeats itself, its history predicts better than a small model, and for free."""

from __future__ import annotations

from collections.abc import Sequence

from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import DraftEngine, Proposal

SURE = 0.8  # confidence from which an n-gram is believed; a match of several tokens whose followers agree


class NgramThenModel:
    """DraftEngine of two: the n-gram's proposal where it is sure, otherwise the model's.

    The model's KV catches up by itself, several tokens in one call, when it is asked again.
    """

    def __init__(self, ngram: DraftEngine, model: DraftEngine) -> None:
        self.ngram = ngram
        self.model = model
        self.name = f"ngram+{model.name}"

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        known = self.ngram.propose(session, context, position, sampling, edit)
        if known is not None and known.signal.confidence >= SURE:
            return known
        return self.model.propose(session, context, position, sampling, edit)

    def forget(self, session: str) -> None:
        self.ngram.forget(session)
        self.model.forget(session)

    def close(self) -> None:
        self.ngram.close()
        self.model.close()
