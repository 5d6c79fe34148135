"""SLO admission: a session is admitted while the engine time and the KV that all sessions need add up to what there is.

A session waits for its first token, as long as others did, and has its TPOT target for each token. What its rows take
of the engine, over the time of the whole answer, is the share that it needs. The fixed cost of steps is shared by all:
there must be enough of them for the fastest user. Waits, lengths of answers, rows per token and tokens per slice are
those seen so far, and costs are the cost model's, which follows the engine. Prompts that wait must be read before the
newcomer's first token is due.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from wisp.core.verify.admission import Refusal
from wisp.core.verify.answers import Answers
from wisp.core.verify.cost import CostModel, Load
from wisp.core.verify.events import Limits
from wisp.core.verify.session import Session
from wisp.core.verify.states import PARKED, WAITING
from wisp.core.verify.targets import RELAXED

PROMISED = 0.96  # share of the engine's time that is promised; the rest is for chance and the host
MOST_A_ROUND = 8.0  # tokens that a session could commit per step with the best of drafts
LONGEST_S = 20.0  # longest Retry-After, before it is spread by up to half
FRESH_S = 0.1  # age up to which the sessions' states are not read again: thousands of them take milliseconds
SILENT_S = 5.0  # a session whose edge has been away for longer than any draft takes counts for nothing
AWAY = frozenset({WAITING, PARKED})


class _Share(NamedTuple):
    """What one session needs.

    kv:        tokens, halfway through its answer
    unread:    prompt tokens to be read before its first token is due
    prompt, attention, tokens, context: per second: rows of the prompt, these x the prompt's length, tokens of the
               answer, these x the context
    pace:      tokens per second that its user expects
    """

    kv: float
    unread: int
    prompt: float = 0.0
    attention: float = 0.0
    tokens: float = 0.0
    context: float = 0.0
    pace: float = 0.0


class Demand:
    """What all sessions need: the sum of their shares, and the fastest pace."""

    def __init__(self, sessions: Iterable[Session], answers: Answers) -> None:
        self.answers = answers
        self.kv = self.unread = self.prompt = self.attention = self.tokens = self.context = self.pace = 0.0
        self._shares: dict[int, _Share] = {}
        for s in sessions:
            self.add(s)

    def __len__(self) -> int:
        return len(self._shares)

    def add(self, s: Session) -> None:
        """Count one more session."""
        share = self._shares[s.handle] = self._share(s)
        self._count(share, 1)
        self.pace = max(self.pace, share.pace)

    def remove(self, handle: int) -> None:
        """Take back what was counted for a session, if it was. Its pace stays until the sessions are read again."""
        share = self._shares.pop(handle, None)
        if share is not None:
            self._count(share, -1)

    def _count(self, share: _Share, n: int) -> None:
        self.kv += n * share.kv
        self.unread += n * share.unread
        self.prompt += n * share.prompt
        self.attention += n * share.attention
        self.tokens += n * share.tokens
        self.context += n * share.context

    def _share(self, s: Session) -> _Share:
        targets, n_prompt = s.targets, s.progress.n_prompt
        lost, slo = targets.slo_lost, targets.slo
        answer = min(s.params.max_tokens, self.answers.tokens)
        context = n_prompt + answer / 2.0
        missing = n_prompt - s.progress.at_hand
        unread = 0 if lost or s.progress.committed else missing
        if slo is None or not slo.tpot_ms:
            return _Share(context, unread)
        token_s = slo.tpot_ms / 1e3 * (RELAXED if lost else 1.0)
        whole_s = min(self.answers.waited_s, slo.ttft_ms / 1e3) + answer * token_s
        prompt, tokens = missing / whole_s, answer / whole_s
        pace = 0.0 if lost else 1.0 / token_s
        return _Share(context, unread, prompt, prompt * n_prompt, tokens, tokens * context, pace)

    def engine(self, cost: CostModel) -> float:
        """The share of the engine's time that is needed: 1 is all of it."""
        now, answers = cost.now, self.answers
        rows_a_token, tokens_a_slice = answers.rows_a_token, answers.tokens_a_slice
        rows, slices = self.prompt + rows_a_token * self.tokens, self.tokens / tokens_a_slice
        steps = self.pace / tokens_a_slice
        ms = now.step * steps + now.token * rows + now.slice * slices
        ms += now.attention * (self.attention + rows_a_token * self.context)
        ms += now.cached * self.context / tokens_a_slice
        if now.knee:
            ms += now.beyond * max(0.0, rows - steps * now.knee)
        return ms / 1e3

    def reading_ms(self, cost: CostModel) -> float:
        """How long the engine needs for the prompts that wait."""
        return self.unread * cost.token_ms(Load(int(self.unread)))


class SloAdmission:
    """Decides who is admitted. refused: sessions that were refused and may come back, less those that have ended since:
    each has made room for one."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.refused = 0
        self._refusals = 0  # since the start
        self._demand: Demand | None = None  # of the present sessions
        self._looked_at = -math.inf

    def entered(self, s: Session) -> None:
        """A session has begun."""
        if self._demand is not None:
            self._demand.add(s)

    def left(self, s: Session) -> None:
        """A session has ended, complete or not."""
        self.refused = max(0, self.refused - 1)
        if self._demand is not None:
            self._demand.remove(s.handle)

    def check(
        self, now: float, sessions: Iterable[Session], newcomer: Session, cost: CostModel, limits: Limits
    ) -> None:
        """Raises Refusal if `newcomer`, which has an SLO, would miss it or make others miss theirs."""
        if self._demand is None or now - self._looked_at > FRESH_S:
            present = (s for s in sessions if s.state not in AWAY or s.since > now - SILENT_S)
            self._demand, self._looked_at = Demand(present, self.answers), now
        demand = self._demand
        if not len(demand):
            return  # alone, it has all that there is
        pace = demand.pace
        demand.add(newcomer)
        problem = _problem(demand, newcomer, cost, limits)
        demand.remove(newcomer.handle)
        demand.pace = pace  # a refused user needs no steps; `entered` counts an admitted one
        if problem:
            raise self._refusal(problem, len(demand))

    def _refusal(self, message: str, sessions: int) -> Refusal:
        """Retry-After is when as many sessions will have ended as were refused; spread, as it has bounds."""
        self._refusals += 1
        room_s = self.answers.seconds / sessions  # until a session ends
        self.refused = min(self.refused + 1, math.ceil(LONGEST_S / room_s))
        wait_s = min(max(1.0, self.refused * room_s), LONGEST_S)
        return Refusal("overloaded", message, wait_s * (1.0 + self._refusals % 16 / 32.0))


def _problem(demand: Demand, newcomer: Session, cost: CostModel, limits: Limits) -> str:
    """The reason to refuse `newcomer`, which `demand` includes; "" for none."""
    slo = newcomer.targets.slo
    if demand.kv > limits.kv_tokens:
        return "this verifier has no room for another context now"
    if slo is not None and slo.tpot_ms and demand.engine(cost) > PROMISED:
        return "this verifier could not keep the pace asked for"
    if slo is not None and 0.0 < slo.ttft_ms < demand.reading_ms(cost):
        return "too many prompts wait to be read"
    return ""


def keepable(newcomer: Session, cost: CostModel) -> bool:
    """Could an idle server meet this SLO? True while the cost model knows nothing."""
    slo = newcomer.targets.slo
    if slo is None or not cost.informed:
        return True
    n_prompt, at_hand = newcomer.progress.n_prompt, newcomer.progress.at_hand
    prefill_ms = cost.ms(Load().plus(n_prompt - at_hand, at_hand))
    round_ms = cost.ms(Load().plus(1, n_prompt))
    return not (0.0 < slo.ttft_ms < prefill_ms or 0.0 < slo.tpot_ms < round_ms / MOST_A_ROUND)
