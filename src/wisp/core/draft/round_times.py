"""Round times: smoothed measurements of a session's draft engine, link and verifier.

With them a drafting policy weighs one more draft token against the time that it takes.
"""

from __future__ import annotations

TYPICAL = 0.8  # acceptance, before anything is known of it
# Share of corrections that are the drafter's second choice, before any was seen: 0.51 of 643.
LIKELY = 0.5
# Weights of the newest measurement in a mean: of draft steps, of which there are many, of rounds, and of chances.
STEP, ROUND, CHANCE = 0.1, 0.15, 0.03
PRIOR = 10  # measurements that the typical chances are worth
# Weight of the past after one more round, in sums: half of it is gone after 23 rounds.
PAST = 0.97
# The same after one more token that was not drafted: estimates return to typical values, and a draft step that was slow
# is tried again at some time.
UNSEEN, SLOW = 0.98, 0.998
INHERITED = 0.2  # share of the measured speed's weight that a device's next session has
FEW = 5.0  # tokens: of no more than these, no speed is measured
HELD_UP = 2.0  # times the mean draft step: a longer one counts as this
LEAST_MS = 1e-3  # the shortest time of a round
SURE = 4.0  # squared standard errors from which on a slope counts
SAME = 1e-3  # relative difference up to which two times of a draft step count as the same


class Mean:
    """Exponentially weighted mean and mean absolute deviation. `start` is worth `prior` measurements."""

    __slots__ = ("deviation", "n", "prior", "value", "weight")

    def __init__(self, start: float, weight: float, prior: int = 0) -> None:
        self.value = start
        self.deviation = 0.0
        self.weight = weight
        self.prior = prior
        self.n = 0

    def add(self, x: float) -> None:
        self.n = n = self.n + 1
        w = 1.0 / (n + self.prior)
        if w < self.weight:
            w = self.weight
        off = x - self.value
        if n > 1:
            self.deviation += w * (abs(off) - self.deviation)
        self.value += w * off

    def add_each(self, yes: int, n: int) -> None:
        """Take in `n` ones and zeros, of which the first `yes` are ones."""
        seen, value, deviation, prior, weight = self.n, self.value, self.deviation, self.prior, self.weight
        for i in range(n):
            seen += 1
            w = 1.0 / (seen + prior)
            if w < weight:
                w = weight
            off = 1.0 - value if i < yes else -value
            if seen > 1:
                deviation += w * (abs(off) - deviation)
            value += w * off
        self.n, self.value, self.deviation = seen, value, deviation

    def copy(self) -> Mean:
        other = Mean(self.value, self.weight, self.prior)
        other.deviation, other.n = self.deviation, self.n
        return other


class Line:
    """y = a + b x by exponentially weighted least squares. b is never negative, and 0 where it may be chance: steps are
    long for others' prompts, too, and an edge that takes this for the cost of its drafts would stop drafting."""

    __slots__ = ("n", "slope", "x", "xx", "xy", "y", "yy")

    def __init__(self) -> None:
        self.n = self.x = self.y = self.xx = self.xy = self.yy = 0.0
        self.slope = 0.0  # b, less what may be chance

    def add(self, x: float, y: float) -> None:
        f = PAST
        self.n = n = f * self.n + 1
        self.x = sx = f * self.x + x
        self.y = sy = f * self.y + y
        self.xx = xx = f * self.xx + x * x
        self.xy = xy = f * self.xy + x * y
        self.yy = yy = f * self.yy + y * y
        self.slope = 0.0
        rising = xy - sx * sy / n
        if rising > 0.0 and n > 3.0:  # fewer points always lie near some line
            spread = xx - sx * sx / n + 1.0
            b = rising / spread
            variance = max(0.0, yy - sy * sy / n - b * rising) / ((n - 3.0) * spread)  # of b
            self.slope = max(0.0, b - SURE * variance / b)

    def copy(self) -> Line:
        other = Line()
        other.n, other.x, other.y = self.n, self.x, self.y
        other.xx, other.xy, other.yy, other.slope = self.xx, self.xy, self.yy, self.slope
        return other

    @property
    def intercept(self) -> float:
        return max(0.0, (self.y - self.slope * self.x) / self.n) if self.n >= 1 else 0.0


class RoundTimes:
    """Smoothed measurements of one session. Times in milliseconds."""

    __slots__ = (
        "_best", "_best_draft", "_best_of", "_time_ms", "_tokens",
        "acceptance", "draft", "line", "measured", "price", "queue", "second", "served", "verify", "wait",
    )  # fmt: skip

    def __init__(self) -> None:
        self.draft = Mean(0.0, STEP)  # one draft step
        # From sending a draft to its verdict, without the part that grows with the draft
        self.wait = Mean(0.0, ROUND)
        self.verify = Line()  # engine time against draft tokens
        self.queue = Mean(0.0, ROUND)
        self.line = Mean(0.0, ROUND)  # the way there and back
        self.served = Mean(0.0, ROUND)  # between tokens that the verifier decodes by itself
        self.acceptance = Mean(TYPICAL, CHANCE, PRIOR)  # of a draft token whose predecessors were accepted
        self.second = Mean(LIKELY, CHANCE, PRIOR)  # corrections that are the drafter's second choice
        self.price = 0.0  # of a draft token, as of the last verdict
        self._tokens = self._time_ms = 0.0
        self.measured = 0.0  # tokens per millisecond of these, if they are enough to go by
        # The last arguments of `best_speed`, and its result: they often stay the same.
        self._best_of: tuple[int, float, float, float] = (0, 0.0, 0.0, 0.0)
        self._best_draft = self._best = 0.0

    def successor(self) -> RoundTimes:
        """The start of this device's next session: all measurements, the last price, and a fifth of the weight of the
        measured speed."""
        times = RoundTimes.__new__(RoundTimes)
        times.draft, times.wait, times.verify = self.draft.copy(), self.wait.copy(), self.verify.copy()
        times.queue, times.line, times.served = self.queue.copy(), self.line.copy(), self.served.copy()
        times.acceptance, times.second, times.price = self.acceptance.copy(), self.second.copy(), self.price
        times._timed(INHERITED * self._tokens, INHERITED * self._time_ms)
        times._best_of, times._best_draft, times._best = self._best_of, self._best_draft, self._best
        return times

    def speed(self, longest: int) -> float:
        """Committed tokens per millisecond of drafting: the speed measured over the last few dozen rounds, or that of
        the best fixed length, if that is more. (By its own speed alone, a policy that drafts badly would justify
        itself: it makes the session slow, and a slow session has time for bad drafts.)"""
        measured, best = self.measured, self.best_speed(longest)
        return measured if measured > best else best

    def _timed(self, tokens: float, time_ms: float) -> None:
        self._tokens, self._time_ms = tokens, time_ms
        self.measured = tokens / time_ms if tokens > FEW and time_ms > 0 else 0.0

    def drafted(self, took_ms: float) -> None:
        """A draft step took so long. A much longer one read a prompt or was held up: it counts as twice the mean."""
        draft = self.draft
        most = HELD_UP * draft.value
        draft.add(most if took_ms > most and draft.n else took_ms)

    def decoded(self, tokens: int, elapsed_ms: float) -> None:
        """The verifier by itself committed `tokens` in `elapsed_ms`."""
        self.served.add(elapsed_ms / tokens)
        self._forget(tokens)

    def _forget(self, tokens: int) -> None:
        """Without drafts nothing is measured of them, so the estimates slowly return to typical values."""
        keep = UNSEEN**tokens
        self.acceptance.value = TYPICAL + (self.acceptance.value - TYPICAL) * keep
        self._timed(keep * self._tokens, keep * self._time_ms)
        self.draft.value *= SLOW**tokens

    def round(self, drafted: int, tokens: int, elapsed_ms: float) -> None:
        """A round with `drafted` tokens committed `tokens` in `elapsed_ms`."""
        if not drafted:
            self._forget(tokens)
        self._timed(PAST * self._tokens + tokens, PAST * self._time_ms + elapsed_ms)

    def verdict(self, n_draft: int, waited_ms: float | None, queue_ms: float, engine_ms: float) -> None:
        """A draft of `n_draft` tokens was answered after `waited_ms`, queue and engine included.

        waited_ms: None for a draft that waited behind another one of this session
        """
        self.verify.add(n_draft, engine_ms)
        self.queue.add(queue_ms)
        if waited_ms is not None:  # otherwise its time says nothing of the link
            self.wait.add(max(0.0, waited_ms - self.verify.slope * n_draft))
            self.line.add(max(0.0, waited_ms - queue_ms - engine_ms))

    def wait_ms(self, n_draft: int) -> float:
        """Expected time from sending so many draft tokens to their verdict."""
        return self.wait.value + self.verify.slope * n_draft

    def engine_ms(self, n_draft: int) -> float:
        """Expected time of a step with so many draft tokens."""
        return self.verify.intercept + self.verify.slope * n_draft

    @property
    def serve_ms(self) -> float:
        """Time per token if the verifier decodes by itself: as measured, or one step and its queue."""
        return self.served.value if self.served.n >= 4 else self.verify.intercept + self.queue.value

    def best_speed(self, longest: int) -> float:
        """Tokens per millisecond of the best fixed draft length at the present measurements.

        With acceptance a, k draft tokens commit (1 - a^(k+1)) / (1 - a) on average (Leviathan et al. 2023).
        0 while no round has been timed: an unknown time must not pass for no time.
        """
        wait, draft = self.wait, self.draft.value
        if not wait.n:
            return 0.0
        of = (longest, self.acceptance.value, wait.value, self.verify.slope)
        if of == self._best_of and abs(draft - self._best_draft) <= SAME * draft:
            return self._best
        _, acceptance, wait_ms, slope = self._best_of = of
        self._best_draft = draft
        acceptance = min(acceptance, 0.99)
        best, time, each = 0.0, max(wait_ms, LEAST_MS), draft + slope
        gain = power = 1.0
        for _ in range(longest + 1):
            speed = gain / time
            if speed < best:
                break  # a concave gain over a time that grows evenly has one peak
            best = speed
            time += each
            power *= acceptance
            gain += power
        self._best = best
        return best
