"""The wisp policy: each step earns the most weighted tokens per millisecond.

A token of a session weighs the more, the later its user has it: FLOOR + e^(lateness / SCALE_S). The lateness is that
of the next token against its due time, so sessions far ahead of their users weigh FLOOR, and none weighs nothing. A
step is worth the sum of weight x expected tokens over its time. Let `rate` be the most that a step without prompts can
reach. A candidate then takes part where its worth is at least `rate` x the milliseconds that it adds, and a draft is
cut where its next token is not worth its row. Where the fixed cost of a step dominates, as in an idle server, the rate
is small, and all that can run does. Where time is short, drafts shrink, and sessions ahead of their users are left out
first. Prompts do not enter the rate: all of them are read sooner or later, so they compete with no token.

The best rate solves worth(rate) = rate x time(rate), by Dinkelbach's iteration (1967) from the last step's rate. To
maximise weighted service is the max-weight rule (Tassiulas and Ephremides 1992), with lateness for the queues: it
keeps all queues bounded whenever any policy can.

A prompt lengthens the step of everyone else, whose tokens grow in weight by e^(T / SCALE_S) in a step of T. So its rows
are read up to the T at which they are worth no more than what the others would earn in their time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wisp.core.verify.batching.base import Candidate, Grant, Kind, Plan, StepLimits
from wisp.core.verify.batching.simple import Continuous
from wisp.core.verify.cost import Coefficients, Load

SCALE_S = 0.4  # seconds of lateness that make a token e times as urgent
FLOOR = 0.1  # weight of a token of a session far ahead; one that is due now weighs FLOOR + 1
FIRST = 1.5  # weight of a first token, in weights of others as late: it cannot be made up for later
HOPELESS = 0.25  # a lateness of this share of an answer's remaining time cannot be made up for

SPARE = (
    0.04  # share of the time since the start that due times keep in reserve: they aim below the TPOT target
)
MOST = 2.0  # SCALE_S of lateness, from which the weight no longer grows
PATIENCE_S = 1.0  # a session without SLO counts as due so long after it became ready
CLOSE = 0.1  # relative change of the rate at which the iteration ends
ROUNDS = 6  # of the iteration, at most
LEAST_MS = 1e-3  # fixed cost of a step: some cost models say 0
NOTHING_MS = 1e-9

PREFILL = Kind.PREFILL


# Plain tuples, for speed. A draft or decode: weight, ms that it adds to a step without its draft, ms of each draft
# token, rows without the draft, draft tokens, acceptance, candidate.
_Offer = tuple[float, float, float, int, int, float, Candidate]
# Who takes part: worth per ms (the densest are granted first), session, tokens, candidate.
_Choice = tuple[float, int, int, Candidate]


class Wisp:
    """Max-weight batching. `price`: what one more draft token costs other sessions, in committed tokens."""

    name = "wisp"
    wants_drafting = True

    def __init__(self, *, preempts: bool = True) -> None:
        self.preempts = preempts
        self.price = 0.0
        self.continuous = Continuous()
        self._rate = 0.0  # of the last step: worth per millisecond
        self._rows = 0  # of the last step

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        cost = limits.cost.now
        lost = [c.session for c in candidates if now > c.due and _is_lost(now, c)]
        if all([c.edge_drafting for c in candidates]):  # noqa: C419 - a list is faster
            # No step for edges that are drafting, unless their tokens are due.
            lead_s = 2.0 * cost.ms(Load(1, 0, 0, 1)) / 1e3
            soonest = min([c.due for c in candidates], default=math.inf) - lead_s
            if soonest > now:
                return Plan([], soonest if soonest < math.inf else None, lost)
            candidates = [c for c in candidates if c.due - lead_s <= now]
        offers, prompts = self._offers(now, candidates, cost)
        prompts.sort(key=lambda p: (-p[0], limits.shares.get(p[1].key, 0.0), p[1].opened, p[1].session))
        choices = self._chosen(offers, self._read(offers, prompts, limits), limits)
        if min([c.due for c in candidates]) == math.inf:
            present = [c for c in candidates if not c.edge_drafting]
            grants = self.continuous.plan(now, present, limits).grants
        else:
            grants = _packed(choices, limits)
        self._rows = sum([g.tokens for g in grants])
        return Plan(grants, None if grants else now + SCALE_S / 10.0, lost)

    def _offers(
        self, now: float, candidates: Sequence[Candidate], cost: Coefficients
    ) -> tuple[list[_Offer], list[tuple[float, Candidate]]]:
        """Drafts and decodes with their weights and costs, and prompts with their weights."""
        exp, inf, per_s = math.exp, math.inf, 1.0 / SCALE_S
        attention, cached, slice_ = cost.attention, cost.cached, cost.slice
        token = cost.token + (cost.beyond if cost.knee and self._rows > cost.knee else 0.0)
        offers: list[_Offer] = []
        prompts: list[tuple[float, Candidate]] = []
        for c in candidates:
            late = (now - c.due if c.due < inf else now - c.since - PATIENCE_S) * per_s
            weight = FLOOR + exp(late if late < MOST else MOST)
            if c.kind is PREFILL:
                prompts.append((weight * FIRST if c.first else weight, c))
            else:
                new, before, n = c.new, c.cached, c.n_draft
                row_ms = token + attention * (before + new)
                base_ms = row_ms * (new - n) + cached * before + slice_
                offers.append((weight, base_ms, row_ms, new - n, n, c.acceptance, c))
        return offers, prompts

    def _read(
        self, offers: list[_Offer], prompts: list[tuple[float, Candidate]], limits: StepLimits
    ) -> list[_Choice]:
        """The rows of prompts to read, the most urgent prompt first."""
        choices: list[_Choice] = []
        ms = max(limits.cost.now.step, LEAST_MS) + sum([o[1] for o in offers])
        row_ms = limits.cost.token_ms(Load(self._rows)) + NOTHING_MS
        delay = sum([o[0] for o in offers]) / ms * row_ms  # what the others would earn in the time of a row
        left, free_kv = limits.tokens, limits.free_kv
        if free_kv < math.inf:
            free_kv -= sum([o[3] + o[4] for o in offers])
        for weight, c in prompts:
            if c.new > free_kv:
                continue  # no session waits for a prompt that has no KV
            read = min(c.new, left)
            if delay > 0.0:
                read = min(read, int((SCALE_S * 1e3 * math.log(weight / delay) - ms) / row_ms))
            if read <= 0:
                break
            free_kv -= c.new
            left -= read
            ms += row_ms * read
            choices.append((weight / row_ms, c.session, read, c))
        return choices

    def _chosen(self, offers: list[_Offer], read: list[_Choice], limits: StepLimits) -> list[_Choice]:
        """What takes part at the best rate, which is found on the way."""
        step_ms, rate = max(limits.cost.now.step, LEAST_MS), self._rate
        for _ in range(ROUNDS):
            choices, worth, ms, tokens = _at(rate, offers)
            found = worth / (step_ms + ms)
            settled = abs(found - rate) <= CLOSE * found and (choices or read)
            rate = found
            if settled:
                break
        self._rate = rate
        self.price = min(1.0, tokens / (step_ms + ms) * limits.cost.token_ms(Load(self._rows)))
        return choices + read


def _at(rate: float, offers: list[_Offer]) -> tuple[list[_Choice], float, float, float]:
    """Who takes part at this rate; what they are worth, the milliseconds they add, and their expected tokens."""
    choices: list[_Choice] = []
    worth = ms = tokens = 0.0
    for weight, base_ms, row_ms, base, n, acceptance, c in offers:
        gain, added_ms, cut = weight * base, base_ms, 0
        if n:
            next_, price = weight * acceptance, rate * row_ms
            while cut < n and next_ >= price:
                gain += next_
                added_ms += row_ms
                next_ *= acceptance
                cut += 1
        if gain >= rate * added_ms:
            worth += gain
            ms += added_ms
            tokens += gain / weight
            choices.append((gain / (added_ms + NOTHING_MS), c.session, base + cut, c))
    return choices, worth, ms, tokens


def _is_lost(now: float, c: Candidate) -> bool:
    """Is an overdue session unable to keep its SLO?"""
    reserve_s = SPARE * (c.due - c.opened)
    return not c.slo_lost and now - c.due > reserve_s + (
        0.0 if c.first else HOPELESS * c.remaining * c.tpot_s
    )


def _packed(choices: list[_Choice], limits: StepLimits) -> list[Grant]:
    """The densest choices, as many as fit into the step."""
    grants: list[Grant] = []
    left = limits.tokens
    for _, session, tokens, c in sorted(choices, key=lambda choice: (-choice[0], choice[1])):
        if len(grants) == limits.slices:
            break
        if tokens > left and grants:
            if c.kind is not PREFILL or left <= 0:
                continue
            tokens = left
        grants.append(Grant(session, tokens))
        left -= tokens
    return grants
