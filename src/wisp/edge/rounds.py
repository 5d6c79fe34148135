"""The timings of a session's rounds, and the reasons for rounds without a draft: for requests that ask, for the edge's
page, and for traces.

The drafter decides; this module only records.
"""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace

from wisp.api import tracing
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.round_times import RoundTimes
from wisp.core.protocol.messages import Draft, Open, Verdict
from wisp.core.protocol.step import Committed, Round
from wisp.engines.base import Proposal

WHY = {
    "": "It drafts, as long as that pays.",
    "no_drafter": "This edge was started without a drafter (--draft none).",
    "switched_off": "The request asked for an answer without drafts.",
    "slow_device": "The verifier alone is faster than this device and its link with drafts.",
    "price": "At the verifier's price a draft token costs more than it is likely to bring.",
    "nothing_to_propose": "The drafter had nothing to propose.",
    "unlikely": "No draft token was likely enough to be accepted to be worth its time.",
}


class RoundLog:
    """The rounds of one session. Times are milliseconds."""

    def __init__(
        self, now_ms: float, times: RoundTimes, *, off: str, span: tracing.Span = tracing.NONE
    ) -> None:
        """off: why this session never drafts, "" if it may. span: of the session; rounds become parts of it."""
        self._off = off
        self._span = span
        self._served: tuple[float, float, int] | None = None  # begin, end and verdicts of server mode
        self._rounds = 0
        self._whys: Counter[str] = Counter()  # of rounds without a draft
        self._times = times
        self._began = self._heard = now_ms
        self._steps = 0  # since the last round
        self._dry = False
        self._forced: list[
            int
        ] = []  # places, in the last verdict's new tokens, that a grammar left no choice for
        self._drafting_ms = 0.0  # since the last draft was sent
        self._sent: dict[int, tuple[float, float, bool]] = {}  # by round: when, drafting before it, ahead
        self._opening = 0  # the round of the last Open
        self._round: Round | None = None

    def proposed(self, took_ms: float, proposal: Proposal | None) -> None:
        """The drafter was asked for a token."""
        self._dry = proposal is None
        self._steps += not (proposal is not None and proposal.signal.certain)  # then no model was asked
        self._drafting_ms += took_ms

    def sent(self, now_ms: float, message: Open | Draft) -> None:
        """An Open or a draft leaves."""
        if isinstance(message, Open):  # whatever was in flight is lost
            self._sent.clear()
            self._opening = message.round
        elif message.round in self._sent:  # once more, with branches
            return
        self._sent[message.round] = (now_ms, self._drafting_ms, bool(self._sent))
        self._drafting_ms = 0.0

    def verdict(self, arrived_ms: float, verdict: Verdict, drafter: Drafter) -> None:
        """A verdict is here; the drafter has not been told yet."""
        known = self._sent.pop(verdict.round, None)
        sent, draft_ms, ahead = known or (self._heard, 0.0, False)
        self._sent = {number: flight for number, flight in self._sent.items() if number > verdict.round}
        flights = [f for f in drafter.rounds.flights if f.round == verdict.round]
        drafted = flights[0].drafted if flights else 0  # tokens of earlier drafts included
        why = self._off or self._reason(known is not None, drafted, verdict, drafter)
        chain, known_here = drafter.chain, len(drafter.committed) - verdict.base
        agreed = chain.agreed(verdict.tokens[max(0, known_here) :])
        self._forced = [i for i, odds in enumerate(chain.odds[:agreed]) if odds.certain]
        self._rounds += 1
        self._whys[why] += bool(why)
        waited = max(0.0, arrived_ms - sent)
        self._round = Round(
            at_ms=_ms(arrived_ms - self._began),
            draft_ms=_ms(draft_ms),
            flight_ms=_ms(max(0.0, waited - verdict.queue_ms - verdict.engine_ms) if known else 0.0),
            queue_ms=_ms(verdict.queue_ms),
            verify_ms=_ms(verdict.engine_ms),
            drafted=drafted,
            accepted=verdict.accepted,
            steps=self._steps,
            ahead=ahead,
            price=round(verdict.price, 4),
            why=why,
        )
        if self._span.recording:
            self._trace(self._round, verdict.round, sent if known else None, arrived_ms)
        self._heard = arrived_ms
        self._steps = 0

    def over(self) -> None:
        """The session has ended."""
        if self._served is not None:
            begun, ended, verdicts = self._served
            self._served = None
            self._span.child("served", begun / 1e3, {"wisp.verdicts": verdicts}).end(ended / 1e3)

    def _trace(self, r: Round, number: int, sent_ms: float | None, arrived_ms: float) -> None:
        """A round as spans. When the verifier began is not known here: the ways there and back count as equal."""
        if sent_ms is None:  # unasked, and one of many
            begun, _, verdicts = self._served or (self._heard, 0.0, 0)
            self._served = (begun, arrived_ms, verdicts + 1)
            return
        self.over()
        opening = number == self._opening
        attributes: tracing.Attributes = {
            "wisp.round": number,
            "wisp.drafted": r.drafted,
            "wisp.accepted": r.accepted,
            "wisp.ahead": r.ahead,
            "wisp.price": r.price,
            "wisp.queue_ms": r.queue_ms,
        }
        if r.why:
            attributes["wisp.why"] = r.why
        begun_ms = sent_ms - r.draft_ms
        span = self._span.child("open" if opening else "round", begun_ms / 1e3, attributes)
        if r.draft_ms:
            span.child("draft", begun_ms / 1e3).end(sent_ms / 1e3)
        flight = span.child("flight", sent_ms / 1e3)
        work_ms = sent_ms + r.flight_ms / 2 + r.queue_ms
        verify = flight.child("prefill" if opening else "verify", work_ms / 1e3)
        verify.end((work_ms + r.verify_ms) / 1e3)
        flight.end(arrived_ms / 1e3)
        span.end(arrived_ms / 1e3)

    @property
    def why(self) -> str:
        """Why most of its rounds had no draft; "" if most had one."""
        why, n = max(self._whys.items(), key=lambda item: item[1], default=(self._off, 0))
        return why if 2 * n > self._rounds or not self._rounds else ""

    def told(self, committed: Committed) -> Committed:
        """The same, with the round that it came of. Of a draft sent ahead, it counts what was not settled before."""
        found, self._round = self._round, None
        if found is None:
            return committed
        drafted, accepted = committed.drafted, committed.accepted
        forced = [i for i in self._forced if i < committed.from_draft]
        return replace(committed, round=replace(found, drafted=drafted, accepted=accepted, forced=forced))

    def _reason(self, asked: bool, drafted: int, verdict: Verdict, drafter: Drafter) -> str:
        if drafter.rounds.serve:
            return "slow_device"
        last = drafter.task.max_tokens - len(drafter.committed) <= 1  # the target's own in any case
        if drafted or not asked or last or not verdict.round:
            return ""
        if self._dry:
            return "nothing_to_propose"
        return "price" if verdict.price > self._times.verify.slope * self._times.speed(1) else "unlikely"


def _ms(value: float) -> float:
    return round(value, 2)
