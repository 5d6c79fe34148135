"""The paper's batching policy, from what is known of it.

Work that would miss its due time unless it started now goes first, earliest due first; the rest follows by density,
expected tokens over predicted time. After each addition: does it fit, and does the batch as it is now still end
before the earliest due time in it? If not, that piece waits for another step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from wisp.core.batching.base import Grant, Kind, Plan, StepLimits, Work
from wisp.core.cost import Load

_due = attrgetter("due")


class Wisp:
    """Urgent work by earliest due time, the rest by density, with a check after each addition."""

    name = "wisp"
    absentees = False

    def plan(self, now: float, work: Sequence[Work], limits: StepLimits) -> Plan:
        cost = limits.cost
        ms, margin = cost.now.ms, cost.margin
        urgent: list[Work] = []
        rest: list[tuple[float, Work]] = []
        for w in work:
            alone = ms(Load().plus(w.new, w.cached))
            # Started after a step like its own, it would be late.
            if now + 2.0 * alone * margin / 1e3 > w.due:
                urgent.append(w)
            else:
                rest.append((-w.gain / alone, w))
        urgent.sort(key=_due)
        rest.sort(key=lambda pair: (pair[0], pair[1].session))
        grants: list[Grant] = []
        load, earliest, left = Load(), math.inf, limits.tokens
        for w in (*urgent, *(w for _, w in rest)):
            if len(grants) >= limits.slices or left <= 0:
                break
            tokens = min(w.new, left) if w.kind is Kind.PREFILL else w.new
            if grants and tokens > left:
                continue
            more = load.plus(tokens, w.cached)
            end = now + ms(more) * margin / 1e3
            if grants and end > min(earliest, w.due if w.due > now else math.inf):
                continue
            grants.append(Grant(w.session, tokens))
            load, left = more, left - tokens
            if w.due >= end:  # what is late whatever happens binds nobody
                earliest = min(earliest, w.due)
        return Plan(grants)
