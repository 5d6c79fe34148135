"""SLO admission: refuse a session whose SLO could not be met, or with which others would miss theirs.

The decision comes from the cost model and not from a count of sessions. All sessions together need tokens per second;
times the rows per token, they must fit into the rows per second of steps that are short enough. Rows per token are
those under load, when the congestion price has shortened drafts; at lower load nobody is refused anyway.

The cost model does not know everything: acceptance, users who leave, a slow host. So two measurements count as well:
the share of sessions behind their TPOT target, and the share of answers that missed their SLO
(`SloAdmission.filled`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

from wisp.core.verify.admission import Refusal
from wisp.core.verify.answers import Answers
from wisp.core.verify.cost import CostModel, Load
from wisp.core.verify.events import Limits
from wisp.core.verify.session import Session
from wisp.core.verify.states import PARKED, WAITING
from wisp.core.verify.targets import RELAXED

ROWS_A_TOKEN = 1.25  # rows of drafts and of the target's own token, per committed token, under load
ROWS_A_SLICE = 2.5  # rows that a session brings to a step
FILLED = 1.05  # share of the cost model's capacity that is promised at first
LEAST_FILLED, MOST_FILLED = 0.7, 1.15  # its bounds
IN_TIME, LATE = 0.0006, -0.0094  # its change with an answer: in balance if six in a hundred miss their SLO
BACK = 0.002  # share of the way back to FILLED, per answer: a burst is forgotten
MOST_A_ROUND = 8.0  # tokens that a session could commit per step with the best of drafts
PREEMPTIBLE = 0.5  # share of the sessions' KV that may be missing, with preemption
OVERBOOKED = 0.1  # the same without preemption: sessions waiting for their first token need no KV yet
PREEMPTED_FOR = 0.15  # of an answer's time: how long a preempted session stays without KV
BEHIND_MOST = 0.6  # share of sessions behind their TPOT target at which none is admitted
# Share of the rows, until a first token is due, that waiting prompts may need: what decoding leaves, within these
# bounds. Decoding can wait for many prompts and steps get longer, so the prompts get more rows than the capacity
# says.
PROMPTS_LEAST, PROMPTS_MOST = 1.0, 1.2
MOST_REFUSED = 30  # refusals counted per ended session: a crowd is forgotten
LONGEST_S = 20.0  # longest Retry-After, before it is spread by up to half
FRESH_S = 0.1  # age up to which the sessions' states are not read again: thousands of them take milliseconds
AWAY = frozenset({WAITING, PARKED})
SILENT_S = 5.0  # a session whose edge has been away for longer than any draft takes counts for nothing
GOLDEN = 0.6180339887  # the fractional parts of its multiples are spread evenly


class _Share(NamedTuple):
    """What one session adds to the demand. `bearable_s`: the longest step that keeps its TPOT target, 0 without one."""

    kv: float
    unread: int
    rows: float
    decoding: float
    begun: bool
    running: bool
    behind: bool
    bearable_s: float


class Demand:
    """What all sessions need.

    rows, decoding: per second, with prompts and without
    kv:             tokens
    unread:         prompt tokens of sessions without a first token
    running:        sessions with a TPOT target that decode; `behind` of them lag
    begun:          sessions that have a first token
    bearable_s:     for each TPOT target, the longest step that keeps it; ascending
    """

    def __init__(self, sessions: Iterable[Session], answer_tokens: float) -> None:
        self.answer_tokens = answer_tokens
        self.rows = self.decoding = 0.0
        self.kv = 0.0
        self.unread = 0
        self.running = self.behind = self.sessions = self.begun = 0
        self.bearable_s: list[float] = []
        self._shares: dict[int, _Share] = {}
        for s in sessions:
            share = self._shares[s.handle] = self._share(s)
            self._count(share, 1)
            if share.bearable_s:
                self.bearable_s.append(share.bearable_s)
        self.bearable_s.sort()

    def add(self, s: Session) -> None:
        """Count one more session."""
        share = self._shares[s.handle] = self._share(s)
        self._count(share, 1)
        if share.bearable_s:
            insort(self.bearable_s, share.bearable_s)

    def remove(self, handle: int) -> None:
        """Take back what was counted for a session, if it was."""
        share = self._shares.pop(handle, None)
        if share is not None:
            self._count(share, -1)
            if share.bearable_s:
                del self.bearable_s[bisect_left(self.bearable_s, share.bearable_s)]

    def _count(self, share: _Share, n: int) -> None:
        self.sessions += n
        self.kv += n * share.kv
        self.unread += n * share.unread
        self.rows += n * share.rows
        self.decoding += n * share.decoding
        self.begun += n * share.begun
        self.running += n * share.running
        self.behind += n * share.behind

    def _share(self, s: Session) -> _Share:
        progress, targets = s.progress, s.targets
        tokens, n_prompt, tpot_s = (
            min(s.params.max_tokens, self.answer_tokens),
            progress.n_prompt,
            targets.tpot_s,
        )
        begun = len(progress.chain) > n_prompt
        kv, unread = n_prompt + tokens / 2, 0 if begun else n_prompt
        if not tpot_s:
            return _Share(kv, unread, 0.0, 0.0, begun, False, False, 0.0)
        token_s = RELAXED * tpot_s if targets.slo_lost else tpot_s
        rows, decoding = (ROWS_A_TOKEN + n_prompt / tokens) / token_s, ROWS_A_TOKEN / token_s
        if targets.slo_lost:
            return _Share(kv, unread, rows, decoding, begun, False, False, 0.0)
        bearable_s = tpot_s * (s.speed.round_tokens + 1.0) / 2.0
        return _Share(kv, unread, rows, decoding, begun, begun, begun and s.lag_s > 0.0, bearable_s)

    def without_kv(self, limits: Limits) -> float:
        """Tokens of KV beyond what there is."""
        return max(0.0, self.kv - limits.kv_tokens)

    def without_slot(self, limits: Limits) -> float:
        """Tokens of KV of sessions beyond the slots. A session without a first token can wait for a slot."""
        return max(0, self.begun - limits.slots) / max(self.sessions, 1) * self.kv


class SloAdmission:
    """Decides who is admitted, and learns from the answers.

    filled:                  share of the cost model's capacity that is promised: less after each answer that missed its
                             SLO, a little more after each that met it
    refused_each:            sessions refused per ended session, smoothed
    """

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.filled = FILLED
        self.refused_each = 0.0
        self._refused = 0  # since the last session ended
        self._refusals = 0  # since the start
        self._demand: Demand | None = None  # of the present sessions
        self._looked_at = -math.inf

    def ended(self, in_time: bool) -> None:
        """An answer is complete."""
        self.filled += (IN_TIME if in_time else LATE) + BACK * (FILLED - self.filled)
        self.filled = min(max(self.filled, LEAST_FILLED), MOST_FILLED)

    def entered(self, s: Session) -> None:
        """A session has begun."""
        if self._demand is not None:
            self._demand.add(s)

    def left(self, s: Session) -> None:
        """A session has ended, complete or not."""
        self.refused_each += 0.05 * (min(self._refused, MOST_REFUSED) - self.refused_each)
        self._refused = 0
        if self._demand is not None:
            self._demand.remove(s.handle)

    def check(
        self,
        now: float,
        sessions: Iterable[Session],
        newcomer: Session,
        cost: CostModel,
        limits: Limits,
        *,
        preempts: bool,
    ) -> None:
        """Raises Refusal if `newcomer`, which has an SLO, would miss it or make others miss theirs."""
        if self._demand is None or now - self._looked_at > FRESH_S:
            present = (s for s in sessions if s.state not in AWAY or s.since > now - SILENT_S)
            self._demand, self._looked_at = Demand(present, self.answers.tokens), now
        self._demand.add(newcomer)
        try:
            problem = self._problem(self._demand, newcomer, cost, limits, preempts)
        finally:
            self._demand.remove(newcomer.handle)
        if problem:
            raise self._refusal(problem)

    def _problem(
        self, demand: Demand, newcomer: Session, cost: CostModel, limits: Limits, preempts: bool
    ) -> str:
        """The reason to refuse `newcomer`, which `demand` includes; "" for none."""
        without = demand.without_kv(limits)
        if without > (PREEMPTIBLE if preempts else OVERBOOKED) * demand.kv:
            return "this verifier has no room for another context now"
        bearable_s = demand.bearable_s
        if not bearable_s:
            return ""
        if demand.running >= 4 and demand.behind > BEHIND_MOST * demand.running:
            return "this verifier is behind with the sessions that it has"
        longest_ms = bearable_s[len(bearable_s) // 10] * 1e3
        offered = rows_in(cost, longest_ms) / longest_ms * 1e3  # per second
        slo, tpot_s = newcomer.targets.slo, newcomer.targets.tpot_s
        ttft_s = slo.ttft_ms / 1e3 if slo else 0.0
        waiting = ttft_s / (self.answers.tokens * tpot_s) if tpot_s else 0.0
        # Sessions beyond KV or slots are preempted in turn, and their KV is computed again.
        preempted = max(without, demand.without_slot(limits) if preempts else 0.0)
        again = preempted / (PREEMPTED_FOR * max(self.answers.seconds, 1.0))
        # A session waiting for its first token needs no rows yet: this many more can be here at a time.
        if demand.rows + again > self.filled * (1.0 + waiting) * offered and len(bearable_s) > 1:
            return "this verifier could not keep the pace asked for"
        left = min(max(1.0 - demand.decoding / max(offered, 1e-9), PROMPTS_LEAST), PROMPTS_MOST)
        if ttft_s and demand.running and demand.unread > left * offered * ttft_s:
            return "too many prompts wait to be read"
        return ""

    def _refusal(self, message: str) -> Refusal:
        """Retry-After grows with the refusals per ended session, and is spread so that not all come back at once."""
        self._refused += 1
        self._refusals += 1
        wait_s = min(max(1.0, self.answers.seconds / 2.0 * max(1.0, self.refused_each)), LONGEST_S)
        return Refusal("overloaded", message, wait_s * (1.0 + self._refusals * GOLDEN % 1.0 / 2.0))


def keepable(newcomer: Session, cost: CostModel) -> bool:
    """Could an idle server meet this SLO? True while the cost model knows nothing."""
    slo = newcomer.targets.slo
    if slo is None or not cost.informed:
        return True
    prefill_ms = cost.ms(Load().plus(newcomer.progress.n_prompt, 0))
    round_ms = cost.ms(Load().plus(1, newcomer.progress.n_prompt))
    return not (0.0 < slo.ttft_ms < prefill_ms or 0.0 < slo.tpot_ms < round_ms / MOST_A_ROUND)


def rows_in(cost: CostModel, step_ms: float) -> float:
    """Rows that fit into a step of `step_ms`."""
    now = cost.now
    left = step_ms - cost.ms(Load())
    if left <= 0.0:
        return 0.0
    token = max(now.token + now.slice / ROWS_A_SLICE, 1e-9)
    flat = left / token
    if not now.knee or flat <= now.knee:
        return flat
    return now.knee + (left - token * now.knee) / (token + now.beyond)
