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

_due = attrgetter("due")


class Wisp:
    """Urgent work by earliest due time, the rest by density, with a check after each addition."""

    name = "wisp"
    absentees = False
    lends = False

    def plan(self, now: float, work: Sequence[Work], limits: StepLimits) -> Plan:
        c, scale = limits.cost.now, limits.cost.margin / 1e3
        # The cost model spelled out: a thousand pieces are to be judged within a millisecond.
        step, token, per_cached, attention = c.step, c.token, c.cached, c.attention
        beyond, knee = (c.beyond, c.knee) if c.knee else (0.0, 0)
        urgent: list[Work] = []
        rest: list[tuple[float, int, Work]] = []
        for w in work:
            new, cached = w.new, w.cached
            alone = step + new * (token + attention * (cached + new)) + per_cached * cached
            if beyond and new > knee:
                alone += beyond * (new - knee)
            # Started after a step like its own, it would be late.
            if now + 2.0 * alone * scale > w.due:
                urgent.append(w)
            else:
                rest.append((-w.gain / alone, w.session, w))
        urgent.sort(key=_due)
        rest.sort()
        grants: list[Grant] = []
        filled, flat_ms, earliest, left = (
            0,
            step,
            math.inf,
            limits.tokens,
        )  # flat: without what lies beyond the knee
        for w in (*urgent, *(w for *_, w in rest)):
            if len(grants) >= limits.slices or left <= 0:
                break
            if now + (flat_ms + token) * scale > earliest:
                break  # not even one token more
            tokens, cached = w.new, w.cached
            if tokens > left and grants and w.kind is not Kind.PREFILL:
                continue
            if w.kind is Kind.PREFILL:
                tokens = min(tokens, left)
            more_ms = flat_ms + tokens * (token + attention * (cached + tokens)) + per_cached * cached
            over = filled + tokens - knee if beyond else 0
            end = now + (more_ms + (beyond * over if over > 0 else 0.0)) * scale
            if grants and (end > earliest or end > w.due > now):
                continue
            grants.append(Grant(w.session, tokens))
            filled, flat_ms, left = filled + tokens, more_ms, left - tokens
            if w.due >= end:  # what is late whatever happens binds nobody
                earliest = min(earliest, w.due)
        return Plan(grants)
