"""The paper's batch scheduler, in the strongest reading of its description that we found.

What the description says, and how it is read here:

- "Slack comes from the required token rate, expected accepted tokens, draft time and communication time." A round that
  is expected to commit E tokens may take E / rate from the last verdict on, drafting and the way there included. Where
  the session has a lead over its rate since the first token, it may use it up. A prompt is due when its first token is.
- "Requests that miss their deadline unless started now go first, earliest deadline first." Not started now, a request
  waits for a step first, which may be one of all that is ready. Then it takes the time of a step by itself.
- "The others by density, E / predicted time." The time is that of a step with nothing else.
- "After each addition: does it fit in memory, and is the predicted finish no later than the earliest deadline in it?"
  This is asked of the others only, and missed deadlines count: as long as somebody is late, the others wait.

Where the description is silent (prompts, lateness, cut drafts) nothing is added. `docs/results/paper.md` has the
readings that were tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from wisp.core.verify.batching.base import Candidate, Grant, Kind, Plan, StepLimits, Unpriced
from wisp.core.verify.cost import Load


def deadline(w: Candidate) -> float:
    """When the round of `w` must be over: at its rate since the last verdict, or since the first token, if later."""
    if w.first or w.due == math.inf:
        return w.due
    return w.due + max(0.0, w.lag_s + (w.expected_tokens - 1.0) * w.tpot_s)


class Paper(Unpriced):
    """Urgent requests by deadline, then the rest by density, as long as the step ends by every deadline in it."""

    name = "paper"
    wants_drafting = False
    gives_up = False
    preempts = False

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        cost, scale = limits.cost, limits.cost.margin / 1e3
        urgent, rest = _in_order(now, candidates, limits)
        grants: list[Grant] = []
        load, left, free_kv, earliest = Load(), limits.tokens, limits.free_kv, math.inf
        for i, (_, _, due, w) in enumerate((*urgent, *rest)):
            if len(grants) >= limits.slices or left <= 0:
                break
            tokens = min(w.new, left) if w.kind is Kind.PREFILL else w.new
            if grants and tokens > min(left, free_kv):
                continue
            more = load.plus(tokens, w.cached)
            earliest_with = min(earliest, due)
            if grants and i >= len(urgent) and now + cost.ms(more) * scale > earliest_with:
                continue
            grants.append(Grant(w.session, tokens))
            load, left, free_kv, earliest = more, left - tokens, free_kv - tokens, earliest_with
        return Plan(grants)


_Ordered = list[tuple[float, int, float, Candidate]]  # order, session, deadline, candidate


def _in_order(now: float, candidates: Sequence[Candidate], limits: StepLimits) -> tuple[_Ordered, _Ordered]:
    """Urgent requests by deadline, and the rest by density."""
    ms, scale = limits.cost.now.ms_of, limits.cost.margin / 1e3
    new, cached = sum([w.new for w in candidates]), sum([w.cached for w in candidates])
    later = now + ms(new, 0, cached, len(candidates)) * scale  # the end of a step of all that is ready
    urgent: _Ordered = []
    rest: _Ordered = []
    for w in candidates:
        due = deadline(w)
        alone = ms(w.new, w.new * (w.cached + w.new), w.cached, 1)
        if due < later + alone * scale:
            urgent.append((due, w.session, due, w))
        else:
            rest.append((-w.expected_tokens / alone, w.session, due, w))
    urgent.sort(key=itemgetter(0, 1))
    rest.sort(key=itemgetter(0, 1))
    return urgent, rest
