"""Other readings of the paper's scheduler, and limits of servers, as batching policies: for the page `paper` alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from wisp.core.verify.batching import BatchingPolicy, Candidate, Grant, Kind, Plan, StepLimits, Unpriced
from wisp.core.verify.batching.paper import Paper, deadline
from wisp.core.verify.batching.simple import Fcfs
from wisp.core.verify.cost import Load

AT_MOST = 16  # sequences in a step, which explains the paper's centralised row


def each_token(w: Candidate) -> float:
    """The due time of the very next token."""
    return w.due


def each_round(w: Candidate) -> float:
    """A round's time at the required rate, from the last verdict on; a lead is worth nothing."""
    if w.first or w.due == math.inf:
        return w.due
    return w.due + w.lag_s + (w.expected_tokens - 1.0) * w.tpot_s


class Read(Unpriced):
    """The scheduler with one sentence read otherwise.

    due:       the deadline of a request
    check:     sessions for which the step has to end in time: "others" (not the urgent), or "all"
    late:      does a missed deadline keep the others out?
    at_once:   prompts are urgent
    """

    name = "paper"
    wants_drafting = False
    gives_up = False
    preempts = False

    def __init__(
        self,
        due: Callable[[Candidate], float] = deadline,
        *,
        check: str = "others",
        late: bool = True,
        at_once: bool = False,
    ) -> None:
        self.due, self.check, self.late, self.at_once = due, check, late, at_once

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        ms, scale = limits.cost.now.ms_of, limits.cost.margin / 1e3
        later = now + scale * ms(
            sum(w.new for w in candidates), 0, sum(w.cached for w in candidates), len(candidates)
        )
        order: list[tuple[bool, float, int, float, Candidate]] = []
        for w in candidates:
            due = self.due(w)
            alone = ms(w.new, w.new * (w.cached + w.new), w.cached, 1)
            urgent = due < later + alone * scale or (self.at_once and w.kind is Kind.PREFILL)
            order.append((not urgent, due if urgent else -w.expected_tokens / alone, w.session, due, w))
        order.sort(key=lambda of: of[:3])
        grants: list[Grant] = []
        load, left, earliest = Load(), limits.tokens, math.inf
        for rest, _, _, due, w in order:
            tokens = min(w.new, left)
            if len(grants) >= limits.slices or tokens <= 0:
                break
            if grants and tokens < w.new and w.kind is not Kind.PREFILL:
                continue
            more = load.plus(tokens, w.cached)
            end = now + limits.cost.ms(more) * scale
            in_time = end <= earliest and (end <= due or not (rest or due > now))
            if grants and (rest or self.check == "all") and not in_time:
                continue
            grants.append(Grant(w.session, tokens))
            load, left = more, left - tokens
            if self.late or due >= end:
                earliest = min(earliest, due)
        return Plan(grants)


class Few(Unpriced):
    """A policy with at most AT_MOST sequences in a step."""

    wants_drafting = False
    preempts = False

    def __init__(self, policy: BatchingPolicy) -> None:
        self.policy = policy
        self.gives_up = policy.gives_up
        self.name = policy.name

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        slices = min(limits.slices, AT_MOST)
        return self.policy.plan(now, candidates, msgspec.structs.replace(limits, slices=slices))


NAMED: dict[str, Callable[[], BatchingPolicy]] = {
    "paper/each-token": lambda: Read(each_token),
    "paper/each-round": lambda: Read(each_round),
    "paper/late-apart": lambda: Read(late=False),
    "paper/check-all": lambda: Read(each_token, check="all", late=False),
    "paper/prompts-at-once": lambda: Read(at_once=True),
    "paper/16": lambda: Few(Paper()),
    "fcfs/16": lambda: Few(Fcfs()),
}
