"""The wisp policy: each step earns the most weighted tokens per millisecond.

A token of a session weighs the more, the later its user has it: FLOOR + e^(tokens owed / URGENT). Owed is what will be
due at the end of a step, in tokens at the user's pace, so sessions far ahead of their users weigh FLOOR, and none
weighs nothing. A step is worth the sum of weight x expected tokens over its time. Let `rate` be the most that a step
without prompts can reach. A candidate then takes part where its worth is at least `rate` x the milliseconds that it
adds, and a draft is cut where its next token is not worth its row. Where the fixed cost of a step dominates, as in an
idle server, the rate is small, and all that can run does. Where time is short, drafts shrink, and sessions ahead of
their users are left out first. Prompts do not enter the rate: all of them are read sooner or later.

The best rate solves worth(rate) = rate x time(rate): Dinkelbach's iteration (1967), from the last step's rate. This is
the max-weight rule (Tassiulas and Ephremides 1992), which keeps all queues bounded whenever any policy can.

A prompt is owed by the time that it can be read. It opens the way to an answer, whose worth is shared by all the rows
that it takes, those of the prompt and its own. Rows of a prompt delay all others, whose urgency grows by
e^(delay / (URGENT x pace)), and are read up to the delay at which that costs what they are worth. Where sessions are
ahead of their users on average, they can make up for a delay: it costs less by their mean urgency.

Whoever comes during a step waits for half of it on average. So a row of a draft costs the delay of newcomers, who weigh
as one that is due: drafts of sessions ahead of their users become shorter. Edges are told what a row is worth in tokens
of their own session, so that those that are late draft more than those that are ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wisp.core.verify.batching.base import Candidate, Grant, Kind, Plan, StepLimits
from wisp.core.verify.batching.simple import Continuous
from wisp.core.verify.cost import LEAST_MS, Load

URGENT = 7.0  # tokens owed that make the next one e times as urgent
MOST = 2.0  # the logarithm of the most urgency: beyond that, throughput alone counts
FLOOR = 0.1  # weight of a token of a session far ahead; one that is due weighs 1 more
FIRST = 2.5  # times the worth of an answer that has not begun: its user sees nothing yet
PACE_S = 0.1  # time of a token where no target says it
NOTHING_MS = 1e-9

PREFILL = Kind.PREFILL
# Plain tuples, for speed. A draft or decode: weight, ms that it adds to a step without its draft, ms of each draft
# token, rows without the draft, draft tokens, acceptance, candidate.
_Offer = tuple[float, float, float, int, int, float, Candidate]
_Prompt = tuple[float, Candidate]  # worth of a row, candidate
_Work = tuple[list[_Offer], list[_Prompt], float]
# What takes part, so that it sorts the densest first: minus worth per ms, session, tokens, candidate.
_Choice = tuple[float, int, int, Candidate]


class Wisp:
    """Max-weight batching."""

    name = "wisp"
    wants_drafting = gives_up = True

    def __init__(self, *, preempts: bool = True) -> None:
        self.preempts = preempts
        self.price = 0.0
        self.continuous = Continuous()
        self._rate, self._rows = 0.0, 0  # of the last step: worth per millisecond, rows
        self._wait = 0.0  # worth that newcomers lose by each millisecond of a step
        self._ms = self._row = 0.0  # of the last step, as predicted, and the worth of one more row in it

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan:
        if all([c.edge_drafting for c in candidates]):  # noqa: C419 - a list is faster
            # No step for edges that are drafting, while all are well ahead of their users.
            soonest = min([c.due - URGENT * (c.tpot_s or PACE_S) for c in candidates], default=math.inf)
            if soonest > now:
                return Plan([], soonest if soonest < math.inf else None)
        offers, prompts, urgency = self._offers(now, candidates, limits)
        prompts.sort(key=lambda p: (-p[0], limits.shares.get(p[1].key, 0.0), p[1].opened, p[1].session))
        grants = _packed(self._chosen(offers, _read(offers, prompts, urgency, limits), limits), limits)
        if min([c.due for c in candidates]) == math.inf:
            grants = self.continuous.plan(now, [c for c in candidates if not c.edge_drafting], limits).grants
        self._rows = sum([g.tokens for g in grants])
        return Plan(grants, None if grants else now + PACE_S)

    def price_of(self, now: float, due: float, tpot_s: float) -> float:
        """The worth of a row in tokens of such a session. Its draft is cut where a token is worth less."""
        scale_s = URGENT * (tpot_s or PACE_S)
        owed = (now + self._ms / 1e3 - (due if due < math.inf else now + scale_s)) / scale_s
        return min(1.0, self._row / (FLOOR + math.exp(min(owed, MOST))))

    def _offers(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> _Work:
        """Drafts and decodes with weights and costs, prompts with the worth of a row, the urgency of the former."""
        exp, inf, cost, by = math.exp, math.inf, limits.cost.now, now + self._ms / 1e3
        attention, cached, slice_ = cost.attention, cost.cached, cost.slice
        read_s = (cost.token + cost.beyond) / 1e3
        token = cost.token + (cost.beyond if cost.knee and self._rows > cost.knee else 0.0)
        offers: list[_Offer] = []
        prompts: list[_Prompt] = []
        all_urgency = hurry = 0.0
        for c in candidates:
            scale_s, new = URGENT * (c.tpot_s or PACE_S), c.new
            due = c.due if c.due < inf else c.since + scale_s
            hurry += 1.0 / scale_s
            if c.kind is PREFILL:
                owed = (by + new * read_s - due) / scale_s
                weight = FLOOR + exp(owed if owed < MOST else MOST)
                answer = min(c.remaining, limits.answer_tokens)
                worth = weight * (FIRST if c.first else 1.0)
                prompts.append((worth * answer / (new + answer), c))
            else:
                owed = (by - due) / scale_s
                urgency = exp(owed if owed < MOST else MOST)
                all_urgency += urgency
                n, before = c.n_draft, c.cached
                row_ms = token + attention * (before + new)
                base_ms = row_ms * (new - n) + cached * before + slice_
                offers.append((FLOOR + urgency, base_ms, row_ms, new - n, n, c.acceptance, c))
        # Within the time of an answer each session is followed by another, which waits for half of a step.
        waiting = 0.5 * self._ms / max(1e3 * limits.answer_s, self._ms, NOTHING_MS)
        self._wait = waiting * hurry * limits.answer_tokens / 1e3
        return offers, prompts, all_urgency

    def _chosen(self, offers: list[_Offer], read: list[_Choice], limits: StepLimits) -> list[_Choice]:
        """What takes part at the best rate, found on the way. No prompt waits for drafts that are not soon due."""
        step_ms, least = max(limits.cost.now.step, LEAST_MS), (FLOOR + 1.0) / 2.0 if read else 0.0
        for _ in range(2):
            choices, worth, ms, tokens = _at(self._rate, offers, least, self._wait)
            self._rate = worth / (step_ms + ms)
        self._ms = step_ms + ms
        row_ms = limits.cost.token_ms(Load(self._rows))
        self.price, self._row = min(1.0, tokens / self._ms * row_ms), self._rate * row_ms
        return choices + read


def _read(offers: list[_Offer], prompts: list[_Prompt], urgency: float, limits: StepLimits) -> list[_Choice]:
    """The rows of prompts to read, those that are worth most first."""
    cost = limits.cost.now
    rows, knee = sum([o[3] for o in offers]), cost.knee or math.inf
    urgency *= min(1.0, urgency / max(1, len(offers)))  # those ahead of their users make up for a delay
    loss = urgency / (max(cost.step, LEAST_MS) + sum([o[1] for o in offers]))  # of others, per ms
    delay_ms, left, free_kv = 0.0, limits.tokens, limits.free_kv
    if free_kv < math.inf:
        free_kv -= sum([o[3] + o[4] for o in offers])
    choices: list[_Choice] = []
    for worth, c in prompts:
        if c.new > free_kv:
            continue  # no session waits for a prompt that has no KV
        scale_ms = URGENT * (c.tpot_s or PACE_S) * 1e3
        wanted, read, fits = min(c.new, left), 0, True
        while wanted and fits:  # up to the knee, and beyond it
            row_ms = cost.token + cost.attention * (c.cached + c.new) + NOTHING_MS
            if rows >= knee:
                row_ms += cost.beyond
            n = min(wanted, int(knee - rows)) if rows < knee < math.inf else wanted
            if loss * row_ms > 0.0:  # both may be tiny
                most_ms = scale_ms * math.log(worth / (loss * row_ms)) - delay_ms
                fits = n * row_ms <= most_ms
                n = n if fits else max(0, int(most_ms / row_ms))
            rows, delay_ms, read, wanted = rows + n, delay_ms + n * row_ms, read + n, wanted - n
        if not read:
            break
        free_kv -= c.new
        left -= read
        choices.append((-worth / row_ms, c.session, read, c))
    if prompts and not (choices or offers):  # the one that has most goes on, and others lose their KV for it
        c = max([c for _, c in prompts], key=lambda c: c.cached)
        choices.append((-1.0, c.session, min(c.new, left), c))
    return choices


def _at(
    rate: float, offers: list[_Offer], least: float, wait: float
) -> tuple[list[_Choice], float, float, float]:
    """What takes part, its worth, ms and expected tokens. Drafts weigh `least` or more; their ms cost `wait` more."""
    choices: list[_Choice] = []
    worth = ms = tokens = 0.0
    for weight, base_ms, row_ms, base, n, acceptance, c in offers:
        gain, added_ms, cut = weight * base, base_ms, 0
        if n and weight >= least:
            next_, price = weight * acceptance, (rate + wait) * row_ms
            while cut < n and next_ >= price:
                gain += next_
                added_ms += row_ms
                next_ *= acceptance
                cut += 1
        if gain >= rate * added_ms:
            worth += gain
            ms += added_ms
            tokens += gain / weight
            choices.append((-gain / (added_ms + NOTHING_MS), c.session, base + cut, c))
    return choices, worth, ms, tokens


def _packed(choices: list[_Choice], limits: StepLimits) -> list[Grant]:
    """The densest choices, as many as fit into the step."""
    grants: list[Grant] = []
    left = limits.tokens
    for _, session, tokens, c in sorted(choices):
        if len(grants) == limits.slices:
            break
        if tokens > left and grants:
            if c.kind is not PREFILL or left <= 0:
                continue
            tokens = left
        grants.append(Grant(session, tokens))
        left -= tokens
    return grants
