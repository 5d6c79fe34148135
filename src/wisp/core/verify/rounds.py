"""What verifier and edge owe each other: the draft to verify, those that wait, and the last verdict.

pending   verified in the next step that the session takes part in
inbox     cannot be taken yet: a step runs, or they continue the pending draft
verdict   kept, as the edge may ask for it again
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from wisp.core.protocol.messages import Draft, Open, Verdict


class Pending(msgspec.Struct, frozen=True):
    """A draft to verify. `draft` continues the committed tokens; `head` draft tokens before it were committed already.

    base: generated tokens before the draft. since: time at which it arrived.
    """

    round: int
    base: int
    head: int
    draft: list[int]
    since: float


class OwnDraft(NamedTuple):
    """A draft of the verifier's own (`own_drafts`): one token or more. acceptance: of the first, as estimated."""

    tokens: list[int]
    acceptance: float


class Round:
    """What verifier and edge owe each other."""

    __slots__ = ("heard", "inbox", "number", "own", "pending", "price", "serve", "verdict")

    def __init__(self, open_: Open) -> None:
        self.number = -1  # of the last round answered, or being answered
        self.heard = len(open_.committed)  # generated tokens that the edge has, or that were sent to it
        self.pending: Pending | None = None  # to be verified
        self.own: OwnDraft | None = None  # verified where none is pending; belongs to the session's candidate
        # Drafts that cannot be taken yet: at most two, of which the second continues the first.
        self.inbox: list[Draft] = []
        self.verdict: Verdict | None = None  # the last one, for duplicates
        self.serve = open_.serve  # server mode: decode without drafts until the next one comes
        self.price = 0.0  # congestion price in the last verdict: tokens of this session per draft token

    @property
    def last_received(self) -> int:
        """Number of the last round that came from the edge."""
        return self.inbox[-1].round if self.inbox else self.number

    def wait(self, draft: Draft) -> None:
        """`draft` cannot be taken yet. It replaces those that wait, but not one that it continues: that one is verified
        alone, and the rows of `draft` are computed only if it is right."""
        self.inbox = [d for d in self.inbox[:1] if self._continues(d, draft)]
        self.inbox.append(draft)

    def _continues(self, waiting: Draft, draft: Draft) -> bool:
        rest = waiting.tokens[max(0, draft.base - waiting.base) :]
        apart = bool(rest) or self.price > 0.0
        later = waiting.round < draft.round and waiting.base <= draft.base
        return apart and later and len(rest) < reach(draft) and draft.tokens[: len(rest)] == rest

    def clear(self) -> None:
        """Forget what is under way: the edge begins anew."""
        self.pending = self.verdict = None
        self.inbox = []


def reach(draft: Draft) -> int:
    """Length of a draft, as it is compared with the draft before it: branches count for one token, so that a draft
    that adds nothing else waits for that verdict, too."""
    return len(draft.tokens) + bool(draft.branches)


def fitting_branch(draft: Draft, known: list[int]) -> list[int] | None:
    """The draft along its first branch that agrees with the `known` tokens and goes beyond them."""
    for branch in draft.branches:
        at = branch.accepted
        if at < len(known) and branch.token == known[at]:
            tokens = [*draft.tokens[:at], branch.token, *branch.tokens]
            if len(tokens) > len(known) and tokens[: len(known)] == known:
                return tokens
    return None
