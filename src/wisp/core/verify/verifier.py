"""The verifier: events in, actions out. Everything the server decides, without I/O, clock or thread.

    Received(Open | Draft | Cancel)  ->  change a session; sometimes answer at once
    Tick                             ->  assign KV slots, let the policy choose, Run(step)   (`planner`)
    StepDone(results)                ->  commit tokens, send Verdicts                        (`results`)

The engine has at most `limits.depth` steps at a time (`in_flight`). `loop` feeds events with `now`, carries out the
actions, and sends a Tick when another step fits and something may have changed. Events are plain structs: a recorded
list of (now, event) replays to identical actions.
"""

from __future__ import annotations

import math

import msgspec

from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
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
from wisp.core.verify.in_flight import InFlight
from wisp.core.verify.index import SessionIndex
from wisp.core.verify.opening import check_draft, check_open
from wisp.core.verify.own_drafts import OwnDrafts
from wisp.core.verify.places import gives_way, keeps_place
from wisp.core.verify.planner import Planner
from wisp.core.verify.registry import Registry
from wisp.core.verify.results import NO_ENDS, Results
from wisp.core.verify.session import Session
from wisp.core.verify.slo_admission import SloAdmission, keepable
from wisp.core.verify.states import DRAFT, IN_ENGINE, READY, RESUMED


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
        self.own_drafts = OwnDrafts(limits, policy)
        self.planner = Planner(
            limits, policy, admission, self.cost, self.index, self.in_flight, self.answers, self.own_drafts
        )
        self.kv = self.planner.kv
        self.registry = Registry(limits, self.index, self.kv, admission, self.slo_admission)
        self.results = Results(self.registry, self.planner, self.in_flight)
        self._by_id, self._by_connection = self.registry.by_id, self.registry.by_connection
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
            return self.results.step_done(now, event)
        if isinstance(event, Tick):
            return self._tick(now)
        if isinstance(event, KeyLimitsChanged):
            self.own_drafts.limits_changed(self.admission.limits, event.limits)
            self.admission.set_limits(event.limits)
            return []
        for handle in sorted(self._by_connection.pop(event.connection, ())):
            self.registry.park(now, self.sessions[handle])
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
        check_open(self.limits, open_)
        ends = NO_ENDS if open_.ignore_eos else self.limits.eos
        open_ = msgspec.structs.replace(open_, sampling=open_.sampling.ending(ends))
        session = self._by_id.get(open_.session)
        if session is None:
            session = Session(self._next_handle + 1, key, connection, open_, now)
            session.progress.at_hand = min(
                self.kv.at_hand(session.params.sharers, session.progress.chain), len(open_.prompt) - 1
            )
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
        draft = Draft(session.id, open_.round, len(open_.committed), open_.draft, open_.serve)
        return self.registry.take(now, session, draft)

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
        self.registry.stop(session)
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
        session = self.registry.owned(connection, draft.session)
        check_draft(self.limits, draft)
        current = session.round
        if draft.round <= current.number:
            if current.verdict is not None and draft.round == current.verdict.round:
                return current.verdict
            if draft.round == current.number:
                return None  # a duplicate of the draft under verification: its verdict will come
            raise ProtocolError("out_of_turn", f"round {draft.round} is over; the last was {current.number}")
        if draft.round < current.last_received:
            return None  # a duplicate of a draft that waits, or that was replaced
        if not 0 <= draft.base <= session.n_committed:
            message = f"base {draft.base}, but {session.n_committed} tokens are committed here; open the session again"
            raise ProtocolError("unknown_base", message)
        state = session.state
        if state in IN_ENGINE:
            session.go(DRAFT)
            current.serve = draft.serve
            current.wait(draft)
            return None
        current.serve = draft.serve
        if state is READY and session.extends(draft):
            current.wait(draft)  # drafted ahead: it waits for the verdict on the draft that it continues
            return None
        current.inbox = []  # what waits continues a draft that is replaced now
        return self.registry.take(now, session, draft)

    def _cancel(self, connection: int, cancel: Cancel) -> list[Action]:
        session = self._by_id.get(cancel.session)
        if session is None or session.connection != connection:
            return []
        self.registry.stop(session)
        return [Ended(session.id, "abort")]

    # --- steps

    def _tick(self, now: float) -> list[Action]:
        actions = self.registry.expire(now)
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
