"""Preemption of KV: sessions far ahead of their TPOT target give up their KV to candidates that cannot wait.

A session that is ten seconds ahead has given its user text for ten seconds. Until then it needs neither engine nor
memory, while a new session needs memory for its first token. So its KV is dropped, and computed again when there is
free KV or its next token comes due. Preemption costs that second prefill. A victim must therefore be able to wait a
hundred times as long as the prefill takes, and must not be about to end, which frees its KV for good.

Order of victims: sessions without SLO first, the youngest of them first, then the largest slack. A session without
SLO may lose all its KV for a single token of another.

If these victims are not enough for one token per running session, the sessions with the least lag are preempted too:
it is better to stop a few than all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wisp.core.verify.batching import Candidate, Kind
from wisp.core.verify.cost import CostModel, Load

SPARE_S = 3.0  # least slack of a victim
WORTH = 100.0  # least slack of a victim, in multiples of the time to compute its KV again
ENDING = 16  # tokens; a session with no more than this to generate is not preempted
URGENT_S = 0.5  # a prompt may preempt a slot this long before its prefill must start,
EARLY_S = 2.0  # and KV of sessions that are ahead this long


def victims(now: float, candidates: Sequence[Candidate], free_kv: float, cost: CostModel) -> list[int]:
    """Sessions to preempt so that urgent candidates fit. `free_kv`: KV tokens available without preemption."""
    wanted = {c.session: c.new for c in candidates if is_urgent(now, c, cost, EARLY_S)}
    least = {c.session: c.new - c.n_draft for c in candidates if _running(c)}
    if not wanted:  # nothing runs: start the first prompt rather than stand still
        wanted = {c.session: c.new for c in sorted(candidates, key=_first_due)[:1]}
    willing, forced = _split(now, candidates, cost)
    chosen: list[int] = []
    for able, need in ((willing, wanted), (forced, least)):
        missing = sum(need.values()) - free_kv
        for c in able:
            if missing <= 0:
                break
            own = need.get(c.session, 0)
            if missing <= own:
                continue  # only its own need is missing: no session is preempted for itself
            chosen.append(c.session)
            free_kv += c.cached
            missing -= c.cached + own
            least.pop(c.session, None)
    return chosen


def slot_victims(now: float, candidates: Iterable[Candidate], cost: CostModel) -> list[int]:
    """Sessions that may lose their slot, best victim first."""
    return [c.session for c in _split(now, candidates, cost)[0]]


def is_urgent(now: float, c: Candidate, cost: CostModel, within_s: float = URGENT_S) -> bool:
    """Must it have memory now? Always true of a session that has KV and goes on."""
    return _running(c) or c.due - now < within_s + 2.0 * c.new * _token_s(cost)


def _running(c: Candidate) -> bool:
    return c.kind is not Kind.PREFILL and c.cached > 0


def _first_due(c: Candidate) -> tuple[float, float, int]:
    return c.due, c.opened, c.session


def _split(
    now: float, candidates: Iterable[Candidate], cost: CostModel
) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates with KV: those with enough slack to lose it, and the others. Best victim first."""
    token_s = _token_s(cost)
    willing: list[Candidate] = []
    forced: list[Candidate] = []
    for c in sorted((c for c in candidates if c.cached), key=_first_due, reverse=True):
        spare = c.remaining > ENDING and c.due - now > max(SPARE_S, WORTH * token_s * c.cached)
        (willing if spare else forced).append(c)
    return willing, forced


def _token_s(cost: CostModel) -> float:
    return cost.token_ms(Load()) / 1e3
