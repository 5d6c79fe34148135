"""Who preempts its KV where there is not enough for all: sessions far ahead of their pace.

A session that is ten seconds ahead has given its user ten seconds' worth of text, and needs neither engine nor memory
until that is read. A newcomer, who waits for a first token, needs memory now. So the session preempts its own: its KV is
dropped, and read again when there is room, or its next token comes due. The price is the reading, so a session preempts
only what it can do without for a hundred times as long, and not when it is about to end, which frees its KV for good.
Who is furthest ahead preempts first; who has no due time comes before them, the youngest first, and so may lend all for a
single token.

Where nobody can spare anything and not even a token for each session would fit, those least behind lend all the same:
better that few stand still than all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wisp.core.verify.batching import Candidate, Kind
from wisp.core.verify.cost import CostModel, Load

SPARE_S = 3.0  # nobody preempts who needs it sooner
WORTH = 100.0  # times as long as reading it again takes
ENDING = 16  # tokens; who will generate no more than this does not lend
URGENT_S = 0.5  # before its reading has to begin, a prompt may borrow


def victims(now: float, work: Sequence[Candidate], room: float, cost: CostModel) -> list[int]:
    """Whose KV is to go, so that there is room for what cannot wait. `room`: tokens that can be had otherwise."""
    wanted = {w.session: w.new for w in work if is_urgent(now, w, cost)}
    least = {w.session: w.new - w.n_draft for w in work if _under_way(w)}
    if not wanted:  # nobody is under way: rather than stand still, read
        wanted = {w.session: w.new for w in sorted(work, key=_first_due)[:1]}
    willing, forced = _split(now, work, cost)
    chosen: list[int] = []
    for able, need in ((willing, wanted), (forced, least)):
        missing = sum(need.values()) - room
        for w in able:
            if missing <= 0:
                break
            own = need.get(w.session, 0)
            if missing <= own:
                continue  # nobody preempts for their own sake
            chosen.append(w.session)
            room += w.cached
            missing -= w.cached + own
            least.pop(w.session, None)
    return chosen


def slot_victims(now: float, work: Iterable[Candidate], cost: CostModel) -> list[int]:
    """Who can do without a slot, the best first."""
    return [w.session for w in _split(now, work, cost)[0]]


def is_urgent(now: float, w: Candidate, cost: CostModel) -> bool:
    """Can it not wait for memory any longer? True of whoever has some and goes on."""
    return _under_way(w) or w.due - now < URGENT_S + 2.0 * w.new * _token_s(cost)


def _under_way(w: Candidate) -> bool:
    return w.kind is not Kind.PREFILL and w.cached > 0


def _first_due(w: Candidate) -> tuple[float, float, int]:
    return w.due, w.opened, w.session


def _split(now: float, work: Iterable[Candidate], cost: CostModel) -> tuple[list[Candidate], list[Candidate]]:
    """Of those who have KV, who can spare it and who cannot; the best to lend first."""
    token_s = _token_s(cost)
    willing: list[Candidate] = []
    forced: list[Candidate] = []
    for w in sorted((w for w in work if w.cached), key=_first_due, reverse=True):
        spare = w.room > ENDING and w.due - now > max(SPARE_S, WORTH * token_s * w.cached)
        (willing if spare else forced).append(w)
    return willing, forced


def _token_s(cost: CostModel) -> float:
    return cost.token_ms(Load()) / 1e3
