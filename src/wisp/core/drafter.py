"""The drafter: a session as the edge sees it. Events in, actions out; no I/O, no clock, no model.

    DETACHED --connected--> DRAFTING --sent--> IN_FLIGHT --verdict--> DRAFTING ... --> DONE
                               `---- (server mode) ----> SERVED --verdict--> SERVED ...

The edge owns the truth: prompt and committed tokens live here. Whatever happens to a connection or a verifier,
`connected` opens the session again from what is committed, and text goes on where it was.
"""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from wisp.core.drafting import DraftingPolicy, Round, Signal
from wisp.core.errors import ProtocolError, RequestError
from wisp.core.messages import Draft, Open, Refused, Verdict
from wisp.core.sampling import Sampling
from wisp.core.slo import Slo
from wisp.core.work import Committed

REOPEN = frozenset({"unknown_session", "unknown_base", "engine_error", "stale_epoch", "shutting_down"})
MAX_REOPENINGS = 5  # in a row without a new token


class Phase(Enum):
    """Where a session stands, seen from the edge."""

    DETACHED = auto()  # no connection
    DRAFTING = auto()  # building a draft
    IN_FLIGHT = auto()  # a draft awaits its verdict
    SERVED = auto()  # the verifier decodes by itself
    DONE = auto()


class Reopen(msgspec.Struct, frozen=True):
    """Call `connected` again: at once on this connection, or after `after_s`."""

    after_s: float


Action = Open | Draft | Committed | Reopen


class Task(msgspec.Struct, frozen=True):
    """What is to be generated. `max_tokens` fits the context together with the prompt."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    ignore_eos: bool = False
    logprobs: int | None = None
    slo: Slo | None = None


class Drafter:
    """One session. `policy` None means: never draft, let the verifier decode.

    The host calls `connected`, `lost`, `verdict` and `refused` as these happen, and, while `wants_token`,
    asks its draft engine for a token after `context` and hands it to `proposed`.
    """

    def __init__(self, session: str, task: Task, policy: DraftingPolicy | None, eos: frozenset[int]) -> None:
        self.session = session
        self.task = task
        self.policy = policy
        self.eos = eos
        self.phase = Phase.DETACHED
        self.committed: list[int] = []
        self.draft: list[int] = []
        self.max_draft = 0
        self._round = -1
        self._epoch = -1
        self._flight: list[int] = []  # the draft that awaits its verdict
        self._started_ms = 0.0
        self._reopenings = 0

    @property
    def wants_token(self) -> bool:
        """Is it the draft engine's turn?"""
        return self.phase is Phase.DRAFTING

    @property
    def position(self) -> int:
        """Index, among the generated tokens, of the token to draft next."""
        return len(self.committed) + len(self.draft)

    def context(self) -> list[int]:
        """What the next drafted token follows."""
        return self.task.prompt + self.committed + self.draft

    # --- events

    def connected(self, max_draft: int) -> list[Action]:
        """A verifier is there and takes drafts up to `max_draft`: open the session, or open it again."""
        if self.phase is Phase.DONE:
            return []
        self.max_draft = max_draft
        self._epoch += 1
        self._round += 1
        draft = self._flight or self.draft  # what was on its way, or under way, rides along
        self._flight, self.draft = self._fitting(draft), []
        self.phase = Phase.SERVED if self.policy is None else Phase.IN_FLIGHT
        task = self.task
        open_ = Open(
            self.session,
            self._epoch,
            task.prompt,
            task.sampling,
            task.max_tokens,
            round=self._round,
            committed=list(self.committed),
            draft=list(self._flight),
            serve=self.policy is None,
            ignore_eos=task.ignore_eos,
            logprobs=task.logprobs,
            slo=task.slo,
        )
        return [open_]

    def lost(self) -> None:
        """The connection is gone."""
        if self.phase is not Phase.DONE:
            self.phase = Phase.DETACHED

    def proposed(self, now_ms: float, token: int | None, signal: Signal) -> list[Action]:
        """The draft engine proposes `token` after `context` (None: it has nothing to propose)."""
        if self.phase is not Phase.DRAFTING:
            return []  # a verdict or a broken connection came first
        assert self.policy is not None
        if token is None:
            return [self._send(now_ms)]
        decision = self.policy.decide(self._round_so_far(now_ms), signal)
        if decision.include:
            self.draft.append(token)
        over = token in self.eos and not self.task.ignore_eos
        if not decision.include or not decision.more or over or self._room() <= 0:
            return [self._send(now_ms)]
        return []

    def verdict(self, now_ms: float, verdict: Verdict) -> list[Action]:
        """Take what is committed since, and start the next round.

        Raises ProtocolError where the verdict contradicts what was committed before: then the text up to
        here stands, and this verifier is not to be trusted with the rest.
        """
        if self.phase is Phase.DONE:
            return []
        new = self._new_tokens(verdict)
        settled = self.phase is Phase.IN_FLIGHT and verdict.round == self._round
        drafted = len(self._flight) if settled else 0
        # Of the draft, only what was not committed meanwhile by an earlier verdict counts in this round.
        agreed = max(0, verdict.accepted - (len(verdict.tokens) - len(new))) if settled else 0
        fresh = Committed(
            tokens=new,
            logprobs=verdict.logprobs[-len(new) :] if new and verdict.logprobs else [],
            drafted=drafted,
            accepted=agreed,
            from_draft=min(len(new), agreed),
            finish=verdict.finish,
        )
        self._commit(new)
        if verdict.finish:
            self.phase = Phase.DONE
            return [fresh]
        deliver: list[Action] = [fresh] if new or drafted else []
        if not settled:
            return deliver
        self._flight = []
        if self.policy is not None:
            self.policy.observe(drafted, agreed)
        return deliver + self._start_round(now_ms)

    def refused(self, refused: Refused) -> list[Action]:
        """The verifier will not. Some refusals are mended by opening again; the others raise RequestError."""
        if refused.code in REOPEN and self._reopenings < MAX_REOPENINGS:
            self._reopenings += 1
            self.lost()
            return [Reopen(refused.retry_after)]
        busy = refused.code in ("overloaded", "rate_limit_exceeded")
        if busy and self.committed:  # admitted before, so only the verifier has changed: insist
            self.lost()
            return [Reopen(max(refused.retry_after, 0.1))]
        self.phase = Phase.DONE
        if busy:
            kind = "rate_limit_error" if refused.code == "rate_limit_exceeded" else "server_error"
            status, after = 429, max(refused.retry_after, 1.0)
            raise RequestError(status, refused.message, code=refused.code, type=kind, retry_after=after)
        if refused.code == "context_length_exceeded":
            raise RequestError(400, refused.message, code=refused.code, param="messages")
        raise RequestError(
            502, f"the verifier refused: {refused.message}", code=refused.code, type="server_error"
        )

    # --- inside a round

    def _start_round(self, now_ms: float) -> list[Action]:
        assert self.policy is not None
        self.phase = Phase.DRAFTING
        self._started_ms = now_ms
        if self._room() <= 0 or not self.policy.start(self._round_so_far(now_ms)):
            return [self._send(now_ms)]
        return []

    def _send(self, now_ms: float) -> Draft:
        self._round += 1
        self._flight, self.draft = self.draft, []
        self.phase = Phase.IN_FLIGHT
        base = len(self.committed)
        return Draft(self.session, self._round, base, list(self._flight), now_ms - self._started_ms)

    def _round_so_far(self, now_ms: float) -> Round:
        return Round(now_ms, len(self.draft), self._room())

    def _room(self) -> int:
        """Tokens that may still join the draft; the last token of all is always the target's own."""
        left = self.task.max_tokens - len(self.committed) - 1
        return min(self.max_draft, left) - len(self.draft)

    def _fitting(self, draft: list[int]) -> list[int]:
        return draft[: max(0, min(self.max_draft, self.task.max_tokens - len(self.committed) - 1))]

    def _new_tokens(self, verdict: Verdict) -> list[int]:
        known = self.committed[verdict.base :]
        overlap = min(len(known), len(verdict.tokens))
        if verdict.base > len(self.committed) or known[:overlap] != verdict.tokens[:overlap]:
            raise ProtocolError("conflict", "the verifier contradicts what it committed before")
        return verdict.tokens[overlap:]

    def _commit(self, new: list[int]) -> None:
        """Append `new`; what is drafted already keeps what agrees with it, and is let go otherwise."""
        if not new:
            return
        self._reopenings = 0
        self.committed += new
        for pending in (self.draft, self._flight):
            agrees = pending[: len(new)] == new[: len(pending)]
            del pending[: len(new) if agrees else len(pending)]
