"""Strict due times: choose the next step so that the most expected tokens are delivered in time.

A *piece* is a candidate in this plan. All pieces are known and could run now. A step costs a fixed time plus the cost
of each of its pieces; a piece is delivered when its step ends. A draft may be cut, even to nothing: fewer tokens, but
some.

*Given the pieces and their forms*, if any schedule is in time, then this one is: pieces by due time, each step filled
as long as it ends by the due time of its first piece. Proof. (Order) If a piece i runs in a step before one with a
piece j, and j is due no later than i, move i into j's step: the former step and those up to j's end earlier, j's and
all later ones when they did, and j's ended by the due time of j, which i has at least. So due order loses nothing.
(Filling) With P(k) the cost of the first k pieces, b steps that run them end at b * fixed + P(k), however the pieces
are spread. By induction on b, the filled schedule has run at least as many pieces after b steps as any other in time.
Say it has run k, the other one j <= k, and after the next step j'. If j' > k, that step ends at (b + 1) * fixed +
P(j'), by the due time of its first piece and so by that of piece k + 1, which is due no earlier: the filled schedule
may run as far. If j' <= k there is nothing to show, except that piece k + 1 can be run at all: the other one runs it
in a step c > b that ends at c * fixed + P(k + 1) or later, and in time. QED.

The proof needs additive costs, and steps without a limit on pieces or tokens: with at most two pieces per step, filling
in due order can take one step more than pairing a short one with a long one. Limits, and a knee in the costs, are
respected, but then the schedule is only good, not optimal.

*The choice of pieces and forms* is a knapsack problem, and is not solved exactly. As in the algorithm of Moore and
Hodgson, pieces are added in due order. If one does not fit, the cheapest repair is made: cut or drop the pieces with
the fewest tokens per second, or drop one piece that is long enough, or one whose due time separates two steps, or the
new one. At the end, pieces that fit again are put back. With few pieces, a second schedule drops only where cutting
does not help, and the better of the two is used. Only the first step runs before the next decision, so the plan
covers only `AHEAD` pieces beyond it. With far too many pieces, planning stops after `REPAIRS` repairs; then a start
at a later piece, where due times allow a long step, is tried as well.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from heapq import heappop, heappush
from operator import attrgetter
from typing import NamedTuple

from wisp.core.verify.batching.base import Candidate, Grant, Kind
from wisp.core.verify.cost import Coefficients

AHEAD = 32  # pieces looked at beyond those in the first step
REPAIRS = 12  # after which there are far too many pieces
PUT_BACK = 150  # pieces scheduled again while pieces are put back
STARTS = 128  # pieces tried as the first, with far too many of them
FEW = 12  # pieces, up to which a second schedule is made
KEEP = 1e3  # in the second schedule: worth in tokens of a piece that is not dropped
LEAST_S = 1e-12  # least cost of a piece; on some machines only the step itself costs time
EPS = 1e-9  # seconds; rounding errors are smaller

_due = attrgetter("due")


class _Form(NamedTuple):
    """A way to run a piece.

    new:     tokens fed (0: dropped)
    seconds: added to a step
    tokens:  delivered
    rate:    tokens lost per second saved by the next shorter form
    """

    new: int
    seconds: float
    tokens: float
    rate: float


@lru_cache(maxsize=8192)
def curve(n_draft: int, gain: float) -> tuple[float, ...]:
    """Expected tokens committed by the first 0, 1, ... `n_draft` tokens of a draft, if all of them commit `gain`.

    The target's own token counts. All draft tokens have the same acceptance a: 1 + a + ... + a^n = gain.
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        a = (low + high) / 2
        if sum(a**i for i in range(n_draft + 1)) < gain:
            low = a
        else:
            high = a
    out = [1.0]
    for i in range(1, n_draft + 1):
        out.append(out[-1] + high**i)
    return tuple(out)


def first_step(
    now: float, pieces: Sequence[Candidate], cost: Coefficients, margin: float, most: int
) -> tuple[list[Grant], list[int]]:
    """The next step, in due order, and the sessions that are given up, since others would be late with them.

    margin: multiplier of predicted times. most: tokens in a step; a longer prompt is split over steps, a longer draft
    runs alone. A session that is neither granted nor given up need not run now.
    """
    order = sorted(pieces, key=_due)
    soonest = now + (cost.step + cost.slice + cost.token) * margin / 1e3
    hopeless = bisect_left(order, soonest - EPS, key=_due)
    lost = [w.session for w in order[:hopeless]]
    order = order[hopeless:]
    plan = _Schedule(now, cost, margin, most, 0.0)
    plan.fill(order)
    if len(plan.candidates) <= FEW and plan.repairs and plan.given_up():
        gentle = _Schedule(now, cost, margin, most, KEEP)
        gentle.fill(order)
        plan.put_back()
        gentle.put_back()
        if len(gentle.candidates) == len(plan.candidates) and gentle.worth > plan.worth:
            plan = gentle
    elif plan.repairs >= REPAIRS and (start := plan.densest(order)):
        later = _Schedule(now, cost, margin, most, 0.0)
        later.fill(order[start:])
        if later.throughput > plan.throughput:
            plan = later
            lost += [w.session for w in order[:start]]
    if plan.repairs:
        plan.put_back()
    return plan.grants(), lost + plan.given_up()


class _Schedule:
    """Pieces in due order, each with the form chosen for it. Seconds.

    keep: extra worth, in tokens, of each piece that is delivered
    """

    def __init__(self, now: float, cost: Coefficients, margin: float, most: int, keep: float) -> None:
        scale = margin / 1e3
        self.now = now - EPS
        self.most = most
        self.keep = keep
        self.fixed = cost.step * scale
        self.token = cost.token * scale
        self.cached = cost.cached * scale
        self.attention = cost.attention * scale
        self.slice = cost.slice * scale
        self.beyond = cost.beyond * scale if cost.knee else 0.0
        self.knee = cost.knee
        self.candidates: list[Candidate] = []
        self.forms: list[list[_Form]] = []  # whole first, dropped last; empty until needed
        self.form: list[int] = []  # index of the chosen one
        self.new: list[int] = []  # of that form
        self.seconds: list[float] = []
        self.gains: list[float] = []
        self.steps: list[int] = []  # number of the step of each piece, from 1
        # Before each piece, the step that it may join: end, its bound (a due time), tokens, first piece, number.
        self.before: list[tuple[float, float, int, int, int]] = []
        self.open: tuple[float, float, int, int, int] = (self.now, math.inf, 0, 0, 0)  # behind the last
        self.heap: list[tuple[float, int, int]] = []  # rate, piece, its form then
        self.reduced: set[int] = set()
        self.repairs = 0

    def densest(self, order: Sequence[Candidate]) -> int:
        """The first piece, in due order, of the step with the most tokens per second."""
        best, at = 0.0, 0
        seconds, gain, last = self.fixed, 0.0, 0
        ran: list[tuple[float, float]] = []  # tokens and seconds of each piece in its best form
        for first, w in enumerate(order[:STARTS]):
            while last < len(order):
                if last == len(ran):
                    rate, more = self._rate(order[last])
                    ran.append((rate * more, more))
                tokens, more = ran[last]
                if last > first and self.now + seconds + more > w.due:
                    break
                seconds, gain, last = seconds + more, gain + tokens, last + 1
            if gain > best * seconds and self.now + seconds <= w.due:
                best, at = gain / seconds, first
            seconds, gain = seconds - ran[first][1], gain - ran[first][0]
        return at

    def _rate(self, w: Candidate) -> tuple[float, float]:
        """Most tokens per second of a piece, and its seconds then."""
        seconds = self._cost(w, w.new)
        gain = w.expected_tokens
        if w.kind is Kind.VERIFY:
            shorter = self._cost(w, w.new - w.n_draft)
            if seconds > gain * shorter:
                gain, seconds = 1.0, shorter
        return gain / seconds, seconds

    def fill(self, order: Sequence[Candidate]) -> None:
        """Add pieces, as far as the plan covers them."""
        ahead = 0
        for w in order:
            if ahead >= AHEAD or self.repairs >= REPAIRS:
                break
            self._add(w)
            ahead = ahead + 1 if self.open[4] > 1 else 0

    def grants(self) -> list[Grant]:
        """The grants of the first step."""
        grants = []
        for w, new, step in zip(self.candidates, self.new, self.steps, strict=True):
            if step > 1:
                break
            if new:
                grants.append(Grant(w.session, min(new, self.most) if w.kind is Kind.PREFILL else new))
        return grants

    def given_up(self) -> list[int]:
        """Sessions that are dropped."""
        return [self.candidates[i].session for i in sorted(self.reduced) if not self.new[i]]

    @property
    def throughput(self) -> float:
        """Tokens delivered per second."""
        return self.worth / max(self.open[0] - self.now, 1e-9)

    @property
    def worth(self) -> float:
        """Tokens delivered, without `keep`."""
        return sum(self.gains) - self.keep * sum(new > 0 for new in self.new)

    def _add(self, w: Candidate) -> None:
        """Add a piece, due no earlier than the others, and repair the schedule if it does not fit."""
        i = len(self.candidates)
        self.candidates.append(w)
        self.forms.append([])
        self.form.append(0)
        self.new.append(w.new)
        self.seconds.append(self._cost(w, w.new))
        self.gains.append(w.expected_tokens + self.keep)
        self.steps.append(0)
        self.before.append(self.open)
        while (late := self._run(i)) < len(self.candidates):
            i = self._repair(late)

    def _run(self, start: int) -> int:
        """Fill steps with the pieces from `start` on. Returns the first late piece, or the number of pieces."""
        before, news, seconds, steps = self.before, self.new, self.seconds, self.steps
        fixed, most, knee, beyond = self.fixed, self.most, self.knee, self.beyond
        end, bound, filled, leader, step = before[start]
        for i in range(start, len(news)):
            before[i] = (end, bound, filled, leader, step)
            steps[i] = step
            new = news[i]
            if not new:
                continue
            whole = filled + new
            if filled and whole <= most:
                then = end + seconds[i]
                if beyond and whole > knee:
                    then += beyond * (whole - max(filled, knee))
                if then <= bound:
                    end, filled = then, whole
                    continue
            then = end + fixed + seconds[i]
            if beyond and new > knee:
                then += beyond * (new - knee)
            if then > self.candidates[i].due:
                return i
            step += 1
            steps[i] = step
            end, bound, filled, leader = then, self.candidates[i].due, new, i
        self.open = (end, bound, filled, leader, step)
        return len(news)

    def _repair(self, j: int) -> int:
        """Cut or drop pieces so that piece `j` is in time, or drop it. Returns the earliest changed piece."""
        if not self.forms[j]:
            for i in range(j + 1):
                if not self.forms[i]:
                    self.forms[i] = self._forms(self.candidates[i])
                    heappush(self.heap, (self.forms[i][0].rate, i, 0))
        due, dropped = self.candidates[j].due, len(self.forms[j]) - 1
        if self.now + self.fixed + self.forms[j][dropped - 1].seconds > due:
            self._set(j, dropped)
            return j
        self.repairs += 1
        end, bound, filled, *_ = self.before[j]
        need = end + self.fixed + self.seconds[j] - due  # in a step of its own
        if filled and filled + self.new[j] <= self.most:
            need = min(need, end + self.seconds[j] - bound)
        need += 1e-12
        least, one = self.gains[j], j
        for i, longer in enumerate(self.seconds):  # drop one that is long enough
            if longer >= need and self.gains[i] < least and self.new[i]:
                least, one = self.gains[i], i
        choice, loss = self._cheapest(need, least)
        if loss < least:
            least = loss
        else:
            choice = [(one, len(self.forms[one]) - 1)]
        for i in self._leaders(j):  # drop one that separates steps
            if self.gains[i] < least and self._fits_without(i, j):
                least, choice = self.gains[i], [(i, len(self.forms[i]) - 1)]
        if not choice:  # beyond the knee costs are not additive
            choice = [(j, dropped)]
        for i, form in choice:
            self._set(i, form)
        return min(i for i, _ in choice)

    def _cheapest(self, need: float, most_loss: float) -> tuple[list[tuple[int, int]], float]:
        """Shorter forms that save `need` seconds, cheapest first, and the tokens that they lose."""
        heap = self.heap
        taken: list[tuple[float, int, int]] = []
        cuts: dict[int, int] = {}
        saved = loss = 0.0
        while heap and saved < need and loss < most_loss:
            entry = heappop(heap)
            _, i, k = entry
            if cuts.get(i, self.form[i]) != k:
                continue  # out of date
            if i not in cuts:
                taken.append(entry)
            forms = self.forms[i]
            is_, after = forms[k], forms[k + 1]
            cuts[i] = k + 1
            loss += is_.tokens - after.tokens
            saved += is_.seconds - after.seconds
            if after.new:
                heappush(heap, (after.rate, i, k + 1))
        for entry in taken:
            heappush(heap, entry)
        if saved < need:
            return [], math.inf
        for i, k in list(cuts.items()):  # undo cuts that are not needed
            is_, after = self.forms[i][self.form[i]], self.forms[i][k]
            if saved - (is_.seconds - after.seconds) >= need:
                saved -= is_.seconds - after.seconds
                loss -= is_.tokens - after.tokens
                del cuts[i]
        return list(cuts.items()), loss

    def _leaders(self, j: int) -> list[int]:
        """The first pieces of the last few steps before `j`."""
        out: list[int] = []
        while len(out) < 3 and self.before[j][2]:
            j = self.before[j][3]
            out.append(j)
        return out

    def _fits_without(self, i: int, j: int) -> bool:
        new, opened = self.new[i], self.open
        before, steps = self.before[i : j + 1], self.steps[i : j + 1]
        self.new[i] = 0
        fits = self._run(i) > j
        self.new[i], self.open = new, opened
        self.before[i : j + 1], self.steps[i : j + 1] = before, steps
        return fits

    def put_back(self) -> None:
        """Undo cuts and drops that fit again, most tokens per second first."""
        n = len(self.candidates)
        left = PUT_BACK
        for i in sorted(
            self.reduced, key=lambda i: -self.candidates[i].expected_tokens / self.forms[i][0].seconds
        ):
            was = self.form[i]
            for form in range(was):
                left -= n - i
                self._set(i, form)
                if self._run(i) == n:
                    break
            else:
                self._set(i, was)
                self._run(i)
            if left < 0:
                return

    def _set(self, i: int, k: int) -> None:
        form = self.forms[i][k]
        self.form[i] = k
        self.new[i], self.seconds[i], self.gains[i] = form.new, form.seconds, form.tokens
        if k:
            self.reduced.add(i)
        else:
            self.reduced.discard(i)
        if form.new:
            heappush(self.heap, (form.rate, i, k))

    def _cost(self, w: Candidate, new: int) -> float:
        """Seconds that a piece adds to a step, at least LEAST_S."""
        seconds = new * (self.token + self.attention * (w.cached + new)) + self.cached * w.cached + self.slice
        if new > self.most and w.kind is Kind.PREFILL:
            seconds += (self.fixed + self.slice) * ((new - 1) // self.most)
        return max(seconds, LEAST_S)

    def _forms(self, w: Candidate) -> list[_Form]:
        """All forms, from whole to dropped. A draft is cut while that loses fewer tokens per second than a drop."""
        seconds, gain = self._cost(w, w.new), w.expected_tokens + self.keep
        new, draft = w.new, w.n_draft if w.kind is Kind.VERIFY else 0
        out = []
        gains = curve(draft, round(w.expected_tokens, 2)) if draft else ()
        while draft:
            cut = (draft + 3) // 4
            shorter, less = self._cost(w, new - cut), gains[draft - cut] + self.keep
            rate = (gain - less) / max(seconds - shorter, LEAST_S)
            if rate * seconds > gain:
                break
            out.append(_Form(new, seconds, gain, rate))
            new, seconds, gain, draft = new - cut, shorter, less, draft - cut
        return [*out, _Form(new, seconds, gain, gain / seconds), _Form(0, 0.0, 0.0, math.inf)]
