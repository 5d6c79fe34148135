"""Would one more session keep its pace? Admission by what the cost model says, not by counting sessions.

Tokens that all sessions are owed per second, times the rows that a token takes, must fit into the rows that steps of
a bearable length do per second. Rows per token are taken as they are under pressure, when the price of drafts has
made edges careful; below that load nobody is refused anyway. What the forecast cannot know (luck with drafts, users
who leave, a host that is slow) shows in how many are behind their pace, which counts too, and in how many answers were
late: `SloAdmission` promises less then.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

from wisp.core.verify.admission import Refusal
from wisp.core.verify.cost import CostModel, Load
from wisp.core.verify.events import Limits
from wisp.core.verify.session import PARKED, WAITING, Session

ROWS_A_TOKEN = 1.25  # drafts and the target's own, per committed token, under pressure
ROWS_A_SLICE = 2.5  # what a session brings to a step
FILLED = 1.05  # of what the cost model offers, to begin with
LEAST_FILLED, MOST_FILLED = 0.7, 1.15  # however many were late, or in time
IN_TIME, LATE = 0.0006, -0.0094  # what an answer changes: at rest, six in a hundred are late
BACK = 0.002  # of the way back to where it began, with every answer: a burst is forgotten
MOST_A_ROUND = 8.0  # tokens that a session could commit in every step, with the best of drafts
LENDABLE = 0.5  # share of the KV of sessions for which there need be no room, if they lend it to each other
OVERBOOKED = 0.1  # the same, if they do not: those that wait for their first token need none yet
LOAN = 0.15  # of an answer's time
TOO_MANY = 0.6  # share of sessions that are behind
# Share of the rows until a first token is due that prompts may ask for: what decoding leaves, within these. Decoding
# can wait for a crowd of them, and steps are longer, so more rows can be had than are counted on.
READING_LEAST, READING_MOST = 1.0, 1.2
MOST_REFUSED = 30  # for one session that ended: a crowd is forgotten
LONGEST_S = 20.0  # to come again, and half as much to spread
FRESH_S = 0.1  # who is here is known at once, how they fare no older than this: a look at thousands takes milliseconds
AWAY = frozenset({WAITING, PARKED})
SILENT_S = 5.0  # whose edge has been away for longer than any draft takes asks for nothing
GOLDEN = 0.6180339887  # its multiples' fractions spread evenly


class _Share(NamedTuple):
    """What one session adds to the demand. `pace`: 0 if it has none to keep."""

    kv: float
    unread: int
    rows: float
    decoding: float
    begun: bool
    running: bool
    behind: bool
    pace: float


class Demand:
    """What sessions ask for. Rows are per second; paces are the longest steps that sessions can bear, in seconds."""

    def __init__(self, sessions: Iterable[Session], answer_tokens: float) -> None:
        self.answer_tokens = answer_tokens
        self.rows = self.decoding = 0.0  # with those of prompts, and without
        self.kv = 0.0  # tokens
        self.unread = 0  # tokens, of prompts of sessions without a first token
        self.running = self.behind = self.sessions = self.begun = 0
        self.paces: list[float] = []  # ascending
        self._shares: dict[int, _Share] = {}
        for s in sessions:
            share = self._shares[s.handle] = self._share(s)
            self._count(share, 1)
            if share.pace:
                self.paces.append(share.pace)
        self.paces.sort()

    def add(self, s: Session) -> None:
        """One more."""
        share = self._shares[s.handle] = self._share(s)
        self._count(share, 1)
        if share.pace:
            insort(self.paces, share.pace)

    def remove(self, handle: int) -> None:
        """One less, if it was counted: as it was then."""
        share = self._shares.pop(handle, None)
        if share is not None:
            self._count(share, -1)
            if share.pace:
                del self.paces[bisect_left(self.paces, share.pace)]

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
        tokens, n_prompt, tpot_s = min(s.max_tokens, self.answer_tokens), s.n_prompt, s.tpot_s
        begun = len(s.chain) > n_prompt
        kv, unread = n_prompt + tokens / 2, 0 if begun else n_prompt
        if not tpot_s:
            return _Share(kv, unread, 0.0, 0.0, begun, False, False, 0.0)
        token_s = 2.0 * tpot_s if s.late else tpot_s
        rows, decoding = (ROWS_A_TOKEN + n_prompt / tokens) / token_s, ROWS_A_TOKEN / token_s
        if s.late:
            return _Share(kv, unread, rows, decoding, begun, False, False, 0.0)
        pace = tpot_s * (s.usual + 1.0) / 2.0
        return _Share(kv, unread, rows, decoding, begun, begun, begun and s.lag_s > 0.0, pace)

    def without_kv(self, limits: Limits) -> float:
        """Tokens of KV for which there is no room."""
        return max(0.0, self.kv - limits.kv_tokens)

    def without_slot(self, limits: Limits) -> float:
        """The same for want of slots. Who waits for a first token can wait for a slot, too."""
        return max(0, self.begun - limits.slots) / max(self.sessions, 1) * self.kv


class SloAdmission:
    """What answers look like here, smoothed, and how much of what the cost model offers can be promised: less with
    each answer that was late, a little more with each that was not."""

    def __init__(self) -> None:
        self.answer_tokens = 200.0
        self.answer_s = 10.0
        self.filled = FILLED
        self.refused_each = 0.0  # newcomers refused for each session that ended, smoothed
        self._refused = 0  # since the last one
        self._refusals = 0  # ever
        self._demand: Demand | None = None  # of those who are here
        self._looked_at = -math.inf

    def ended(self, tokens: int, seconds: float, in_time: bool) -> None:
        """An answer is complete."""
        self.filled += (IN_TIME if in_time else LATE) + BACK * (FILLED - self.filled)
        self.filled = min(max(self.filled, LEAST_FILLED), MOST_FILLED)
        self.answer_tokens += 0.05 * (tokens - self.answer_tokens)
        self.answer_s += 0.05 * (seconds - self.answer_s)

    def entered(self, s: Session) -> None:
        """A session has begun."""
        if self._demand is not None:
            self._demand.add(s)

    def left(self, s: Session) -> None:
        """A session has ended, with an answer or without."""
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
        """Raises Refusal where `newcomer`, which has an SLO, would be late or make others late."""
        if self._demand is None or now - self._looked_at > FRESH_S:
            asking = (s for s in sessions if s.state not in AWAY or s.since > now - SILENT_S)
            self._demand, self._looked_at = Demand(asking, self.answer_tokens), now
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
        """What speaks against a newcomer, who is counted in already; "" for nothing."""
        without = demand.without_kv(limits)
        if without > (LENDABLE if preempts else OVERBOOKED) * demand.kv:
            return "this verifier has no room for another context now"
        paces = demand.paces
        if not paces:
            return ""
        if demand.running >= 4 and demand.behind > TOO_MANY * demand.running:
            return "this verifier is behind with the sessions that it has"
        longest_ms = paces[len(paces) // 10] * 1e3
        offered = rows_in(cost, longest_ms) / longest_ms * 1e3
        ttft_s = newcomer.slo.ttft_ms / 1e3 if newcomer.slo else 0.0
        waiting = ttft_s / (self.answer_tokens * newcomer.tpot_s) if newcomer.tpot_s else 0.0
        # What there is no KV or slot for is lent, and has to be read again.
        lent = max(without, demand.without_slot(limits) if preempts else 0.0) / (
            LOAN * max(self.answer_s, 1.0)
        )
        # Who waits for a first token asks for nothing yet, and so many may wait at a time.
        if demand.rows + lent > self.filled * (1.0 + waiting) * offered and len(paces) > 1:
            return "this verifier could not keep the pace asked for"
        left = min(max(1.0 - demand.decoding / max(offered, 1e-9), READING_LEAST), READING_MOST)
        if ttft_s and demand.running and demand.unread > left * offered * ttft_s:
            return "too many prompts wait to be read"
        return ""

    def _refusal(self, message: str) -> Refusal:
        """Come again when there may be room: later where many are turned away for each answer, and not all at once."""
        self._refused += 1
        self._refusals += 1
        wait_s = min(max(1.0, self.answer_s / 2.0 * max(1.0, self.refused_each)), LONGEST_S)
        return Refusal("overloaded", message, wait_s * (1.0 + self._refusals * GOLDEN % 1.0 / 2.0))


def keepable(newcomer: Session, cost: CostModel) -> bool:
    """Could a server that does nothing else keep this SLO? True while nothing is known of the server."""
    slo = newcomer.slo
    if slo is None or not cost.informed:
        return True
    read_ms = cost.ms(Load().plus(newcomer.n_prompt, 0))
    round_ms = cost.ms(Load().plus(1, newcomer.n_prompt))
    return not (0.0 < slo.ttft_ms < read_ms or 0.0 < slo.tpot_ms < round_ms / MOST_A_ROUND)


def rows_in(cost: CostModel, step_ms: float) -> float:
    """Tokens that fit into a step of so long."""
    now = cost.now
    left = step_ms - cost.ms(Load())
    if left <= 0.0:
        return 0.0
    token = max(now.token + now.slice / ROWS_A_SLICE, 1e-9)
    flat = left / token
    if not now.knee or flat <= now.knee:
        return flat
    return now.knee + (left - token * now.knee) / (token + now.beyond)
