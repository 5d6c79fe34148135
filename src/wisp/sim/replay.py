"""Replays a trace under any drafting policy, in virtual time, with the `Drafter` that runs on an edge.

The target's text is in the trace and does not depend on drafts, so a replay is exact: all proposals, on the true path
and off it, are recorded ones, and verdicts follow from comparison. Only time is modelled: the device's draft step,
the link, and the verifier's step.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from wisp.calibrate.traces.format import Trace, as_signal
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action, Phase, Task
from wisp.core.protocol.messages import MAX_DRAFT, Draft, Open, Verdict
from wisp.core.protocol.step import Committed
from wisp.sim.devices import Device, Link, Server


@dataclass
class Tally:
    """Totals over replayed generations. Times in milliseconds."""

    tokens: int = 0  # committed
    timed_tokens: int = 0  # committed after the first message
    time_ms: float = 0.0  # between their arrivals
    verifications: int = 0
    draft_tokens: int = 0  # sent
    accepted: int = 0
    drafting_ms: float = 0.0
    wasted_ms: float = 0.0  # drafting past a first rejected token, in drafts that were sent
    ahead_wasted_ms: float = 0.0  # drafted and thrown away unsent
    rounds: list[Round] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Token speed after the first message."""
        return self.timed_tokens / self.time_ms * 1e3 if self.time_ms else 0.0

    def report(self) -> dict[str, float]:
        """Per committed token, where that makes sense."""
        n = max(self.tokens, 1)
        return {
            "tokens_per_s": round(self.tokens_per_s, 3),
            "wasted_ms_per_token": round(self.wasted_ms / n, 3),
            "ahead_wasted_ms_per_token": round(self.ahead_wasted_ms / n, 3),
            "verifications_per_token": round(self.verifications / n, 4),
            "draft_tokens_per_token": round(self.draft_tokens / n, 4),
            "verifier_tokens_per_token": round((self.draft_tokens + self.verifications) / n, 4),
            "acceptance": round(self.accepted / self.draft_tokens, 4) if self.draft_tokens else 0.0,
        }


@dataclass(frozen=True)
class Round:
    """One verdict, for plots and comparisons: its base, the tokens drafted and those accepted."""

    base: int
    drafted: int
    accepted: int
    at_ms: float


@dataclass
class Bench:
    """The setting of a replay. `price`: of a draft token, in tokens."""

    device: Device
    link: Link
    server: Server
    price: float = 0.0
    seed: int = 0


def replay(traces: list[Trace], bench: Bench, policies: Policies, ahead: Ahead | None = None) -> Tally:
    """Replay generations one after another on one device, which learns from each for the next."""
    tally = Tally()
    times = RoundTimes()
    source = random.Random(bench.seed)
    for trace in traces:
        times = _Generation(trace, bench, policies, ahead, times.successor(), tally, source).run()
    return tally


class _Generation:
    """One session in virtual time: the edge's busy engine, the link both ways, and the verifier."""

    def __init__(
        self,
        trace: Trace,
        bench: Bench,
        policies: Policies,
        ahead: Ahead | None,
        times: RoundTimes,
        tally: Tally,
        source: random.Random,
    ) -> None:
        self.trace = trace
        self.bench = bench
        self.tally = tally
        self.source = source
        ended = trace.finish == "stop"
        # A text that ended by itself was not near its limit.
        task = Task([0], trace.sampling, len(trace) + (MAX_DRAFT if ended else 0))
        policy = policies.make(trace.sampling.temperature)
        self.drafter = Drafter("replay", task, policy, _ends(trace), ahead=ahead, times=times)
        self.target = trace.target.tolist()
        self.draft = trace.draft.tolist()
        self.now = 0.0
        self.first_at = math.nan
        self.verdicts: list[tuple[float, Verdict]] = []  # on their way to the edge, in order
        self.server = _Verifier(self.target, ended, bench, source)

    def run(self) -> RoundTimes:
        drafter, tally = self.drafter, self.tally
        self._carry_out(drafter.connected(self.now, MAX_DRAFT))
        while drafter.phase is not Phase.DONE:
            due = self.server.due(self.now)
            if due is not None:
                self.verdicts.append(due)
            if self.verdicts and self.verdicts[0][0] <= self.now:
                self._hear(*self.verdicts.pop(0))
            elif drafter.wants_token(self.now):
                self._propose()
            elif self.verdicts:
                self.now = self.verdicts[0][0]
            else:
                raise AssertionError("nothing will ever happen")
        tally.tokens += len(drafter.committed)
        tally.ahead_wasted_ms += drafter.chain.wasted * self._draft_ms()
        return drafter.times

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Open | Draft):
                arrival = self.now + self.bench.link.one_way_ms(self.source)
                if isinstance(action, Draft):
                    self.tally.verifications += 1
                    self.tally.draft_tokens += len(action.tokens)
                self.server.receive(arrival, action)

    def _hear(self, arrived: float, verdict: Verdict) -> None:
        tally, base = self.tally, len(self.drafter.committed)
        actions = self.drafter.verdict(self.now, verdict, arrived)
        for action in actions:
            if isinstance(action, Committed):
                tally.accepted += action.accepted
                tally.wasted_ms += max(0, action.drafted - action.accepted - 1) * self._draft_ms()
                tally.rounds.append(Round(base, action.drafted, action.accepted, self.now))
                if math.isnan(self.first_at):
                    self.first_at = self.now
                else:
                    tally.timed_tokens += len(action.tokens)
                if action.finish:
                    tally.time_ms += self.now - self.first_at
        self._carry_out(actions)

    def _draft_ms(self) -> float:
        return self.bench.device.draft_ms(self.tally.drafting_ms / 1e3)

    def _propose(self) -> None:
        took = self._draft_ms()
        self.tally.drafting_ms += took
        token, signal = self._recorded()
        self.now += took
        self._carry_out(self.drafter.proposed(self.now, token, signal, took))

    def _recorded(self) -> tuple[int | None, Signal]:
        """The drafter's next proposal: on the true path, or as far off it as was recorded."""
        base, chain, trace = len(self.drafter.committed), self.drafter.chain.tokens, self.trace
        for i, token in enumerate(chain):
            if token != self.target[base + i]:
                off, depth = trace.off[base + i], len(chain) - i - 1
                if depth >= len(off.tokens):
                    return None, Signal()
                return int(off.tokens[depth]), as_signal(trace.columns, off.signals[depth])
        position = base + len(chain)
        if position >= len(self.target):
            return None, Signal()
        return self.draft[position], trace.signal(position)


def _ends(trace: Trace) -> frozenset[int]:
    """The end-of-sequence ids of a trace: where texts and off-path continuations stop."""
    depth = max((len(off.tokens) for off in trace.off.values()), default=0)
    ends = {int(trace.target[-1])} if trace.finish == "stop" else set()
    for position, off in trace.off.items():
        if not len(off.tokens):
            ends.add(int(trace.draft[position]))
        elif len(off.tokens) < depth:
            ends.add(int(off.tokens[-1]))
    return frozenset(ends)


class _Verifier:
    """The other side: one session on a verifier with a known step time, in server mode too."""

    def __init__(self, target: list[int], ended: bool, bench: Bench, source: random.Random) -> None:
        self.target = target
        self.ended = ended
        self.bench = bench
        self.source = source
        self.committed = 0
        self.round = 0
        self.serving = False
        self.waiting: tuple[float, Open | Draft] | None = None
        self.free_at = 0.0
        self.arrived = 0.0

    def receive(self, at: float, message: Open | Draft) -> None:
        self.waiting = (at, message)

    def due(self, now: float) -> tuple[float, Verdict] | None:
        """The next verdict and its time of arrival at the edge, if a step can be known to have begun by `now`."""
        if self.committed >= len(self.target):
            return None
        if self.waiting is not None and (not self.serving or self.waiting[0] <= self.free_at):
            at, message = self.waiting
            self.waiting = None
            return self._verify(max(at, self.free_at), message)
        if self.serving and self.free_at <= now:
            return self._step(self.free_at, Draft("replay", self.round, self.committed, []), 0.0)
        return None

    def _verify(self, start: float, message: Open | Draft) -> tuple[float, Verdict]:
        server = self.bench.server
        queue = server.queue_ms * self.source.expovariate(1.0) if server.queue_ms else 0.0
        self.serving = message.serve
        self.round = message.round
        if isinstance(message, Open):
            draft = Draft(message.session, message.round, len(message.committed), message.draft)
            return self._step(start + server.prefill_ms, draft, queue)
        return self._step(start, message, queue)

    def _step(self, start: float, draft: Draft, queue_ms: float) -> tuple[float, Verdict]:
        known = self.committed - draft.base
        agreed = 0
        while agreed < len(draft.tokens) and draft.base + agreed < len(self.target):
            if draft.tokens[agreed] != self.target[draft.base + agreed]:
                break
            agreed += 1
        new = len(draft.tokens) - known
        engine_ms = 0.0
        if agreed >= known and (new > 0 or known == 0):  # otherwise it is stale, and answered at once
            engine_ms = self.bench.server.verify_ms(max(new, 0))
            self.committed = min(draft.base + agreed + 1, len(self.target))
        self.free_at = start + queue_ms + engine_ms
        tokens = self.target[draft.base : self.committed]
        finish = ""
        if self.committed == len(self.target):
            finish = "stop" if self.ended else "length"
        accepted = min(agreed, len(tokens))
        verdict = Verdict(
            "replay",
            self.round,
            draft.base,
            accepted,
            tokens,
            finish,
            [],
            queue_ms,
            engine_ms,
            self.bench.price,
        )
        return self.free_at + self.bench.link.one_way_ms(self.source), verdict
