"""Planning a step: sessions get KV slots, the policy chooses among what they could do, and slices are cut.

    ready sessions without a slot  ->  placed: the least served key's first, then the oldest
    ready, and absent ones         ->  Candidate  ->  policy  ->  grants  ->  as many as there is KV for  ->  Run

A session's Candidate is kept until it is filed anew: a tick looks at all that wait, and most of them have not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from wisp.core.protocol.step import Copy, Slice
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import BatchingPolicy, Candidate, Grant, Kind, StepLimits
from wisp.core.verify.congestion import CongestionPrice
from wisp.core.verify.cost import CostModel, Load, load_of
from wisp.core.verify.events import Limits, Run
from wisp.core.verify.kv import KvPool
from wisp.core.verify.places import is_silent
from wisp.core.verify.preemption import is_urgent, slot_victims, victims
from wisp.core.verify.session import DRAFT, PARKED, PICKED, READY, WAITING, Session

PREFILL, VERIFY, DECODE = Kind
PATIENCE_S = 1.0  # who has no due time waits for a slot like one that is due so long after asking
SHORT = 8  # tokens; a session that has no more than this to catch up on need not be cut into chunks


class SessionIndex:
    """All sessions, and by handle those that wait: for the engine, for an edge at work on a draft, for any edge."""

    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.ready: dict[int, Session] = {}
        self.drafting: dict[int, Session] = {}  # have KV, and their edge is at work on a draft
        self.parked: dict[int, Session] = {}  # oldest first

    def put(self, s: Session) -> None:
        """Put a session where those in its state are, and forget what was worked out for another. If it is there
        already, it keeps its place."""
        state, file = s.state, None
        if state is READY:
            file = self.ready
        elif state is WAITING:
            if s.slot is not None and s.connection >= 0:
                file = self.drafting
        elif state is PARKED:
            file = self.parked
        s.work = None
        if file is not s.file:
            self._take_out(s)
            if file is not None:
                file[s.handle] = s
            s.file = file

    def remove(self, s: Session) -> None:
        """It has ended."""
        self._take_out(s)
        s.file = None
        del self.sessions[s.handle]

    def _take_out(self, s: Session) -> None:
        if s.file is not None:
            del s.file[s.handle]


class Planner:
    """Decides about the next step."""

    def __init__(
        self,
        limits: Limits,
        policy: BatchingPolicy,
        admission: Admission,
        cost: CostModel,
        index: SessionIndex,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.admission = admission
        self.cost = cost
        self.index = index
        self.congestion = CongestionPrice()
        self.kv = KvPool(limits.slots, limits.slot_tokens, limits.kv_tokens)
        self.load = Load()  # of the last step
        self.evicted = 0  # times that a session lost its KV to another
        self._copies: list[Copy] = []  # placed, not yet carried out

    def step(self, now: float) -> tuple[Run | None, float | None]:
        """The step to run now, or none and when to ask again."""
        index = self.index
        self._place(now)
        work = self._work()
        room = self._room(now, work)
        if room < math.inf and self.policy.preempts and (chosen := victims(now, work, room, self.cost)):
            for handle in chosen:
                self._take_kv(handle)
            work = self._work()
            room = self._room(now, work)
        limits = StepLimits(
            self.limits.step_tokens, self.limits.slots, self.admission.shares, self.cost, room
        )
        plan = self.policy.plan(now, work, limits)
        for handle in plan.lost:
            index.sessions[handle].relax(now)
        grants = self._that_fit(now, plan.grants)
        if not grants:
            return None, plan.wake_at
        slices = [self._slice(now, grant) for grant in grants]
        self.load = load_of(slices)
        self.congestion.planned(self.cost.ms(self.load), plan.left_ms)
        copies, self._copies = self._copies, []
        return Run(copies, slices), None

    def failed(self) -> None:
        """The engine has lost everything."""
        for session in self.index.sessions.values():
            session.slot, session.cached = None, 0
            self.index.put(session)
        for slot in self.kv.slots:
            self.kv.drop(slot.index)
        self._copies.clear()

    def _work(self) -> list[Candidate]:
        """What those who have a slot could do."""
        work = [s.work or candidate_of(s) for s in self.index.ready.values() if s.slot is not None]
        if self.policy.wants_drafting:
            work += [s.work or candidate_of(s) for s in self.index.drafting.values()]
        return work

    def _room(self, now: float, work: Sequence[Candidate]) -> float:
        """KV tokens that can be had without taking any from those at work; infinite where nobody has to go without."""
        needed = sum([w.new for w in work])
        if needed <= self.kv.free:
            return math.inf
        idle = self._evictable(now)
        room = self.kv.room(lambda handle: not idle(handle))
        return math.inf if needed <= room else room

    # --- slots

    def _place(self, now: float) -> None:
        """Give KV slots to sessions that have work and none: the least served key's first, then who needs it first.
        Where none is free, one that cannot wait borrows another's."""
        queue = [s for s in self.index.ready.values() if s.slot is None]
        shares, preempts = self.admission.shares, self.policy.preempts
        evictable = self._evictable(now)
        able: Iterator[int] | None = None  # once there is no slot left: who would lend theirs
        for session in sorted(
            queue,
            key=lambda s: (shares.get(s.key, 0.0), _needed_at(s) if preempts else 0.0, s.opened, s.handle),
        ):
            asked = (now, session.handle, session.sharers, session.chain, evictable)
            placement = self.kv.acquire(*asked) if able is None else None
            if placement is None:
                if able is None:
                    able = iter(slot_victims(now, self._work(), self.cost) if preempts else ())
                if not preempts or not is_urgent(now, session.work or candidate_of(session), self.cost):
                    continue
                lender = next(able, None)
                if lender is None:
                    return
                self._take_kv(lender)
                placement = self.kv.acquire(*asked)
                assert placement is not None
            if placement.evicted is not None:
                self._lose_kv(placement.evicted)
            if placement.copy_from >= 0:
                self._copies.append(Copy(placement.copy_from, placement.slot, placement.start))
            session.slot, session.cached = placement.slot, placement.start
            session.work = None

    def _evictable(self, now: float) -> Callable[[int], bool]:
        """May a session lose its KV now? Parked ones may, and those whose edge has long been silent."""
        sessions, silent_since = self.index.sessions, now - self.limits.idle_s

        return lambda handle: is_silent(sessions[handle], silent_since)

    def _lose_kv(self, handle: int) -> None:
        session = self.index.sessions[handle]
        session.slot, session.cached = None, 0
        self.evicted += 1
        self.index.put(session)

    def _that_fit(self, now: float, grants: list[Grant]) -> list[Grant]:
        """As many of the grants, in order, as there is KV for; if for none, somebody's KV is taken away."""
        needed = sum([g.tokens for g in grants])
        if self.kv.clear(needed):
            return grants
        grants = list(grants)
        idle = self._evictable(now)
        room = self.kv.room(self._keepers(idle, grants))
        while needed > room and len(grants) > 1:
            last = grants.pop()
            needed -= last.tokens
            if idle(last.session):  # now it may have to give up its own
                room += self._held(last.session)
        if needed > room:
            room += self._preempt(grants[0].session, needed - room, idle)
        for handle in self.kv.fit(needed, self._keepers(idle, grants)) or ():
            self._lose_kv(handle)
        return grants

    def _keepers(self, idle: Callable[[int], bool], grants: list[Grant]) -> Callable[[int], bool]:
        chosen = {g.session for g in grants}
        return lambda handle: handle in chosen or not idle(handle)

    def _held(self, handle: int) -> int:
        """Tokens of a session's KV."""
        slot = self.index.sessions[handle].slot
        return len(self.kv.slots[slot].tokens) if slot is not None else 0

    def _preempt(self, chosen: int, missing: int, idle: Callable[[int], bool]) -> int:
        """Take the KV of other sessions, the youngest first, until so many tokens more could be had; returns how
        many. There are enough: alone, a session fits by its limits."""
        owners = [s for s in self.index.sessions.values() if s.slot is not None and s.handle != chosen]
        owners.sort(key=lambda s: (s.opened, s.handle))
        got = 0
        while got < missing:
            victim = owners.pop()
            assert victim.slot is not None
            if not idle(victim.handle):  # else they could be had already
                got += self._held(victim.handle)
            self._take_kv(victim.handle)
        return got

    def _take_kv(self, handle: int) -> None:
        slot = self.index.sessions[handle].slot
        assert slot is not None
        self.kv.drop(slot)
        self._lose_kv(handle)

    # --- slices

    def _slice(self, now: float, grant: Grant) -> Slice:
        """Its share of the step: the next tokens of its chain and, if they reach the end, its draft."""
        s = self.index.sessions[grant.session]
        slot, start, chain = s.slot, s.cached, s.chain
        assert slot is not None
        if s.state is WAITING:  # decode for an edge that is still drafting
            s.go(DRAFT)
        s.go(PICKED)
        self.index.put(s)
        end = min(start + grant.tokens, len(chain))
        last = end == len(chain)
        draft = s.pending.draft[: grant.tokens - (end - start)] if last and s.pending else []
        self.kv.touch(now, slot)
        # In the order of Slice's fields, as in `candidate_of`.
        tokens, n_draft, position = chain[start:end].tolist() + draft, len(draft), len(chain) - s.n_prompt
        return Slice(s.handle, slot, start, tokens, n_draft, last, position, s.sampling, s.logprobs)


def _needed_at(s: Session) -> float:
    """When it needs a slot: who has no due time is not made to wait for ever, either."""
    due = s.due
    return due if due < math.inf else s.since + PATIENCE_S


def candidate_of(s: Session) -> Candidate:
    """What a session could do. Kept with it, until it is filed anew."""
    pending, due, cached, length = s.pending, s.due, s.cached, len(s.chain)
    n_draft = len(pending.draft) if pending else 0
    missing, first = length - cached, s.first_at == math.inf
    kind = PREFILL if missing > SHORT else VERIFY if n_draft else DECODE
    since = pending.since if pending else s.since
    room, absent = s.max_tokens - length + s.n_prompt, s.state is WAITING
    lag_s = 0.0 if first else s.lag_s_if(due)
    # In the order of Candidate's fields: by name, a struct of so many takes seven times as long to make.
    s.work = work = Candidate(
        s.handle, kind, missing + n_draft, cached, n_draft, since, s.opened, s.key, due, s.tpot_s,
        s.expected(n_draft), s.usual, room, absent, first, lag_s, s.late,
    )  # fmt: skip
    return work
