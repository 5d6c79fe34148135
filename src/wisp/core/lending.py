"""Who lends its KV where there is not enough for all: sessions far ahead of their pace.

A session that is ten seconds ahead has given its user ten seconds' worth of text, and needs neither engine nor memory
until that is read. A newcomer, who waits for a first token, needs memory now. So the session lends its own: its KV is
dropped, and read again when its next token comes due. The price is the reading, so a session lends only what it can do
without for a hundred times as long, and not when it is about to end, which frees its KV for good. Who is furthest ahead
lends first; who has no due time comes before them, the youngest first.

Where nobody can spare anything and not even a token for each session would fit, those least behind lend all the same:
better that few stand still than all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wisp.core.batching import Kind, Work
from wisp.core.cost import CostModel, Load

SPARE_S = 3.0  # nobody lends who needs it sooner
WORTH = 100.0  # times as long as reading it again takes
ENDING = 16  # tokens; who will generate no more than this does not lend
URGENT_S = 0.5  # before its reading has to begin, a prompt may borrow


def lenders(now: float, work: Sequence[Work], room: float, cost: CostModel) -> list[int]:
    """Whose KV is to go, so that there is room for what cannot wait. `room`: tokens that can be had otherwise."""
    wanted = {w.session: w.new for w in work if is_urgent(now, w, cost)}
    least = {w.session: w.new - w.n_draft for w in work if w.kind is not Kind.PREFILL}
    if not wanted:  # nobody is under way: rather than stand still, read
        wanted = {w.session: w.new for w in sorted(work, key=lambda w: (w.due, w.session))[:1]}
    willing, forced = _split(now, [w for w in work if w.cached], cost)
    chosen: list[int] = []
    for able, need in ((willing, wanted), (forced, least)):
        missing = sum(need.values()) - room
        while able and missing > need.get(able[-1].session, 0):  # nobody lends for their own sake
            w = able.pop()
            chosen.append(w.session)
            room += w.cached
            missing -= w.cached + need.get(w.session, 0)
            least.pop(w.session, None)
    return chosen


def slot_lender(now: float, work: Iterable[Work], cost: CostModel) -> int | None:
    """Who can best do without a slot, if anybody can."""
    willing, _ = _split(now, work, cost)
    return willing[-1].session if willing else None


def is_urgent(now: float, w: Work, cost: CostModel) -> bool:
    """Can it not wait for memory any longer? True of whoever is under way."""
    return w.kind is not Kind.PREFILL or w.due - now < URGENT_S + 2.0 * w.new * _token_s(cost)


def _split(now: float, work: Iterable[Work], cost: CostModel) -> tuple[list[Work], list[Work]]:
    """Those who can spare their KV, and those who cannot: of both the best to lend last."""
    token_s = _token_s(cost)
    willing: list[Work] = []
    forced: list[Work] = []
    for w in sorted(work, key=lambda w: (w.due, w.opened, w.session)):
        spare = w.room > ENDING and w.due - now > max(SPARE_S, WORTH * token_s * w.cached)
        (willing if spare else forced).append(w)
    return willing, forced


def _token_s(cost: CostModel) -> float:
    return cost.token_ms(Load()) / 1e3
