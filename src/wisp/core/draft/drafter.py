"""The drafter: a session as the edge sees it. Events in, actions out; no I/O, no clock, no model.

    DETACHED --connected--> IN_FLIGHT --verdict--> DRAFTING --sent--> IN_FLIGHT ... --> DONE
                               `--(server mode)--> SERVED --tokens--> SERVED ... (drafting pays again) --> DRAFTING

What is guessed of the text beyond the committed tokens is one chain: its first `sent` tokens are in flight, the
rest are the draft in the making, or were drafted ahead. A verdict that agrees moves along the chain; one that
does not clears it.

A draft made ahead may leave before the verdict it bets on (`Ahead.send`): it restates the chain, the tokens in flight
and the guess at the verdict's own token included. If all that was right, the verifier has the next draft the moment
its step ends, and no round trip is waited for; otherwise it costs the verifier nothing but a comparison.

The edge owns the truth: prompt and committed tokens live here. Whatever happens to a connection or a verifier,
`connected` opens the session again from what is committed, and text goes on where it was; but never with another
model than the one that it was begun with.
"""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from wisp.core.draft.policies import Ahead, DraftingPolicy, Odds, View
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.errors import ProtocolError, RequestError
from wisp.core.protocol.messages import MODEL_CHANGED, Draft, Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import Committed

REOPEN = frozenset({"unknown_session", "unknown_base", "out_of_turn", "engine_error", "stale_epoch"})
BUSY = {"overloaded": 429, "rate_limit_exceeded": 429, "shutting_down": 503}  # and the HTTP status for each
MAX_REOPENINGS = 5  # in a row without a new token


def busy_error(code: str, message: str, retry_after: float) -> RequestError:
    """What the client is told of a refusal for now; `code` is one of BUSY."""
    kind = "rate_limit_error" if code == "rate_limit_exceeded" else "server_error"
    return RequestError(BUSY[code], message, code=code, type=kind, retry_after=max(retry_after, 1.0))


def model_changed() -> RequestError:
    """What the client is told when the verifier has another model than the one that wrote what is committed."""
    return RequestError(502, MODEL_CHANGED, code="model_changed", type="server_error")


class Phase(Enum):
    """Where a session stands, seen from the edge."""

    DETACHED = auto()  # no connection
    DRAFTING = auto()  # building a draft
    IN_FLIGHT = auto()  # a draft awaits its verdict
    SERVED = auto()  # the verifier decodes by itself
    DONE = auto()


DETACHED, DRAFTING, IN_FLIGHT, SERVED, DONE = Phase  # found sooner than through their class


class Reopen(msgspec.Struct, frozen=True):
    """Call `connected` again: at once on this connection, or after `after_s`."""

    after_s: float


Action = Open | Draft | Committed | Reopen


class Flight(msgspec.Struct):
    """A draft on its way: `drafted` tokens sent at `sent_ms`, whose verdict is expected at `due_ms`.

    alone: no other was in flight when it was sent, so that its time says how long a round takes
    """

    round: int
    drafted: int
    sent_ms: float
    due_ms: float
    alone: bool = True


class Task(msgspec.Struct, frozen=True):
    """What is to be generated. `max_tokens` fits the context together with the prompt. `salt`: see `messages.Open`.

    digest: of the model for which the prompt was encoded; "" for the first that is met.
    """

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    ignore_eos: bool = False
    logprobs: int | None = None
    slo: Slo | None = None
    salt: str = ""
    digest: str = ""


class Drafter:
    """One session. `policy` None means: never draft, let the verifier decode. `ahead` None: never draft ahead.

    The host calls `connected`, `lost`, `verdict` and `refused` as these happen, and, while `wants_token`,
    asks its draft engine for a token after `context` and hands it to `proposed`. Times are milliseconds.
    """

    __slots__ = (
        "_began_ms", "_dry", "_ended", "_epoch", "_flights", "_goes_on_ms", "_odds", "_opened", "_p", "_reopenings",
        "_round", "_unasked", "_warm", "ahead", "chain", "committed", "digest", "eos", "max_draft", "pace", "phase",
        "policy", "sent", "serve", "session", "task", "wasted",
    )  # fmt: skip

    def __init__(
        self,
        session: str,
        task: Task,
        policy: DraftingPolicy | None,
        eos: frozenset[int],
        *,
        ahead: Ahead | None = None,
        pace: RoundTimes | None = None,
    ) -> None:
        self.session = session
        self.task = task
        self.digest = task.digest  # of the model that this session is of
        self.policy = policy
        self.ahead = ahead
        self.eos = eos
        self.pace = pace or RoundTimes()
        self.phase = DETACHED
        self.committed: list[int] = []
        self.chain: list[int] = []  # guesses beyond the committed tokens
        self.sent = 0  # how many of them are in flight
        self.wasted = 0  # tokens drafted and never sent
        self.max_draft = 0
        self._odds: list[Odds] = []  # of the chain
        self._p: list[float] = []  # their probabilities alone, as policies read them
        self._round = -1
        self._opened = -1  # the round of the last Open
        self._epoch = -1
        self.serve = policy is None  # what the last message asked for
        self._warm = False  # the draft engine has read the prompt
        self._dry = False  # nothing more to propose until the next verdict
        self._ended = False  # the chain ends with an end of sequence: nothing comes after that
        self._goes_on_ms = -1.0  # when it was last found worth while to draft on ahead
        self._flights: list[Flight] = []  # at most two: the second was sent ahead
        self._began_ms = 0.0  # when this round's clock started: the last verdict
        self._unasked = 0  # tokens that came during this round without having been asked for
        self._reopenings = 0

    @property
    def position(self) -> int:
        """Index, among the generated tokens, of the token to draft next."""
        return len(self.committed) + len(self.chain)

    def context(self) -> list[int]:
        """What the next drafted token follows."""
        return self.task.prompt + self.committed + self.chain

    def wants_token(self, now_ms: float) -> bool:
        """Is it the draft engine's turn?"""
        phase = self.phase
        if phase is not IN_FLIGHT:
            return phase is DRAFTING
        if self._goes_on_ms == now_ms:  # found just now, and nothing has happened since
            return True
        ahead, policy = self.ahead, self.policy
        if ahead is None or policy is None or self._dry or self.serve or self._ended:
            return False
        if len(self.committed) + len(self.chain) >= self.task.max_tokens - 1:
            return False
        return ahead.worth(self._view(now_ms), self.pace.price if policy.priced else 0.0)

    # --- events

    def connected(self, now_ms: float, max_draft: int, digest: str = "") -> list[Action]:
        """A verifier is there and takes drafts up to `max_draft`: open the session, or open it again.

        digest: of its model. Raises RequestError if the session is of another.
        """
        if self.phase is DONE:
            return []
        if self.digest and digest != self.digest:
            self.phase = DONE
            raise model_changed()
        self.digest = digest
        self.max_draft = max_draft
        self._epoch += 1
        self._round += 1
        self._opened = self._round
        self.serve = self.policy is None
        self.sent = max(0, min(self.sent or len(self.chain), self.max_draft, self._left() - 1))
        self._began_ms = now_ms
        self._dry = False
        self.phase = SERVED if self.serve else IN_FLIGHT
        self._flights = [self._flight(now_ms, self.sent)] if not self.serve else []
        task = self.task
        open_ = Open(
            self.session,
            self._epoch,
            task.prompt,
            task.sampling,
            task.max_tokens,
            round=self._round,
            committed=list(self.committed),
            draft=self.chain[: self.sent],
            serve=self.serve,
            ignore_eos=task.ignore_eos,
            logprobs=task.logprobs,
            slo=task.slo,
            salt=task.salt,
            digest=self.digest,
        )
        return [open_]

    def lost(self) -> None:
        """The connection is gone."""
        if self.phase is not DONE:
            self.phase = DETACHED
            self._flights = []

    def proposed(
        self, now_ms: float, token: int | None, signal: Signal, took_ms: float = 0.0
    ) -> list[Action]:
        """The draft engine, in `took_ms`, proposes `token` after `context` (None: it has nothing to propose)."""
        phase = self.phase
        if phase is not DRAFTING and phase is not IN_FLIGHT:
            return []  # a broken connection came first
        policy, p = self.policy, self._p
        assert policy is not None
        if token is None:
            self._dry = True
        else:
            if self._warm:
                self.pace.drafted(took_ms)
            else:
                self._warm = True  # the first step reads the prompt
            odds = policy.judge(signal, p)
            self._odds.append(odds)
            p.append(odds.p)
            self.chain.append(token)
            self._ended = token in self.eos and not self.task.ignore_eos
        return self._send_ahead(now_ms) if phase is IN_FLIGHT else self._go_on(now_ms, self._view(now_ms))

    def verdict(self, now_ms: float, verdict: Verdict, arrived_ms: float | None = None) -> list[Action]:
        """Take what is committed since, and go on. It may have arrived earlier, while a draft step was running.

        Raises ProtocolError where the verdict contradicts what was committed before: then the text up to
        here stands, and this verifier is not to be trusted with the rest.
        """
        if self.phase is DONE:
            return []
        self._goes_on_ms = -1.0
        new = self._new_tokens(verdict)
        self.pace.price = verdict.price
        flight = self._landed(verdict.round)
        settled = flight is not None
        before = len(verdict.tokens) - len(new)  # of the draft, settled earlier
        drafted = accepted = 0
        if flight is not None and new:  # else it was stale, and nothing was verified
            drafted = max(0, flight.drafted - before)
            accepted = max(0, verdict.accepted - before)
        logprobs = verdict.logprobs[-len(new) :] if new and verdict.logprobs else []
        fresh = Committed(new, logprobs, drafted, accepted, min(len(new), accepted), verdict.finish)
        if flight is not None:
            arrived = now_ms if arrived_ms is None else arrived_ms
            self._learn(now_ms, arrived, flight, drafted, verdict, new)
        elif self.serve and new and self.phase is SERVED:
            self.pace.decoded(len(new), now_ms - self._began_ms)
            self._began_ms = now_ms
        elif not self.serve:
            self._unasked += len(new)
        self._commit(new, drafted if settled else self.sent)
        if verdict.finish:
            self.phase = DONE
            return [fresh]
        deliver: list[Action] = [fresh] if new or drafted else []
        if settled or (self.phase is IN_FLIGHT and not self._flights):  # or what it bet on was wrong
            self._began_ms = now_ms
            if self._flights:  # its successor is with the verifier already
                self._flights[0].due_ms = now_ms + self.pace.engine_ms(self.sent)
                return deliver
            return deliver + self._start_round(now_ms)
        if self.phase is SERVED and self.policy is not None:
            return deliver + self._start_round(now_ms)
        return deliver

    def refused(self, refused: Refused) -> list[Action]:
        """The verifier will not. Some refusals are mended by opening again; the others raise RequestError.

        One that a later Open has overtaken, or will, tells nothing new: whatever was in flight behind a draft that
        is refused is refused as well.
        """
        if self.phase is DETACHED or self.phase is DONE or 0 <= refused.round < self._opened:
            return []
        if refused.code in REOPEN and self._reopenings < MAX_REOPENINGS:
            self._reopenings += 1
            self.lost()
            return [Reopen(refused.retry_after)]
        busy = refused.code in BUSY
        if busy and self.committed:  # admitted before, so only the verifier has changed: insist
            self.lost()
            return [Reopen(max(refused.retry_after, 0.1))]
        self.phase = DONE
        if busy:
            raise busy_error(refused.code, refused.message, refused.retry_after)
        if refused.code == "context_length_exceeded":
            raise RequestError(400, refused.message, code=refused.code, param="messages")
        raise RequestError(
            502, f"the verifier refused: {refused.message}", code=refused.code, type="server_error"
        )

    # --- inside a round

    def _start_round(self, now_ms: float) -> list[Action]:
        assert self.policy is not None
        if self.serve and self.phase is IN_FLIGHT:  # the verifier has taken over, as it was asked to
            self.phase = SERVED
            return []
        view = self._view(now_ms)
        better_served = self.policy.serve(view)
        if better_served and self.phase is SERVED:
            return []
        self.serve = better_served
        self.phase = DRAFTING
        self._dry = False
        return [self._send(now_ms, 0)] if better_served else self._go_on(now_ms, view)

    def _go_on(self, now_ms: float, view: View) -> list[Action]:
        """Draft another token, or send what there is."""
        policy = self.policy
        assert policy is not None
        most = min(self.max_draft, self._left() - 1)  # one token is the target's
        full = len(self.chain) - self.sent >= most
        if not (full or self._dry or self._ended) and policy.more(view):
            return []
        return [self._send(now_ms, policy.take(view))]

    def _send(self, now_ms: float, most: int) -> Draft:
        self._round += 1
        self.sent = sent = max(0, min(most, len(self.chain), self.max_draft, self._left() - 1))
        self._dry = False
        self.phase = IN_FLIGHT
        self._flights.append(self._flight(now_ms, sent))
        return Draft(self.session, self._round, len(self.committed), self.chain[:sent], self.serve)

    def _send_ahead(self, now_ms: float) -> list[Action]:
        """Send what was drafted ahead before the verdict is here, if it is complete, or there is no time for more."""
        n, sent, flights, ahead = len(self.chain), self.sent, self._flights, self.ahead
        first = sent + 1  # the one before it guesses the verdict's own token
        if n <= first or len(flights) != 1 or ahead is None or not ahead.send or self.serve:
            return []
        pace, policy, due_ms, opening = self.pace, self.policy, flights[0].due_ms, self._round == 0
        assert policy is not None
        view, wait = View(now_ms, self._p, sent, first, due_ms, pace, opening), pace.wait
        last_call = due_ms - pace.line.value - 0.5 * wait.deviation
        late = wait.n > 0 and now_ms + pace.draft.value > last_call and not opening
        full = self._dry or self._ended or len(self.committed) + n >= self.task.max_tokens - 1
        complete = late or full or not policy.more(view)
        if not complete and ahead.worth(view, pace.price if policy.priced else 0.0):
            self._goes_on_ms = now_ms
            return []
        n = policy.take(view)
        return [self._send(now_ms, first + n)] if n > 0 else []

    def _flight(self, now_ms: float, drafted: int) -> Flight:
        due_ms = now_ms + self.pace.wait_ms(drafted)
        return Flight(self._round, drafted, now_ms, due_ms, not self._flights)

    def _landed(self, round_: int) -> Flight | None:
        """The flight that a verdict answers; those before it were replaced by it."""
        for i, flight in enumerate(self._flights):
            if flight.round == round_ and self.phase is IN_FLIGHT:
                del self._flights[: i + 1]
                return flight
        return None

    def _view(self, now_ms: float) -> View:
        """What the policy sees."""
        flights, sent = self._flights, self.sent
        due_ms = flights[-1].due_ms if flights else 0.0
        return View(now_ms, self._p, sent, sent, due_ms, self.pace, self._round == 0)

    def _left(self) -> int:
        """Tokens still to come; the last of all is always the target's own."""
        return self.task.max_tokens - len(self.committed)

    def _learn(
        self, now_ms: float, arrived_ms: float, flight: Flight, drafted: int, verdict: Verdict, new: list[int]
    ) -> None:
        """What a settled round tells of pace and acceptance. Its correction or bonus tells of the next guess, too."""
        assert self.policy is not None
        pace = self.pace
        if flight.round > 0:  # the first one read the prompt
            waited = arrived_ms - flight.sent_ms if flight.alone else None
            if new:
                pace.verdict(drafted, waited, verdict.queue_ms, verdict.engine_ms)
            pace.round(drafted, len(new) + self._unasked, now_ms - self._began_ms)
        self._unasked = 0
        chain, agreed = self.chain, 0
        both = min(len(new), len(chain))
        while agreed < both and new[agreed] == chain[agreed]:
            agreed += 1
        seen = min(both, agreed + 1)
        pace.acceptance.add_each(agreed, seen)
        self.policy.observe(self._odds[:seen], agreed)

    def _new_tokens(self, verdict: Verdict) -> list[int]:
        base, tokens, n = verdict.base, verdict.tokens, len(self.committed)
        if base == n:
            return tokens
        known = self.committed[base:]
        overlap = min(len(known), len(tokens))
        if base > n or known[:overlap] != tokens[:overlap]:
            raise ProtocolError("conflict", "the verifier contradicts what it committed before")
        return tokens[overlap:]

    def _commit(self, new: list[int], answered: int) -> None:
        """Append `new`. The chain keeps what agrees with it, beyond it, and is let go otherwise; then no draft that
        is still in flight is of any use. `answered`: tokens of the chain that were verified, or will be."""
        if new:
            self._reopenings = 0
            self.committed += new
            chain = self.chain
            n = len(chain)
            gone = min(len(new), n)
            if chain[:gone] != new[:gone]:
                gone = n
                self.wasted += max(0, n - answered)
                self._flights = []
            del chain[:gone], self._odds[:gone], self._p[:gone]
            self.sent = max(0, self.sent - gone)
            self._ended = self._ended and n > gone
        if not self._flights:
            self.sent = 0
