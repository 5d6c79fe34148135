"""A session as the verifier sees it: its state machine (a table) and what it has committed.

    READY --picked--> RUNNING --verdict--> WAITING --draft--> READY ...
                              `--more----> READY   (a longer prompt, server mode, a draft already here)

READY means "has work"; whether it has a KV slot is another matter. A lost edge parks a session (or, in the
middle of a step, leaves it ORPHANED until the step ends); a resume brings it back. A session cancelled while
its step runs is DOOMED: it ends with the step.
"""

from __future__ import annotations

import math
from enum import Enum, auto

import msgspec

from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Draft, Open, Verdict
from wisp.core.protocol.step import TokenLogprob
from wisp.core.verify.batching import Candidate
from wisp.core.verify.kv import Tokens, common_prefix, packed


class State(Enum):
    """Where a session stands."""

    READY = auto()  # has work
    RUNNING = auto()  # takes part in the step that is being run
    WAITING = auto()  # for its edge
    PARKED = auto()  # edge gone
    ORPHANED = auto()  # running, edge gone
    DOOMED = auto()  # running, cancelled
    ENDED = auto()

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is slow, and this is looked up a lot


class Event(Enum):
    """What can happen to a session."""

    PICKED = auto()
    MORE = auto()  # step ended, and there is more to do
    VERDICT = auto()  # answered, nothing more to do
    DRAFT = auto()
    LOST = auto()
    RESUMED = auto()
    CANCEL = auto()
    FINISHED = auto()

    __hash__ = object.__hash__


# Found sooner than through their class, where each of a thousand sessions is looked at.
READY, RUNNING, WAITING, PARKED, ORPHANED, DOOMED, ENDED = State
PICKED, MORE, VERDICT, DRAFT, LOST, RESUMED, CANCEL, FINISHED = Event

S, E = State, Event
TRANSITIONS: dict[State, dict[Event, State]] = {
    S.READY: {
        E.PICKED: S.RUNNING,
        E.DRAFT: S.READY,
        E.VERDICT: S.WAITING,  # what it waited for could be answered at once
        E.LOST: S.PARKED,
        E.RESUMED: S.WAITING,
        E.CANCEL: S.ENDED,
    },
    S.RUNNING: {
        E.MORE: S.READY,
        E.VERDICT: S.WAITING,
        E.DRAFT: S.RUNNING,
        E.LOST: S.ORPHANED,
        E.RESUMED: S.RUNNING,
        E.CANCEL: S.DOOMED,
        E.FINISHED: S.ENDED,
    },
    S.WAITING: {
        E.DRAFT: S.READY,
        E.LOST: S.PARKED,
        E.RESUMED: S.WAITING,
        E.CANCEL: S.ENDED,
        E.FINISHED: S.ENDED,
    },
    S.PARKED: {E.RESUMED: S.WAITING, E.CANCEL: S.ENDED},
    S.ORPHANED: {
        E.MORE: S.PARKED,
        E.VERDICT: S.PARKED,
        E.RESUMED: S.RUNNING,
        E.CANCEL: S.DOOMED,
        E.FINISHED: S.ENDED,
    },
    S.DOOMED: {E.MORE: S.ENDED, E.VERDICT: S.ENDED, E.FINISHED: S.ENDED},
    S.ENDED: {},
}
IN_ENGINE = frozenset({S.RUNNING, S.ORPHANED, S.DOOMED})


# The server keeps a little more than it promises: of a target for the first token, the rest is for the ways of
# question and answer; of a pace, for what a round brings by chance.
TTFT_HERE = 0.95
PACE_HERE = 0.96


class Pending(msgspec.Struct, frozen=True):
    """An answer owed to the edge: `draft` continues the committed tokens; the rest goes into the verdict.

    `head` draft tokens before `draft` were found to agree already.
    """

    round: int
    base: int
    head: int
    draft: list[int]
    since: float


class Session:
    """One generation. `chain` is prompt + committed tokens; nothing here does I/O."""

    # More attributes than an instance's dictionary has fast ways to.
    __slots__ = (
        "acceptance", "answered_at", "away_s", "cached", "chain", "connection", "discard", "entries", "epoch",
        "file", "first_at", "handle", "has_place", "heard", "id", "ignore_eos", "inbox", "key", "late",
        "late_from", "logprobs", "max_tokens", "n_prompt", "opened", "pending", "price", "round", "sampling",
        "serve", "sharers", "since", "slo", "slot", "state", "tpot_s", "usual", "verdict", "work",
    )  # fmt: skip

    def __init__(self, handle: int, key: str, connection: int, open_: Open, now: float) -> None:
        self.handle = handle
        self.id = open_.session
        self.key = key
        self.sharers = (key, open_.salt)
        self.connection = connection
        self.epoch = open_.epoch
        self.state = State.WAITING
        self.has_place = False  # counted among those that are open
        self.sampling = open_.sampling
        self.max_tokens = open_.max_tokens
        self.ignore_eos = open_.ignore_eos
        self.logprobs = open_.logprobs
        self.slo = open_.slo
        # Seconds per token that are kept here (0: no target).
        self.tpot_s = open_.slo.tpot_ms / 1e3 * PACE_HERE if open_.slo else 0.0
        self.serve = open_.serve
        self.n_prompt = len(open_.prompt)
        self.chain = _chain(open_)
        self.entries: list[TokenLogprob] = []  # log probabilities of the last tokens of the chain
        self.slot: int | None = None
        self.cached = 0  # tokens of the chain whose KV is in the slot
        self.heard = len(open_.committed)  # generated tokens that the edge is known to have, or was sent
        self.round = -1  # last round answered, or being answered
        self.pending: Pending | None = None
        self.inbox: Draft | None = None  # arrived while the step ran
        self.discard = False  # the running step started from a shorter chain than we have now
        self.verdict: Verdict | None = None  # the last one, for duplicates
        self.opened = now
        self.since = now  # of the present state, as far as work goes
        self.first_at = now if open_.committed else math.inf  # when the first token left
        self.answered_at = now  # when the last verdict left
        self.acceptance = 0.8  # smoothed: of a draft token whose predecessors were accepted
        self.usual = 2.0  # smoothed: tokens committed in a round
        self.late = False  # its SLO is lost: served at half the pace from `late_from` on
        self.late_from = 0.0
        self.price = 0.0  # of a draft token, as last told
        self.away_s = 0.0  # smoothed: from a verdict to the draft that follows
        self.file: dict[int, Session] | None = None  # of those that wait for the same, if it waits
        self.work: Candidate | None = None  # what it could do in the next step, while that does not change

    def go(self, event: Event) -> State:
        """Move on. Raises ProtocolError("out_of_turn"), and stays, where the table has no such move."""
        to = TRANSITIONS[self.state].get(event)
        if to is None:
            raise ProtocolError("out_of_turn", f"{event.name.lower()} makes no sense while {self.state.name}")
        self.state = to
        return to

    @property
    def n_committed(self) -> int:
        """Generated tokens so far."""
        return len(self.chain) - self.n_prompt

    @property
    def heard_round(self) -> int:
        """The last round that its edge is known to have sent."""
        return self.inbox.round if self.inbox is not None else self.round

    @property
    def room(self) -> int:
        """Generated tokens still allowed."""
        return self.max_tokens - len(self.chain) + self.n_prompt

    @property
    def lag_s(self) -> float:
        """How far behind its pace it was when it was last answered; negative: ahead."""
        return self.lag_s_if(self.due) if self.first_at < math.inf else 0.0

    def lag_s_if(self, due: float) -> float:
        """The same, where `due` is known."""
        return self.answered_at + self.tpot_s - due

    @property
    def due(self) -> float:
        """When the next token must leave to be in time. The way home is the same for the first token and the
        later ones, so it counts only towards the time to the first, which begins when the user asks."""
        slo = self.slo
        if slo is None:
            return math.inf
        committed = len(self.chain) - self.n_prompt
        if self.late:
            return self.late_from + committed * 2 * self.tpot_s
        if self.first_at < math.inf:
            return self.first_at + committed * self.tpot_s if slo.tpot_ms else math.inf
        return self.opened + slo.ttft_ms / 1e3 * TTFT_HERE if slo.ttft_ms else math.inf

    def append(self, tokens: list[int], logprobs: list[TokenLogprob]) -> None:
        """Commit `tokens`, with their log probabilities, unless the step was not asked for any."""
        self.chain.fromlist(tokens)
        if self.logprobs is None or len(logprobs) < len(tokens):
            self.entries = []  # what there is must be of the last tokens
        else:
            self.entries += logprobs[: len(tokens)]

    def committed_from(self, base: int) -> list[int]:
        """Generated tokens from `base` on."""
        return self.chain[self.n_prompt + base :].tolist()

    def entries_from(self, base: int) -> list[TokenLogprob]:
        """Their log probabilities, as far as known: exactly one each, or none."""
        n = self.n_committed - base
        return self.entries[-n:] if 0 < n <= len(self.entries) else []

    def intake(self, round_: int, base: int, tokens: list[int], now: float) -> Pending | Verdict:
        """Place a draft on what is committed: something to verify, or the answer at once.

        What the draft says of tokens that are committed already is checked here: an agreeing head is
        skipped; a draft that disagrees, or says nothing new, is answered with what is committed since.
        """
        known = self.committed_from(base)
        head = common_prefix(known, tokens)
        self.round = round_
        if known and (head < len(known) or head == len(tokens)):
            return self.answer(round_, base, head)
        # One token of the room is the target's own, so a longer draft could not be used.
        return Pending(round_, base, head, tokens[head : head + max(self.room - 1, 0)], now)

    def in_time(self, now: float) -> bool:
        """Would it have met its SLO, seen from here, if it ended now?"""
        slo = self.slo
        if slo is None:
            return True
        if self.late or (slo.ttft_ms and self.first_at - self.opened > slo.ttft_ms / 1e3):
            return False
        return not slo.tpot_ms or now - self.first_at <= max(1, self.n_committed - 1) * slo.tpot_ms / 1e3

    def promise_nothing(self) -> None:
        """Its SLO, which nobody could keep, is lost from the start: it is served like one without."""
        self.slo, self.tpot_s, self.late = None, 0.0, True

    def relax(self, now: float) -> None:
        """Its SLO can no longer be met: from now on half the pace will do."""
        self.late = True
        assert self.slo is not None
        grace = self.slo.ttft_ms / 1e3 if self.first_at == math.inf else 0.0
        self.late_from = now + grace - self.n_committed * 2 * self.tpot_s
        self.work = None

    def expected(self, n_draft: int) -> float:
        """Tokens that a draft of so many is expected to commit, the target's own included."""
        if not n_draft:
            return 1.0
        a = self.acceptance
        missed: float = a ** (n_draft + 1)
        return (1.0 - missed) / (1.0 - a)

    def verified(self, now: float, n_draft: int, accepted: int) -> None:
        """A step has committed tokens of this session."""
        if now < self.first_at:
            self.first_at = now
        self.answered_at = now
        acceptance = self.acceptance
        for i in range(min(accepted + 1, n_draft)):
            acceptance += 0.04 * ((0.98 if i < accepted else 0.0) - acceptance)
        self.acceptance = acceptance

    def returned(self, now: float) -> None:
        """The edge's next draft is here."""
        away = now - self.answered_at
        self.away_s += (away - self.away_s) * (0.25 if self.away_s else 1.0)

    def extends(self, draft: Draft) -> bool:
        """Does it go on where the draft that waits for its step ends? (A first draft had better ride along with the
        prompt; so had one at a time when rows cost nothing.)"""
        p = self.pending
        if p is None or not (p.draft or self.price > 0.0):
            return False
        known = self.committed_from(draft.base)
        end = len(known) + len(p.draft)
        return len(draft.tokens) > end and draft.tokens[:end] == known + p.draft

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
        self.heard = self.n_committed
        entries = self.entries_from(base) if self.logprobs is not None else []
        tokens = self.committed_from(base)
        self.verdict = verdict = Verdict(
            self.id, round_, base, accepted, tokens, finish, entries, queue_ms, engine_ms, self.price
        )
        return verdict

    def adopt(self, open_: Open) -> None:
        """Resume: of two committed histories the longer wins, if the other is its prefix.

        Raises ProtocolError("conflict") otherwise, and where prompt or parameters differ.
        """
        same = (
            self.n_prompt == len(open_.prompt)
            and self.chain[: self.n_prompt] == packed(open_.prompt)
            and self.sampling == open_.sampling
            and self.max_tokens == open_.max_tokens
            and self.ignore_eos == open_.ignore_eos
            and self.sharers == (self.key, open_.salt)
        )
        if not same:
            raise ProtocolError(
                "conflict", "a session is resumed with the prompt and parameters it was opened with"
            )
        mine = self.committed_from(0)
        shared = common_prefix(mine, open_.committed)
        if shared < min(len(mine), len(open_.committed)):
            raise ProtocolError("conflict", f"two histories of this session differ at token {shared}")
        if len(open_.committed) > len(mine):
            self.chain = _chain(open_)
            self.entries = []
            self.discard = self.state in IN_ENGINE
        self.heard = len(open_.committed)
        self.serve = open_.serve
        if open_.logprobs != self.logprobs:
            self.logprobs, self.entries = open_.logprobs, []
        self.pending = None
        self.inbox = None
        self.verdict = None


def _chain(open_: Open) -> Tokens[int]:
    chain = packed(open_.prompt)
    chain.fromlist(open_.committed)
    return chain
