"""The batching policy of the paper, as far as it is published.

Urgent candidates, which would be late unless they start now, come first, by due time. The others follow by density:
expected tokens per predicted time. A candidate is added if it fits, and if the step then still ends before the earliest
due time in it. Otherwise it waits for another step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from wisp.core.verify.batching.base import Candidate, Grant, Kind, Plan, StepLimits
from wisp.core.verify.cost import Load

_due = attrgetter("due")


class Paper:
    """Urgent candidates by due time, the rest by density, with a check before each addition."""

    name = "paper"
    wants_drafting = False
    preempts = False
    price = 0.0

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        ms, scale = limits.cost.now.ms_of, limits.cost.margin / 1e3
        urgent: list[Candidate] = []
        rest: list[tuple[float, int, Candidate]] = []
        for w in candidates:
            new, cached = w.new, w.cached
            alone = ms(new, new * (cached + new), cached, 1)
            # Late if it started after a step of its own length
            if now + 2.0 * alone * scale > w.due:
                urgent.append(w)
            else:
                rest.append((-w.expected_tokens / alone, w.session, w))
        urgent.sort(key=_due)
        rest.sort()
        grants: list[Grant] = []
        load = Load()
        earliest, left = math.inf, limits.tokens
        for w in (*urgent, *(w for *_, w in rest)):
            if len(grants) >= limits.slices or left <= 0:
                break
            n = len(grants) + 1
            if now + ms(load.new + 1, load.attention, load.cached, n) * scale > earliest:
                break  # no time for one more token
            tokens = w.new
            if tokens > left and grants and w.kind is not Kind.PREFILL:
                continue
            if w.kind is Kind.PREFILL:
                tokens = min(tokens, left)
            more = load.plus(tokens, w.cached)
            end = now + limits.cost.ms(more) * scale
            if grants and (end > earliest or end > w.due > now):
                continue
            grants.append(Grant(w.session, tokens))
            load, left = more, left - tokens
            if w.due >= end:  # a candidate that is late anyway does not limit the step
                earliest = min(earliest, w.due)
        return Plan(grants)
