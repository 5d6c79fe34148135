"""The results of a step: tokens are committed, verdicts leave, and sessions go on, wait for their edges, or end."""

from __future__ import annotations

from wisp.core.protocol.messages import Refused
from wisp.core.protocol.step import ENGINE_ERROR, Slice, SliceResult
from wisp.core.verify.events import Action, Ended, Send, StepDone
from wisp.core.verify.in_flight import InFlight, Step
from wisp.core.verify.planner import Planner
from wisp.core.verify.registry import Registry
from wisp.core.verify.session import Session
from wisp.core.verify.states import (
    CANCEL,
    DOOMED,
    ENDED,
    FINISHED,
    IN_ENGINE,
    MORE,
    PARKED,
    READY,
    VERDICT,
    WAITING,
)

NO_ENDS = frozenset[int]()  # making one takes a microsecond, and each commit would


class Results:
    """Takes in what the engine has done, for the sessions of `registry`."""

    def __init__(self, registry: Registry, planner: Planner, in_flight: InFlight) -> None:
        self.registry = registry
        self.planner = planner
        self.in_flight = in_flight
        self.policy, self.limits, self.answers = planner.policy, planner.limits, planner.answers
        self.own_drafts = planner.own_drafts
        self.admission, self.index, self.kv = registry.admission, registry.index, registry.kv
        self.sessions = self.index.sessions

    def step_done(self, now: float, event: StepDone) -> list[Action]:
        """The oldest step is back, or has failed."""
        actions: list[Action] = []
        back = self.in_flight.back(now, event)
        if back is None:
            return actions
        step, begun = back
        if event.error:
            self._step_failed(now, step, event.error, actions)
            return actions
        # From end to end: the host's work between steps delays every session, too.
        self.planner.cost.observe(step.load, max(event.engine_ms, (now - begun) * 1e3))
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
        if slice_.sample:
            self.own_drafts.committed(s, tokens)
        fed = slice_.start + len(slice_.tokens) - slice_.n_draft + result.accepted
        n_prompt, start = s.progress.n_prompt, slice_.start
        prompt_tokens = min(fed, n_prompt) - start if start < n_prompt else 0
        self.admission.served(now, s.key, prompt_tokens, len(tokens))
        verdict = None
        if slice_.sample:
            n_draft, accepted = slice_.n_draft, result.accepted
            if s.flight.own is not None and slice_ is s.flight.last:
                self.own_drafts.verified(n_draft, accepted)
                n_draft = accepted = 0
            elif s.flight.slices:
                s.flight.waits = self.own_drafts.find(s, chosen=1) is not None
            current = s.round
            round_, base, since, agreed = current.number, current.heard, s.since, 0
            # Nothing is pending in server mode, or if the edge resumed during the step with a new draft.
            if (pending := current.pending) is not None:
                round_, base, since = pending.round, pending.base, pending.since
                agreed = pending.head + min(accepted, len(tokens))
                current.pending = None
            s.verified(now, n_draft, accepted)
            if not prompt_tokens:
                self.answers.verified(slice_.n_draft + 1, len(tokens))  # without KV that is computed again
            current.price = self.policy.price_of(now, s.due, s.targets.tpot_s)
            queue_ms = (begun - since) * 1e3
            verdict = s.answer(round_, base, agreed, finish=finish, queue_ms=queue_ms, engine_ms=engine_ms)
        doomed = s.state is DOOMED
        connection = -1 if doomed else s.connection
        more = not slice_.sample or (s.round.serve and not finish)
        self._settle(now, s, cached=min(fed, len(s.progress.chain)), more=more)
        if finish:
            if not s.progress.elsewhere:  # otherwise its tokens and times are not of one verifier
                opened = s.targets.opened
                self.answers.ended(s.n_committed, now - opened, min(s.targets.first_at, now) - opened)
            if s.flight.slices:
                self._doom(s)
            elif s.state is not ENDED:
                s.go(CANCEL if s.state is PARKED else FINISHED)
                self.registry.end(s)
        if verdict is not None and connection >= 0:
            actions.append(Send(connection, verdict))
        elif finish and not doomed:
            actions.append(Ended(s.id, "expired"))
        if s.round.inbox and s.state is not ENDED:
            self._next(now, s, actions)

    def _doom(self, s: Session) -> None:
        """The session has ended. What is still in flight of it is dropped, and its slot is free after that."""
        s.flight.drop()
        if s.state is not DOOMED:
            self.registry.stop(s)

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
            self.registry.end(s)
        else:
            self.index.put(s)

    def _next(self, now: float, s: Session, actions: list[Action]) -> None:
        if s.flight.slices:
            return
        waiting, s.round.inbox = s.round.inbox, []
        for i, draft in enumerate(waiting):
            if s.state not in (READY, WAITING):
                return
            if i and s.state is READY and s.extends(draft):
                s.round.inbox = [draft]
                return
            answer = self.registry.take(now, s, draft)
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
            self.registry.end(s)
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
            self.registry.end(s)
        if connection >= 0:
            retry_after = 1.0 if code == ENGINE_ERROR else 0.0
            refused = Refused(s.id, code, message, retry_after, True, round_)
            actions.append(Send(connection, refused))
        elif not doomed:
            actions.append(Ended(s.id, "expired"))
