"""What a session on the edge is to generate, the states that it goes through, and what its host is to do for it."""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from wisp.core.protocol.messages import Draft, Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import Committed


class Phase(Enum):
    """State of a session on the edge."""

    DETACHED = auto()  # no connection
    DRAFTING = auto()  # building a draft
    IN_FLIGHT = auto()  # a draft awaits its verdict
    SERVED = auto()  # the verifier decodes by itself
    DONE = auto()


DETACHED, DRAFTING, IN_FLIGHT, SERVED, DONE = Phase  # as globals: a look-up through the class takes longer


class Reopen(msgspec.Struct, frozen=True):
    """Call `connected` again: at once on this connection, or after `after_s`."""

    after_s: float


Action = Open | Draft | Committed | Reopen


class Task(msgspec.Struct, frozen=True):
    """A text to generate. Prompt and `max_tokens` together fit the context. `salt`, `trace`: see `messages.Open`.

    digest: of the model for which the prompt was encoded; "" for that of the first verifier.
    """

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    ignore_eos: bool = False
    logprobs: int | None = None
    slo: Slo | None = None
    salt: str = ""
    digest: str = ""
    trace: str = ""


class Opening:
    """The last Open, and the verifier that it went to.

    digest:    of the session's model; "" while any model will do
    max_draft, max_branches: most tokens and branches in one draft for this verifier
    round:     of the Open itself
    reopened:  refusals in a row that were answered by another Open, without a new token
    """

    __slots__ = ("digest", "epoch", "max_branches", "max_draft", "reopened", "round")

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.epoch = self.round = -1
        self.max_draft = self.max_branches = self.reopened = 0
