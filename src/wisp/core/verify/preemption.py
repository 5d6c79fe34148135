"""Which sessions hold KV when there is not enough for all: the residents of the next step.

All claims to KV are in one strict order, and the first of them that fit together are resident. No other session runs,
and sessions in their way lose their KV. So what is taken for a session goes to that session, and no two can take KV
from each other in turn: while nothing is committed, a session that has KV falls in the order only as it loses it. The
first one fits, as each session alone does.

    fixed    its KV is in use by a step in flight
    going    has KV and is not far ahead of its TPOT target: latest due time last
    urgent   a prompt that cannot wait, with KV before without
    rest     all others, with KV before without. Without SLO, nothing is due
    idle     its edge is silent

Within each, the earliest due is first, then the oldest. Of sessions without KV, those that wait for their first token
come before all that lost their KV: a late first token cannot be made up for, other tokens can.

A session that is ten seconds ahead has given its user text for ten seconds. Until then it needs neither engine nor
memory, while a new session needs memory for its first token. Preemption costs a second prefill. A session far ahead
must therefore be able to wait a hundred times as long as the prefill takes, and must not be about to end, which frees
its KV for good. A session without SLO may lose all its KV for a single token of another.

Under batching policies that do not preempt, the planner takes KV only where not even one session could run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple

import msgspec

from wisp.core.verify.batching import Candidate, Kind
from wisp.core.verify.cost import CostModel, Load

SPARE_S = 3.0  # least slack of a session far ahead
WORTH = 100.0  # the same, in multiples of the time to compute its KV again
ENDING = 16  # tokens; a session with no more than this to generate is not far ahead
URGENT_S = 0.5  # a prompt may preempt a slot this long before its prefill must start,
EARLY_S = 2.0  # and KV of sessions that are far ahead this long


class Claim(IntEnum):
    """Kinds of claims to KV, the strongest first."""

    FIXED = 0
    GOING = 1
    URGENT = 2
    REST = 3
    IDLE = 4


class Claims(NamedTuple):
    """What decides the order of claims. `fixed`: sessions in flight. `idle`: tells whether an edge is silent.

    shares: tokens served so far per API key. Of prompts without KV that are equally due, that of the least served key
            is first
    """

    now: float
    cost: CostModel
    fixed: Collection[int] = ()
    idle: Callable[[int], bool] = lambda session: False
    shares: Mapping[str, float] = {}

    def rank(self, c: Candidate) -> tuple[Claim, bool, bool, float, float, float, int]:
        """The place of a session in the order: a strict one, as no two have the same last number."""
        claim, has_kv = self._claim(c), c.cached > 0
        again, share = not has_kv and not c.first, 0.0 if has_kv else self.shares.get(c.key, 0.0)
        return claim, not has_kv, again, _due(self.now, c), share, c.opened, c.session

    def _claim(self, c: Candidate) -> Claim:
        if c.session in self.fixed:
            return Claim.FIXED
        if self.idle(c.session):
            return Claim.IDLE
        if _running(c):
            return Claim.REST if is_far_ahead(self.now, c, self.cost) else Claim.GOING
        return Claim.URGENT if _cannot_wait(self.now, c, self.cost, EARLY_S) else Claim.REST


class Residents(NamedTuple):
    """`resident`: those that fit, with shorter drafts where whole ones do not. `others` may lose their KV, the last one
    first."""

    resident: list[Candidate]
    others: list[Candidate]


def residents(candidates: Iterable[Candidate], room: float, claims: Claims) -> Residents:
    """Choose the residents. `room`: KV tokens for all candidates, those that they have included.

    A session that does not fit is waited for: no weaker claim without KV is resident before it.
    """
    ranked = sorted([(claims.rank(c), c) for c in candidates])
    chosen, others, waited_for = list[Candidate](), list[Candidate](), False
    room -= sum([c.cached for (claim, *_), c in ranked if claim is Claim.FIXED])
    for claim, group in groupby(ranked, key=lambda r: r[0][0]):
        fit: list[Candidate] = []
        for _, c in group:
            tokens = c.new - c.n_draft + (0 if claim is Claim.FIXED else c.cached)
            if tokens <= room and (c.cached or not waited_for):
                room -= tokens
                fit.append(c)
            else:
                others.append(c)
                waited_for = True
        for c in fit:
            cut = c.n_draft - int(min(c.n_draft, room))
            room -= c.n_draft - cut
            chosen.append(msgspec.structs.replace(c, new=c.new - cut, n_draft=c.n_draft - cut) if cut else c)
    return Residents(chosen, others)


def slot_victims(now: float, candidates: Iterable[Candidate], cost: CostModel) -> list[int]:
    """Sessions that may lose their slot, best victim first."""
    far = [c for c in candidates if c.cached and is_far_ahead(now, c, cost)]
    return [c.session for c in sorted(far, key=lambda c: (c.due, c.opened, c.session), reverse=True)]


def is_urgent(now: float, c: Candidate, cost: CostModel) -> bool:
    """Must it have a slot now? Always true of a session that has KV and goes on."""
    return _running(c) or _cannot_wait(now, c, cost, URGENT_S)


def is_far_ahead(now: float, c: Candidate, cost: CostModel) -> bool:
    """Can it do without KV for a while?"""
    return c.remaining > ENDING and c.due - now > max(SPARE_S, WORTH * _token_s(cost) * c.cached)


def _running(c: Candidate) -> bool:
    return c.kind is not Kind.PREFILL and c.cached > 0


def _cannot_wait(now: float, c: Candidate, cost: CostModel, within_s: float) -> bool:
    return c.due - now < within_s + 2.0 * c.new * _token_s(cost)


def _due(now: float, c: Candidate) -> float:
    """A first token that is late gives way to others for as long again: what can still be in time comes first."""
    late = c.first and not c.slo_lost and c.due < now
    return 2.0 * c.due - c.opened if late else c.due


def _token_s(cost: CostModel) -> float:
    return cost.token_ms(Load()) / 1e3
