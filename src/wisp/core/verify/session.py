"""A session on the verifier: its state (`states`), and the values that it consists of.

params     what was asked for; never changes
targets    the SLO and its due times (`targets`)
progress   prompt and committed tokens (`progress`)
round      what verifier and edge owe each other (`rounds`)
speed      measurements of past rounds
flight     what steps in flight will add
"""

from __future__ import annotations

import msgspec

from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Draft, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice
from wisp.core.verify.batching import Candidate
from wisp.core.verify.kv import Sharers, common_prefix
from wisp.core.verify.progress import Progress, conflict
from wisp.core.verify.rounds import OwnDraft, Pending, Round, fitting_branch, reach
from wisp.core.verify.states import TRANSITIONS, Event, State
from wisp.core.verify.targets import Targets

ACCEPTANCE = 0.8  # of a draft token, before any was seen
ACCEPTANCE_MOST = 0.98  # below 1, which `expected` could not divide by
ACCEPTANCE_RATE = 0.04  # smoothing, per draft token


class Parameters(msgspec.Struct, frozen=True):
    """What was asked for. A resumed session must have the same."""

    sampling: Sampling
    max_tokens: int
    ignore_eos: bool
    sharers: Sharers  # API key and salt

    @classmethod
    def of(cls, key: str, open_: Open) -> Parameters:
        return cls(open_.sampling, open_.max_tokens, open_.ignore_eos, (key, open_.salt))


class Flight:
    """What steps in flight will add to a session.

    slices: its slices in them. void: so many of these, the oldest, are to be dropped
    kv:     tokens that they feed. tokens: that they commit, but for drafts
    last:   the newest of them, in step number `step`. own: the draft in it, if that is the verifier's own
    waits:  the session's next draft is better made when all of them are back
    """

    __slots__ = ("kv", "last", "own", "slices", "step", "tokens", "void", "waits")

    def __init__(self) -> None:
        self.clear()

    def add(self, step: int, slice_: Slice, own: OwnDraft | None = None) -> None:
        self.slices += 1
        self.kv += len(slice_.tokens)
        self.tokens += slice_.sample
        self.last: Slice | None = slice_
        self.step = step
        self.own: OwnDraft | None = own
        self.waits = False

    def back(self, slice_: Slice) -> bool:
        """The oldest one, `slice_`, is back. Returns whether it is to be dropped."""
        self.slices -= 1
        self.kv -= len(slice_.tokens)
        self.tokens -= slice_.sample
        void = self.void > 0
        self.void -= void
        return void

    def drop(self) -> None:
        """Whatever comes back is of no use any more."""
        self.void = self.slices

    def clear(self) -> None:
        """Nothing will come back."""
        self.slices = self.void = self.kv = self.tokens = 0
        self.last, self.step, self.own = None, -1, None
        self.waits = False


class Speed:
    """Smoothed measurements of past rounds."""

    __slots__ = ("acceptance", "answered_at")

    def __init__(self, now: float) -> None:
        self.acceptance = ACCEPTANCE  # of a draft token whose predecessors were accepted
        self.answered_at = now  # when the last verdict left

    def verified(self, now: float, n_draft: int, accepted: int) -> None:
        self.answered_at = now
        if not n_draft:
            return
        acceptance = self.acceptance
        for i in range(min(accepted + 1, n_draft)):
            acceptance += ACCEPTANCE_RATE * ((ACCEPTANCE_MOST if i < accepted else 0.0) - acceptance)
        self.acceptance = acceptance


def expected(acceptance: float, n_draft: int) -> float:
    """Expected number of tokens that a draft of this length commits, the target's own included."""
    missed: float = acceptance ** (n_draft + 1)
    return (1.0 - missed) / (1.0 - acceptance)


class Session:
    """One generation. No I/O."""

    # Slots, for faster attribute access.
    __slots__ = (
        "bucket", "cached", "candidate", "connection", "epoch", "flight", "handle", "has_place", "id", "key", "params",
        "progress", "round", "since", "slot", "speed", "state", "targets",
    )  # fmt: skip

    def __init__(self, handle: int, key: str, connection: int, open_: Open, now: float) -> None:
        self.handle = handle
        self.id = open_.session
        self.key = key
        self.connection = connection  # -1: none
        self.epoch = open_.epoch
        self.params = Parameters.of(key, open_)
        self.targets = Targets(open_.slo, now, begun=bool(open_.committed))
        self.progress = Progress(open_)
        self.round = Round(open_)
        self.speed = Speed(now)
        self.flight = Flight()
        self.state = State.WAITING
        self.since = now  # when it began to wait, for its edge or for the engine
        self.has_place = False  # counted in Admission
        self.slot: int | None = None
        self.cached = 0  # tokens of the chain with KV in the slot
        self.bucket: dict[int, Session] | None = None  # of SessionIndex
        self.candidate: Candidate | None = None  # for the next step; kept until something changes

    def go(self, event: Event) -> State:
        """Make a transition. Raises ProtocolError("out_of_turn"), and stays, if the table has none."""
        to = TRANSITIONS[self.state].get(event)
        if to is None:
            raise ProtocolError("out_of_turn", f"{event.name.lower()} makes no sense while {self.state.name}")
        self.state = to
        return to

    @property
    def n_committed(self) -> int:
        return self.progress.committed

    @property
    def remaining(self) -> int:
        """Generated tokens still allowed."""
        return self.params.max_tokens - self.progress.committed

    @property
    def due(self) -> float:
        """When the next token must leave the verifier; inf without an SLO."""
        return self.targets.due(self.progress.committed)

    def intake(self, draft: Draft, now: float) -> Pending | Verdict:
        """Compare a draft with the committed tokens: something to verify, or an answer at once.

        Draft tokens that are committed already are skipped. A draft that disagrees with them goes on along the branch
        that agrees. Without one, or if it adds nothing, it is answered with what was committed since its `base`.
        """
        round_, base, tokens = draft.round, draft.base, draft.tokens
        known = self.progress.tokens_from(base)
        head = common_prefix(known, tokens)
        if draft.branches and head < len(known) and (branch := fitting_branch(draft, known)) is not None:
            tokens, head = branch, len(known)
        self.round.number = round_
        if known and (head < len(known) or head == len(tokens)):
            return self.answer(round_, base, head)
        # The last token allowed is always the target's own, so a longer draft is of no use.
        return Pending(round_, base, head, tokens[head : head + max(self.remaining - 1, 0)], now)

    def relax(self, now: float) -> None:
        """The SLO is lost: from now on twice the TPOT target is enough."""
        self.targets.relax(now, self.progress.committed)
        self.candidate = None

    def verified(self, now: float, n_draft: int, accepted: int) -> None:
        if now < self.targets.first_at:
            self.targets.first_at = now
        self.speed.verified(now, n_draft, accepted)

    def extends(self, draft: Draft) -> bool:
        """Must `draft`, which continues the draft that waits for a step, wait for that one's verdict?

        Its rows are worth computing only if the earlier draft is right. But where the earlier one is empty, as in an
        Open, and rows cost nothing, the new draft takes its place and runs with the prompt.
        """
        pending = self.round.pending
        if pending is None or not (pending.draft or self.round.price > 0.0):
            return False
        known = self.progress.tokens_from(draft.base)
        end = len(known) + len(pending.draft)
        return reach(draft) > end and draft.tokens[:end] == known + pending.draft

    def answer(
        self,
        round_: int,
        base: int,
        accepted: int,
        *,
        finish: str = "",
        queue_ms: float = 0.0,
        engine_ms: float = 0.0,
    ) -> Verdict:
        """The verdict on `round_`, which is also kept for duplicates."""
        progress, round_state = self.progress, self.round
        entries = progress.entries_from(base) if progress.logprobs is not None else []
        tokens = progress.tokens_from(base)
        round_state.heard = base + len(tokens)
        round_state.verdict = verdict = Verdict(
            self.id, round_, base, accepted, tokens, finish, entries, queue_ms, engine_ms, round_state.price,
            progress.reused or 0,
        )  # fmt: skip
        return verdict

    def adopt(self, open_: Open) -> None:
        """Resume. Of two committed histories the longer wins, if the other is its prefix.

        Raises ProtocolError("conflict") otherwise, and if prompt or parameters differ.
        """
        if self.params != Parameters.of(self.key, open_):
            raise conflict()
        if self.progress.adopt(open_):
            self.flight.drop()  # these slices began at the end of a shorter chain
        self.round.heard = len(open_.committed)
        self.round.serve = open_.serve
        self.round.clear()
