"""Planning a step: KV slots for sessions, a choice by the policy, slices for the engine.

    ready sessions without a slot  ->  slots: least served API key first, then earliest due
    ready and drafting sessions    ->  candidates  ->  those that KV suffices for  ->  policy  ->  grants  ->  Run
    sessions in flight that follow ----^   (`in_flight`)             (`preemption`)

A session keeps its Candidate until something about it changes: most sessions do not change between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from wisp.core.protocol.step import Copy, Slice
from wisp.core.verify.admission import Admission
from wisp.core.verify.answers import Answers
from wisp.core.verify.batching import BatchingPolicy, Candidate, Grant, Kind, StepLimits
from wisp.core.verify.cost import CostModel, Load, load_of
from wisp.core.verify.events import Limits, Run
from wisp.core.verify.in_flight import InFlight
from wisp.core.verify.index import SessionIndex
from wisp.core.verify.kv import KvPool
from wisp.core.verify.own_drafts import OwnDrafts
from wisp.core.verify.places import is_silent
from wisp.core.verify.preemption import Claims, is_urgent, residents, slot_victims
from wisp.core.verify.session import Session, expected
from wisp.core.verify.states import PICKED, WAITING

PREFILL, VERIFY, DECODE = Kind
PATIENCE_S = 1.0  # a session without SLO queues for a slot as if it were due this long after it became ready
SHORT = 8  # tokens; a session with at most this many to compute counts as decoding and is not cut into chunks
KINDS = ("verify", "decode", "prefill")  # of slices, in metrics and on pages


def kind_of(s: Slice) -> int:
    """Place in KINDS. A prompt's end with a draft behind it is part of a prompt."""
    if not s.sample or len(s.tokens) - s.n_draft > SHORT:
        return 2
    return 0 if s.n_draft else 1


class Planner:
    """Decides about the next step."""

    def __init__(
        self,
        limits: Limits,
        policy: BatchingPolicy,
        admission: Admission,
        cost: CostModel,
        index: SessionIndex,
        in_flight: InFlight,
        answers: Answers,
        own_drafts: OwnDrafts,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.admission = admission
        self.cost = cost
        self.index = index
        self.in_flight = in_flight
        self.answers = answers
        self.own_drafts = own_drafts
        self.kv = KvPool(limits.slots, limits.slot_tokens, limits.kv_tokens)
        self.load = Load()  # of the last step
        self.evicted = 0  # times that a session lost its KV to another
        self._copies: list[Copy] = []  # for the next step

    def step(self, now: float) -> tuple[Run | None, float | None]:
        """The step to run now, or None and the time to ask again."""
        self.kv.reserved = self.in_flight.rows
        self.own_drafts.step(len(self.index.sessions), self.in_flight.loss(self.load, self.cost))
        self._assign_slots(now)
        candidates, free_kv, preempts = self._candidates(), math.inf, self.policy.preempts
        if self.policy.gives_up:
            self._give_up(now, candidates)
        if preempts:
            candidates = self._residents(now, candidates)
        else:
            free_kv = self._free_kv(now, candidates)
        limits = StepLimits(
            self.limits.step_tokens,
            self.limits.slots,
            self.admission.shares,
            self.cost,
            free_kv,
            self.answers.tokens,
            self.answers.seconds,
        )
        plan = self.policy.plan(now, candidates, limits)
        grants = plan.grants if preempts else self._that_fit(now, plan.grants)
        self._copies = self._live_copies()
        if not grants and self.in_flight.steps:
            self._withdraw_copies()
        self._make_room(sum([g.tokens for g in grants]))
        if not grants:
            return None, plan.wake_at
        slices = [self._slice(grant) for grant in grants]
        self.load = load_of(slices)
        copies, self._copies = self._copies, []
        return Run(copies, slices, self.in_flight.number, self.in_flight.epoch), None

    def failed(self) -> None:
        """The step failed: the engine has lost all KV."""
        for session in self.index.sessions.values():
            session.slot, session.cached = None, 0
            self.index.put(session)
        for slot in self.kv.slots:
            self.kv.drop(slot.index)
        self._copies.clear()

    def _candidates(self) -> list[Candidate]:
        """The candidates of all sessions that have a slot."""
        own = self.own_drafts
        candidates = [
            s.candidate or candidate_of(s, own) for s in self.index.ready.values() if s.slot is not None
        ]
        if self.policy.wants_drafting:
            candidates += [s.candidate or candidate_of(s, own) for s in self.index.drafting.values()]
        if self.in_flight.steps:
            candidates += [candidate_of(s) for s in self.in_flight.following(self.index.sessions)]
        return candidates

    def _give_up(self, now: float, candidates: list[Candidate]) -> None:
        """Sessions whose SLO is missed whatever happens, with or without KV, are due at half their pace from now on."""
        index = self.index
        # No closer look at those that are late by less than all of their remaining tokens take.
        late = [
            index.sessions[c.session]
            for c in candidates
            if c.due < now and (c.first or now - c.due > (c.remaining - 1) * c.tpot_s)
        ]
        late += [s for s in index.ready.values() if s.slot is None and now > s.due]
        for s in late:
            if s.targets.hopeless(now, s.progress.committed, s.remaining):
                s.relax(now)

    def _not_in_flight(self, handles: list[int]) -> list[int]:
        """Those whose slots the engine will not touch any more."""
        sessions = self.index.sessions
        return [handle for handle in handles if not sessions[handle].flight.slices]

    # --- KV, under policies that preempt

    def _residents(self, now: float, candidates: list[Candidate]) -> list[Candidate]:
        """Those that there is KV for. Sessions in their way lose theirs."""
        if sum([c.new for c in candidates]) <= self.kv.free:
            return candidates
        free = self.kv.free + sum(map(self._held, self.index.parked))
        fixed = {handle for step in self.in_flight.steps for handle in step.slices}
        claims = Claims(now, self.cost, fixed, self._evictable(now), self.admission.shares)
        found = residents(candidates, free + sum([c.cached for c in candidates]), claims)
        missing = sum([c.new for c in found.resident]) - free
        for c in reversed(found.others):
            if missing <= 0:
                break
            if c.cached and c.session not in fixed:
                missing -= c.cached
                self._take_kv(c.session)
        return found.resident

    # --- KV, under policies that do not

    def _free_kv(self, now: float, candidates: list[Candidate]) -> float:
        """KV tokens available without taking any from a candidate; inf if every candidate fits."""
        needed = sum([c.new for c in candidates])
        if needed <= self.kv.free:
            return math.inf
        idle = self._evictable(now)
        free_kv = self.kv.obtainable(lambda handle: not idle(handle))
        return math.inf if needed <= free_kv else free_kv

    def _that_fit(self, now: float, grants: list[Grant]) -> list[Grant]:
        """The grants, in order, that there is KV for. If not even the first one fits, other sessions lose theirs."""
        needed = sum([g.tokens for g in grants])
        if self.kv.clear(needed):
            return grants
        grants = list(grants)
        idle = self._evictable(now)
        available = self.kv.obtainable(self._keepers(idle, grants))
        while needed > available and len(grants) > 1:
            last = grants.pop()
            needed -= last.tokens
            if idle(last.session):  # without a grant, its own KV can be taken
                available += self._held(last.session)
        if needed > available:
            if self.in_flight.steps:
                return []  # there is more once a step is back
            self._take_from_youngest(grants[0].session, needed - available, idle)
        for handle in self.kv.fit(needed, self._keepers(idle, grants)) or ():
            self._lose_kv(handle)
        return grants

    def _keepers(self, idle: Callable[[int], bool], grants: list[Grant]) -> Callable[[int], bool]:
        chosen = {g.session for g in grants}
        return lambda handle: handle in chosen or not idle(handle)

    def _take_from_youngest(self, chosen: int, missing: int, idle: Callable[[int], bool]) -> None:
        """Take KV of other sessions, the youngest first, until `missing` more tokens are available.

        There are enough: a session alone fits by its limits.
        """
        owners = [s for s in self.index.sessions.values() if s.slot is not None and s.handle != chosen]
        owners.sort(key=lambda s: (s.targets.opened, s.handle))
        got = 0
        while got < missing:
            victim = owners.pop()
            if not idle(victim.handle):  # KV of idle sessions counts as available already
                got += self._held(victim.handle)
            self._take_kv(victim.handle)

    # --- KV, under all

    def _make_room(self, needed: int) -> None:
        """Free KV for a step and for copies, from leftovers and parked sessions. There is enough of it."""
        evicted = self.kv.fit(needed, lambda handle: handle not in self.index.parked)
        assert evicted is not None, "what was granted fits"
        for handle in evicted:
            self._lose_kv(handle)

    # --- slots

    def _assign_slots(self, now: float) -> None:
        """Give KV slots to ready sessions that have none: least served API key first, then earliest due.

        When no slot is free, an urgent session preempts another one.
        """
        queue = [s for s in self.index.ready.values() if s.slot is None]
        shares, preempts = self.admission.shares, self.policy.preempts
        evictable = self._evictable(now)
        slot_owners: Iterator[int] | None = None  # that may be preempted; worked out once no slot is free

        def turn(s: Session) -> tuple[float, float, float, int]:
            needed_at = _needed_at(s) if preempts else 0.0
            return shares.get(s.key, 0.0), needed_at, s.targets.opened, s.handle

        for session in sorted(queue, key=turn):
            asked = (now, session.handle, session.params.sharers, session.progress.chain, evictable)
            assigned = self.kv.acquire(*asked) if slot_owners is None else None
            if assigned is None:
                if slot_owners is None:
                    owners = slot_victims(now, self._candidates(), self.cost) if preempts else []
                    slot_owners = iter(self._not_in_flight(owners))
                if not preempts or not is_urgent(now, session.candidate or candidate_of(session), self.cost):
                    continue
                victim = next(slot_owners, None)
                if victim is None:
                    return
                self._take_kv(victim)
                assigned = self.kv.acquire(*asked)
                assert assigned is not None
            if assigned.evicted is not None:
                self._lose_kv(assigned.evicted)
            if assigned.copy_from >= 0:
                self._copies.append(Copy(assigned.copy_from, assigned.slot, assigned.start))
            session.slot, session.cached = assigned.slot, assigned.start
            if session.progress.reused is None:
                session.progress.reused = min(assigned.start, session.progress.n_prompt)
            session.candidate = None

    def _live_copies(self) -> list[Copy]:
        """Without those whose target lost its KV after all, unless another copy reads it."""
        if not self._copies:
            return []
        live = {slot.index for slot in self.kv.slots if slot.tokens}
        kept = []
        for copy in reversed(self._copies):
            if copy.target in live:
                live.discard(copy.target)
                live.add(copy.source)
                kept.append(copy)
        return kept[::-1]

    def _withdraw_copies(self) -> None:
        """No step takes them along now, and steps in flight may need the KV that they take up. Their sessions get slots
        again when one of these steps is back."""
        for copy in self._copies:
            owner = self.kv.slots[copy.target].owner
            if owner is not None:
                self.kv.drop(copy.target)
                session = self.index.sessions[owner]
                session.slot, session.cached = None, 0
                if session.targets.first_at == math.inf:
                    session.progress.reused = None
                self.index.put(session)
        self._copies.clear()

    def _evictable(self, now: float) -> Callable[[int], bool]:
        """Tells whether a session may lose its KV now: it is parked, or its edge has been silent for `idle_s`."""
        sessions, silent_since = self.index.sessions, now - self.limits.idle_s

        return lambda handle: is_silent(sessions[handle], silent_since)

    def _lose_kv(self, handle: int) -> None:
        session = self.index.sessions[handle]
        session.slot, session.cached = None, 0
        self.evicted += 1
        self.index.put(session)

    def _held(self, handle: int) -> int:
        """Tokens of a session's KV."""
        slot = self.index.sessions[handle].slot
        return len(self.kv.slots[slot].tokens) if slot is not None else 0

    def _take_kv(self, handle: int) -> None:
        slot = self.index.sessions[handle].slot
        assert slot is not None
        self.kv.drop(slot)
        self._lose_kv(handle)

    # --- slices

    def _slice(self, grant: Grant) -> Slice:
        """A session's share of the step: the next tokens of its chain and, if they reach its end, the draft."""
        s = self.index.sessions[grant.session]
        slot, chain, flight = s.slot, s.progress.chain, s.flight
        assert slot is not None
        s.go(PICKED)
        self.index.put(s)
        start, after, own = s.cached + flight.kv, -1, None
        position = len(chain) - s.progress.n_prompt + flight.tokens
        if flight.tokens:  # decode after a token that is still to be chosen
            tokens, n_draft, last, after = [0], 0, True, flight.step
        else:
            tokens, n_draft = chain[start : start + grant.tokens].tolist(), 0
            last = start + len(tokens) == len(chain)
            if last and (room := grant.tokens - len(tokens)):
                own, pending = s.round.own, s.round.pending
                draft = (own.tokens if own is not None else pending.draft if pending else [])[:room]
                tokens += draft
                n_draft = len(draft)
        sampling, constraints = s.params.sampling, s.params.sampling.constraints
        past: list[int] = []
        if constraints is not None and last and constraints.choosing:
            past = (chain if constraints.repetition_penalty != 1.0 else chain[s.progress.n_prompt :]).tolist()
        # By position, as in `candidate_of`.
        slice_ = Slice(
            s.handle, slot, start, tokens, n_draft, last, position, sampling, s.progress.logprobs, past, after
        )
        flight.add(self.in_flight.number, slice_, own)
        return slice_


def _needed_at(s: Session) -> float:
    """When the session needs a slot. Without an SLO it must not wait forever either."""
    due = s.due
    return due if due < math.inf else s.since + PATIENCE_S


def candidate_of(s: Session, own_drafts: OwnDrafts | None = None) -> Candidate:
    """What a session could run next, after its slices in flight. Kept with the session until `SessionIndex.put`.

    own_drafts: where it has no draft, one of these.
    """
    progress, targets, speed, flight = s.progress, s.targets, s.speed, s.flight
    cached, length = s.cached + flight.kv, len(progress.chain) + flight.tokens
    pending = None if flight.tokens else s.round.pending
    committed = length - progress.n_prompt
    due = targets.due(committed)
    n_draft = len(pending.draft) if pending else 0
    missing, first = length - cached, targets.first_at == math.inf
    acceptance, own = speed.acceptance, None
    if own_drafts is not None and not n_draft and missing <= SHORT and not flight.slices:
        own = own_drafts.find(s)
        if own is not None:
            n_draft, acceptance = len(own.tokens), own.acceptance
    s.round.own = own
    kind = PREFILL if missing > SHORT else VERIFY if n_draft else DECODE
    since = pending.since if pending else s.since
    remaining = s.params.max_tokens - committed
    drafting = s.state is WAITING or (flight.tokens > 0 and not s.round.serve)
    lag_s = 0.0 if first else speed.answered_at + targets.tpot_s - due
    # By position: with names, a struct of this many fields takes seven times as long to make.
    s.candidate = candidate = Candidate(
        s.handle, kind, missing + n_draft, cached, n_draft, since, targets.opened, s.key, due, targets.tpot_s,
        expected(acceptance, n_draft) if n_draft else 1.0, remaining, drafting, first, lag_s,
        targets.slo_lost, acceptance,
    )  # fmt: skip
    return candidate
