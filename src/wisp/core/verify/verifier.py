"""The verifier: events in, actions out. Everything the server decides, without I/O, clock or thread.

    Received(Open | Draft | Cancel)  ->  change a session; sometimes answer at once
    Tick                             ->  assign KV slots, let the policy choose, Run(step)   (`planner`)
    StepDone(results)                ->  commit tokens, send Verdicts

The engine has at most `limits.depth` steps at a time (`in_flight`). `loop` feeds events with `now`, carries out the
actions, and sends a Tick when another step fits and something may have changed. Events are plain structs: a recorded
list of (now, event) replays to identical actions.
"""

from __future__ import annotations

import math

import msgspec

from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict, check_digest
from wisp.core.protocol.slo import LONGEST_MS
from wisp.core.protocol.step import ENGINE_ERROR, Slice, SliceResult
from wisp.core.verify.admission import Admission, Refusal
from wisp.core.verify.answers import Answers
from wisp.core.verify.batching import BatchingPolicy
from wisp.core.verify.cost import CostModel
from wisp.core.verify.events import (
    Action,
    Ended,
    InEvent,
    KeyLimitsChanged,
    Limits,
    Received,
    Send,
    StepDone,
    Tick,
    WakeAt,
)
from wisp.core.verify.in_flight import InFlight, Step
from wisp.core.verify.places import gives_way, keeps_place
from wisp.core.verify.planner import Planner, SessionIndex
from wisp.core.verify.session import (
    CANCEL,
    DOOMED,
    DRAFT,
    ENDED,
    FINISHED,
    IN_ENGINE,
    LOST,
    MORE,
    PARKED,
    READY,
    RESUMED,
    VERDICT,
    WAITING,
    Pending,
    Session,
)
from wisp.core.verify.slo_admission import SloAdmission, keepable

NO_ENDS = frozenset[int]()  # making one takes a microsecond, and each commit would


class Verifier:
    """Sessions, KV slots and a batching policy. Everything enters through `handle`."""

    def __init__(
        self, limits: Limits, policy: BatchingPolicy, admission: Admission, cost: CostModel | None = None
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.admission = admission
        self.cost = cost or CostModel()
        self.answers = Answers()
        self.slo_admission = SloAdmission(self.answers)
        self.index = SessionIndex()
        self.sessions = self.index.sessions
        self.in_flight = InFlight(limits.depth, wants_drafting=policy.wants_drafting)
        self.planner = Planner(limits, policy, admission, self.cost, self.index, self.in_flight, self.answers)
        self.kv = self.planner.kv
        self._by_id: dict[str, Session] = {}
        self._by_connection: dict[int, set[int]] = {}
        self._next_handle = 0

    @property
    def running(self) -> bool:
        """Is no step to be planned before the next StepDone, or before the time of the last WakeAt?"""
        return self.in_flight.full or self.in_flight.waiting

    @property
    def n_waiting(self) -> int:
        """Sessions that could run but have no KV slot."""
        return sum(s.slot is None for s in self.index.ready.values())

    def knows(self, session_id: str) -> bool:
        return session_id in self._by_id

    def kept_places(self, now: float) -> int:
        """Sessions that keep their place even if a new session of their own key wants one."""
        return sum(keeps_place(now, s, self.limits) for s in self.sessions.values())

    @property
    def evicted(self) -> int:
        """Times that a session lost its KV to another."""
        return self.planner.evicted

    def handle(self, now: float, event: InEvent) -> list[Action]:
        """Handle `event` and return the actions it calls for. `now` is in seconds and never goes back."""
        if isinstance(event, Received):
            return self._received(now, event)
        if isinstance(event, StepDone):
            return self._step_done(now, event)
        if isinstance(event, Tick):
            return self._tick(now)
        if isinstance(event, KeyLimitsChanged):
            self.admission.set_limits(event.limits)
            return []
        for handle in sorted(self._by_connection.pop(event.connection, ())):
            self._park(now, self.sessions[handle])
        return []

    # --- messages

    def _received(self, now: float, event: Received) -> list[Action]:
        message = event.message
        actions: list[Action] = []
        answer: Verdict | None = None
        try:
            if isinstance(message, Open):
                answer = self._open(now, event.connection, event.key, message, actions)
            elif isinstance(message, Draft):
                answer = self._draft(now, event.connection, message)
            else:
                return self._cancel(event.connection, message)
        except ProtocolError as error:
            retry_after = error.retry_after if isinstance(error, Refusal) else 0.0
            fatal = isinstance(message, Open) and message.session not in self._by_id
            round_ = -1 if isinstance(message, Cancel) else message.round
            refused = Refused(message.session, error.code, str(error), retry_after, fatal, round_)
            return [*actions, Send(event.connection, refused)]
        return [*actions, Send(event.connection, answer)] if answer is not None else actions

    def _open(
        self, now: float, connection: int, key: str, open_: Open, actions: list[Action]
    ) -> Verdict | None:
        self._check_open(open_)
        ends = NO_ENDS if open_.ignore_eos else self.limits.eos
        open_ = msgspec.structs.replace(open_, sampling=open_.sampling.ending(ends))
        session = self._by_id.get(open_.session)
        if session is None:
            session = Session(self._next_handle + 1, key, connection, open_, now)
            if not keepable(session, self.cost):
                session.targets.drop()  # an infeasible SLO is served best-effort, and delays no feasible one
            elif self.limits.slo_admission and open_.slo is not None and not open_.committed:
                self._check_slo(now, session)
            self.admission.opened(now, key, lambda: self._free_place(now, key, actions))
            session.has_place = True
            self._next_handle += 1
            self.sessions[session.handle] = self._by_id[session.id] = session
            self.slo_admission.entered(session)
        else:
            self._resume(session, connection, key, open_)
        self._by_connection.setdefault(connection, set()).add(session.handle)
        return self._take(now, session, open_.round, len(open_.committed), open_.draft)

    def _check_slo(self, now: float, newcomer: Session) -> None:
        """Raises Refusal if the SLO of `newcomer`, or of the others with it, could not be met."""
        try:
            self.slo_admission.check(now, self.sessions.values(), newcomer, self.cost, self.limits)
        except Refusal:
            self.admission.turned_away(newcomer.key)
            raise

    def _free_place(self, now: float, key: str, actions: list[Action]) -> bool:
        """End a session to free its place for `key`. False if none has to give way."""
        session = gives_way(now, key, self.sessions.values(), self.admission, self.limits)
        if session is None:
            return False
        if session.connection >= 0:
            message = "all places are taken, and this one went to another; try again"
            refused = Refused(session.id, "overloaded", message, 1.0, True, session.round.last_received)
            actions.append(Send(session.connection, refused))
        else:
            actions.append(Ended(session.id, "expired"))
        self._stop(session)
        return True

    def _resume(self, session: Session, connection: int, key: str, open_: Open) -> None:
        if session.key != key:
            raise ProtocolError("forbidden", "this session belongs to another key")
        if open_.epoch <= session.epoch:
            raise ProtocolError("stale_epoch", f"epoch {open_.epoch} was overtaken by {session.epoch}")
        session.adopt(open_)
        session.go(RESUMED)
        self._by_connection.get(session.connection, set()).discard(session.handle)
        session.connection, session.epoch = connection, open_.epoch
        self.index.put(session)

    def _draft(self, now: float, connection: int, draft: Draft) -> Verdict | None:
        session = self._owned(connection, draft.session)
        self._check_tokens("draft", draft.tokens, self.limits.max_draft)
        current = session.round
        if draft.round <= current.number:
            if current.verdict is not None and draft.round == current.verdict.round:
                return current.verdict
            if draft.round == current.number:
                return None  # a duplicate of the draft under verification: its verdict will come
            raise ProtocolError("out_of_turn", f"round {draft.round} is over; the last was {current.number}")
        if not 0 <= draft.base <= session.n_committed:
            message = f"base {draft.base}, but {session.n_committed} tokens are committed here; open the session again"
            raise ProtocolError("unknown_base", message)
        state = session.state
        if state in IN_ENGINE:
            session.go(DRAFT)
            current.serve = draft.serve
            current.inbox = draft
            return None
        current.serve = draft.serve
        if state is READY and session.extends(draft):
            current.inbox = draft  # drafted ahead: it waits for the verdict on the draft that it continues
            return None
        return self._take(now, session, draft.round, draft.base, draft.tokens)

    def _take(
        self, now: float, session: Session, round_: int, base: int, tokens: list[int]
    ) -> Verdict | None:
        """Have a draft verified, or answer it at once."""
        if session.state in IN_ENGINE:  # resumed while its step runs
            session.round.inbox = Draft(session.id, round_, base, tokens, serve=session.round.serve)
            return None
        taken = session.intake(round_, base, tokens, now)
        if isinstance(taken, Pending):
            session.round.pending, answer = taken, None
        else:
            session.round.pending, answer = None, taken
        ready = session.state is READY
        if answer is None or session.round.serve:
            if not ready:
                session.since = now
            session.go(DRAFT)
        elif ready:
            session.go(VERDICT)
        self.index.put(session)
        return answer

    def _cancel(self, connection: int, cancel: Cancel) -> list[Action]:
        session = self._by_id.get(cancel.session)
        if session is None or session.connection != connection:
            return []
        self._stop(session)
        return [Ended(session.id, "abort")]

    def _stop(self, session: Session) -> None:
        """End a session: at once, or with its last step in flight. Its id and its place are free at once."""
        if session.go(CANCEL) is ENDED:
            self._end(session)
        else:
            self._free(session)

    def _free(self, session: Session) -> None:
        if session.has_place:
            session.has_place = False
            del self._by_id[session.id]
            self.admission.closed(session.key)

    def _owned(self, connection: int, session_id: str) -> Session:
        session = self._by_id.get(session_id)
        if session is None or session.connection != connection:
            raise ProtocolError(
                "unknown_session", "no such session here; open it again with what is committed"
            )
        return session

    def _check_open(self, o: Open) -> None:
        limits = self.limits
        check_digest(o, limits.digest)
        if not o.prompt:
            raise ProtocolError("malformed", "the prompt is empty")
        if len(o.prompt) + 1 > limits.slot_tokens:
            message = f"the prompt has {len(o.prompt)} tokens; the context is {limits.slot_tokens}"
            raise ProtocolError("context_length_exceeded", message)
        if not 1 <= o.max_tokens <= limits.slot_tokens - len(o.prompt):
            most = limits.slot_tokens - len(o.prompt)
            raise ProtocolError("context_length_exceeded", f"max_tokens must be between 1 and {most} here")
        if len(o.committed) >= o.max_tokens or (o.logprobs is not None and not 0 <= o.logprobs <= 20):
            raise ProtocolError("malformed", "committed must be shorter than max_tokens, logprobs at most 20")
        ended = not o.ignore_eos and not limits.eos.isdisjoint(o.committed)
        if ended or not set(o.sampling.stops).isdisjoint(o.committed):
            raise ProtocolError("malformed", "committed contains an end of sequence: that session is over")
        if o.slo is not None and not (
            0.0 <= o.slo.ttft_ms <= LONGEST_MS and 0.0 <= o.slo.tpot_ms <= LONGEST_MS
        ):
            raise ProtocolError(
                "malformed", f"an SLO's targets are up to {LONGEST_MS:.0e} milliseconds, 0 for none"
            )
        if problem := o.sampling.problem():
            raise ProtocolError("malformed", f"{problem[0]} {problem[1]}")
        if (
            o.sampling.constraints is not None
            and max(o.sampling.constraints.ids(), default=0) >= limits.n_vocab
        ):
            message = f"a constraint names ids outside this model's vocabulary of {limits.n_vocab}"
            raise ProtocolError("out_of_vocabulary", message)
        self._check_tokens("prompt", o.prompt, limits.slot_tokens)
        self._check_tokens("committed", o.committed, limits.slot_tokens)
        self._check_tokens("draft", o.draft, limits.max_draft)

    def _check_tokens(self, what: str, tokens: list[int], most: int) -> None:
        if len(tokens) > most:
            raise ProtocolError("oversized", f"{what} has {len(tokens)} tokens; at most {most} are taken")
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.limits.n_vocab):
            message = f"{what} has ids outside this model's vocabulary of {self.limits.n_vocab}"
            raise ProtocolError("out_of_vocabulary", message)

    # --- parking and ending

    def _park(self, now: float, session: Session) -> None:
        if session.state is not DOOMED:
            session.go(LOST)
        session.connection = -1
        session.since = now
        session.round.pending = session.round.inbox = None
        session.round.serve = False
        self.index.put(session)

    def _expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self.index.parked:
            session = next(iter(self.index.parked.values()))
            if session.since + self.limits.park_s > now:
                break
            self._stop(session)
            actions.append(Ended(session.id, "expired"))
        return actions

    def _end(self, session: Session) -> None:
        """Forget a session. Its KV stays in the slot for a follow-up turn, until the slot is needed."""
        if session.slot is not None:
            self.kv.release(session.slot, keep=True)
        self.index.remove(session)
        self._by_connection.get(session.connection, set()).discard(session.handle)
        self._free(session)
        self.slo_admission.left(session)

    # --- steps

    def _tick(self, now: float) -> list[Action]:
        actions = self._expire(now)
        index = self.index
        wakes = [next(iter(index.parked.values())).since + self.limits.park_s] if index.parked else []
        in_flight = self.in_flight
        n_ready = len(index.ready) + (len(index.drafting) if self.policy.wants_drafting else 0)
        if not in_flight.full and (n_ready or in_flight.steps):
            plan_at = in_flight.plan_at(now, self.sessions, n_ready, self.cost)
            if plan_at > now:
                wakes += [plan_at] if plan_at < math.inf else []
            else:
                step, wake_at = self.planner.step(now)
                if step is not None:
                    actions.append(step)
                    if (wake_at := in_flight.add(now, step, self.planner.load, self.cost)) is not None:
                        actions.append(WakeAt(wake_at))
                    return actions
                wakes.append(wake_at if wake_at is not None else now + self.limits.idle_s)
        if wakes:
            actions.append(WakeAt(min(wakes)))
        return actions

    def _step_done(self, now: float, event: StepDone) -> list[Action]:
        actions: list[Action] = []
        back = self.in_flight.back(now, event)
        if back is None:
            return actions
        step, begun = back
        if event.error:
            self._step_failed(now, step, event.error, actions)
            return actions
        # From end to end: the host's work between steps delays every session, too.
        self.cost.observe(step.load, max(event.engine_ms, (now - begun) * 1e3))
        for result in event.results:
            session, slice_ = self.sessions[result.session], step.slices[result.session]
            self._commit(now, session, slice_, result, begun, event.engine_ms, actions)
        return actions

    def _commit(
        self,
        now: float,
        s: Session,
        slice_: Slice,
        result: SliceResult,
        begun: float,
        engine_ms: float,
        actions: list[Action],
    ) -> None:
        assert s.slot is not None
        void = s.flight.back(slice_)
        if result.error:
            self.kv.record(now, s.slot, [])
            s.cached = 0
            self._fail(s, result.code, result.error, actions)
            return
        if void:
            self._settle(now, s, cached=s.cached, more=False)
            self._next(now, s, actions)
            return
        tokens, finish = self._cut(s, result.tokens) if slice_.sample else ([], "")
        s.progress.append(tokens, result.logprobs)
        fed = slice_.start + len(slice_.tokens) - slice_.n_draft + result.accepted
        n_prompt, start = s.progress.n_prompt, slice_.start
        prompt_tokens = min(fed, n_prompt) - start if start < n_prompt else 0
        self.admission.served(now, s.key, prompt_tokens, len(tokens))
        verdict = None
        if slice_.sample:
            current = s.round
            round_, base, since, agreed = current.number, current.heard, s.since, 0
            # Nothing is pending in server mode, or if the edge resumed during the step with a new draft.
            if (pending := current.pending) is not None:
                round_, base, since = pending.round, pending.base, pending.since
                agreed = pending.head + min(result.accepted, len(tokens))
                current.pending = None
            s.verified(now, slice_.n_draft, result.accepted)
            if since != s.since or slice_.n_draft:
                s.speed.committed(len(tokens))
            if not prompt_tokens:
                self.answers.verified(len(slice_.tokens), len(tokens))
            current.price = self.policy.price
            queue_ms = (begun - since) * 1e3
            verdict = s.answer(round_, base, agreed, finish=finish, queue_ms=queue_ms, engine_ms=engine_ms)
        doomed = s.state is DOOMED
        connection = -1 if doomed else s.connection
        more = not slice_.sample or (s.round.serve and not finish)
        self._settle(now, s, cached=min(fed, len(s.progress.chain)), more=more)
        if finish:
            self.answers.ended(s.n_committed, now - s.targets.opened)
            if s.flight.slices:
                self._doom(s)
            elif s.state is not ENDED:
                s.go(CANCEL if s.state is PARKED else FINISHED)
                self._end(s)
        if verdict is not None and connection >= 0:
            actions.append(Send(connection, verdict))
        elif finish and not doomed:
            actions.append(Ended(s.id, "expired"))
        if s.round.inbox is not None and s.state is not ENDED:
            self._next(now, s, actions)

    def _doom(self, s: Session) -> None:
        """The session has ended. What is still in flight of it is dropped, and its slot is free after that."""
        s.flight.drop()
        if s.state is not DOOMED:
            self._stop(s)

    def _cut(self, s: Session, tokens: list[int]) -> tuple[list[int], str]:
        """The tokens up to an end of the text or the length limit, and the finish reason ("" if it goes on)."""
        params = s.params
        remaining = params.max_tokens - s.progress.committed
        tokens = tokens[:remaining]
        ends = NO_ENDS if params.ignore_eos else self.limits.eos
        if params.sampling.constraints is not None:
            ends = ends.union(params.sampling.stops)
        if not ends.isdisjoint(tokens):
            end = next(i for i, token in enumerate(tokens) if token in ends)
            return tokens[: end + 1], "stop"
        return tokens, "length" if len(tokens) == remaining else ""

    def _settle(self, now: float, s: Session, *, cached: int, more: bool) -> None:
        """A slice is back: record what its slot holds. After the last one in flight `s` goes on, waits or ends."""
        assert s.slot is not None
        self.kv.grow(now, s.slot, s.progress.chain[s.cached : cached])
        s.cached = cached
        s.since = now
        if s.flight.slices:
            return
        state = s.go(MORE if more else VERDICT)
        if state is PARKED:
            s.round.pending = None
        if state is ENDED:
            self._end(s)
        else:
            self.index.put(s)

    def _next(self, now: float, s: Session, actions: list[Action]) -> None:
        if s.flight.slices:
            return
        draft, s.round.inbox = s.round.inbox, None
        if draft is not None and s.state in (READY, WAITING):
            answer = self._take(now, s, draft.round, draft.base, draft.tokens)
            if answer is not None:
                actions.append(Send(s.connection, answer))

    def _step_failed(self, now: float, step: Step, error: str, actions: list[Action]) -> None:
        """The sessions of the step end; those that are in flight after it run again."""
        lost = self.in_flight.lost()
        for handle in {handle: None for each in (step, *lost) for handle in each.slices}:
            self.sessions[handle].flight.clear()
        self.planner.failed()
        for handle in step.slices:
            self._fail(self.sessions[handle], ENGINE_ERROR, error, actions)
        for session in (self.sessions.get(handle) for each in lost for handle in each.slices):
            if session is not None and session.state in IN_ENGINE:
                self._again(now, session)

    def _again(self, now: float, s: Session) -> None:
        """What `s` had in flight is lost: it runs that again, unless its edge is gone or it was to end."""
        state = s.go(MORE)
        s.since = now
        if state is PARKED:
            s.round.pending = None
        if state is ENDED:
            self._end(s)
        else:
            self.index.put(s)

    def _fail(self, s: Session, code: str, message: str, actions: list[Action]) -> None:
        """End a session whose slice failed. After ENGINE_ERROR the edge may open it again."""
        doomed = s.state is DOOMED
        connection = -1 if doomed else s.connection
        round_ = s.round.last_received
        if s.flight.slices:
            self._doom(s)
        else:
            s.go(FINISHED)
            if s.slot is not None:
                self.kv.drop(s.slot)
                s.slot = None
            self._end(s)
        if connection >= 0:
            retry_after = 1.0 if code == ENGINE_ERROR else 0.0
            refused = Refused(s.id, code, message, retry_after, True, round_)
            actions.append(Send(connection, refused))
        elif not doomed:
            actions.append(Ended(s.id, "expired"))
