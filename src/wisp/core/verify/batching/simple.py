"""Batching policies without due times: continuous batching, and first come first served."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from operator import attrgetter

from wisp.core.verify.batching.base import Candidate, Grant, Kind, Plan, StepLimits, Unpriced

FOR_PROMPTS = 4  # of a step's tokens one in so many, so that decoding cannot lock new sessions out
_arrival = attrgetter("since", "session")


class Continuous(Unpriced):
    """Continuous batching with chunked prefill, as in centralised serving.

    Every session that can commit a token takes part in every step, longest wait first. The rest of the step's tokens
    goes to prompts, in chunks, first come first served within the least served API key. A share of the step
    is reserved for prompts (FOR_PROMPTS).
    """

    name = "continuous"
    wants_drafting = False
    gives_up = False
    preempts = False

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        prefill = Kind.PREFILL
        # A list: of a generator, whose length it does not know, `nsmallest` takes three times as long.
        going = nsmallest(limits.slices, [w for w in candidates if w.kind is not prefill], key=_arrival)
        prompts = sorted(
            [w for w in candidates if w.kind is prefill],
            key=lambda w: (limits.shares.get(w.key, 0.0), w.opened, w.session),
        )
        reserved = min(limits.tokens // FOR_PROMPTS, sum(w.new for w in prompts))
        grants: list[Grant] = []
        left = limits.tokens
        for w in going:
            if grants and w.new > left - reserved:
                break
            grants.append(Grant(w.session, w.new))
            left -= w.new
        for w in prompts:
            if len(grants) >= limits.slices or left <= 0:
                break
            grants.append(Grant(w.session, min(w.new, left)))
            left -= grants[-1].tokens
        return Plan(grants)


class Fcfs(Unpriced):
    """First come first served, as in SLED: whole requests in order of arrival until the step is full."""

    name = "fcfs"
    wants_drafting = False
    gives_up = False
    preempts = False

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        grants: list[Grant] = []
        left = limits.tokens
        for w in nsmallest(limits.slices, candidates, key=_arrival):
            if grants and w.new > left:
                break
            grants.append(Grant(w.session, w.new))
            left -= w.new
        return Plan(grants)
