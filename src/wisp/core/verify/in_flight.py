"""Steps in flight: those that the engine has and that have not come back. They run in order.

With a depth of 1 the engine gets one step at a time. It stands still while the host takes in the results of one step
and prepares the next. With a depth of 2 the next step is in the engine's queue by then:

    late submission    it is planned when the running step has about one host time left, from all drafts that have
                       arrived meanwhile
    optimistic decode  a session that decodes without a draft commits exactly one token. Its next slice names the step
                       that chooses this token (`Slice.after`), and is planned before the host knows it

Optimistic decode is not for constrained sessions: what may follow depends on the token. If a session ends at a token
whose follower is in flight, the follower is dropped when it comes back. Until then its slot stays with the session.
After a failure nothing in flight is of use. The epoch tells the engine which steps were planned before the failure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping

from wisp.core.protocol.step import Slice
from wisp.core.verify.cost import CostModel, Load
from wisp.core.verify.events import Run, StepDone
from wisp.core.verify.session import Session
from wisp.core.verify.states import RUNNING

EARLY = 1.25  # host times before the end of the running step at which the next one is planned
HOST_RATE = 0.2  # smoothing of the host time, per step


class Step:
    """A step in flight: its slices by session, its load, and when it was planned (seconds)."""

    __slots__ = ("load", "number", "planned", "slices")

    def __init__(self, number: int, slices: dict[int, Slice], load: Load, planned: float) -> None:
        self.number = number
        self.slices = slices
        self.load = load
        self.planned = planned


class InFlight:
    """The steps in flight, oldest first, of at most `depth`. `wants_drafting`: see `BatchingPolicy`."""

    def __init__(self, depth: int, *, wants_drafting: bool) -> None:
        self.depth = depth
        self.wants_drafting = wants_drafting
        self.epoch = 0  # failed steps so far
        self.steps: deque[Step] = deque()
        self.number = 0  # of the next step
        self.waiting = False  # the next step is planned at a time that is known, or when one is back
        self._ended = 0.0  # when the last one was back
        self._host_s = 0.0  # smoothed

    @property
    def full(self) -> bool:
        return len(self.steps) >= self.depth

    @property
    def rows(self) -> int:
        """Tokens that they feed."""
        return sum(step.load.new for step in self.steps)

    def add(self, now: float, run: Run, load: Load, cost: CostModel) -> float | None:
        """A step was planned. Returns when to plan the next one; None if no more fit."""
        self.steps.append(Step(run.step, {s.session: s for s in run.slices}, load, now))
        self.number += 1
        self.waiting = not self.full
        return self._due(cost) if self.waiting else None

    def back(self, now: float, done: StepDone) -> tuple[Step, float] | None:
        """The oldest step is back: which it was, and when the engine could begin with it.

        None if it was lost already with a step before it.
        """
        if not self.steps or done.step not in (-1, self.steps[0].number):
            return None
        step = self.steps.popleft()
        host_s = done.host_ms / 1e3
        begun = max(step.planned + host_s, self._ended)
        self._ended, self.waiting = now, False
        if host_s:
            self._host_s += HOST_RATE * (host_s - self._host_s) if self._host_s else host_s
        return step, begun

    def lost(self) -> list[Step]:
        """A step has failed: all steps in flight after it, which are lost with it."""
        lost = list(self.steps)
        self.steps.clear()
        self.epoch += 1
        return lost

    # --- when to plan the next step

    def plan_at(self, now: float, sessions: Mapping[int, Session], ready: int, cost: CostModel) -> float:
        """When to plan the next step: now, later, or (inf) when one is back. `ready`: sessions that could run in it."""
        if not self.steps:
            return now
        at = self._due(cost)
        if at <= now and not self._pays(sessions, ready, cost):
            at = math.inf
        self.waiting = at > now
        return at

    def _due(self, cost: CostModel) -> float:
        """Shortly before the engine has nothing to do."""
        first = self.steps[0]
        begun = max(first.planned + self._host_s, self._ended)
        ms = sum(cost.ms(step.load) for step in self.steps)
        return begun + ms / 1e3 - self._lead_s(ms / 1e3, cost)

    def _pays(self, sessions: Mapping[int, Session], ready: int, cost: CostModel) -> bool:
        """Is it better to plan now than when the running step is back?

        Planned now, the step saves a host time for the sessions in it: `ready` ones, and those that follow. But
        sessions that could go on only with the results of the running step wait for a whole step more.
        """
        following = sum(1 for _ in self.following(sessions))
        staying = sum(1 for s in self._newest(sessions) if not self._follows(s) and self._could_go_on(s))
        newest_s = cost.ms(self.steps[-1].load) / 1e3
        return self._host_s * (ready + following) >= (newest_s - self._host_s) * staying

    def loss(self, load: Load, cost: CostModel) -> float:
        """Tokens lost where a session of a step like `load` is not decoded ahead (`_pays`). It misses the next step, so
        one token. Or that step waits for the results, and each of its sessions loses a host time."""
        if self.depth == 1 or not load.slices:
            return 0.0
        return min(1.0, self._host_s * 1e3 * load.slices / cost.ms(load))

    def following(self, sessions: Mapping[int, Session]) -> Iterator[Session]:
        """Sessions in flight that can take part in the next step, too."""
        return (s for s in self._newest(sessions) if self._follows(s))

    def _follows(self, s: Session) -> bool:
        """Is it known, before its slice in flight is back, what the session may run next?"""
        last = s.flight.last
        if (
            last is None
            or s.state is not RUNNING
            or s.flight.void
            or last.n_draft
            or s.flight.waits
            or s.round.inbox
        ):
            return False
        if not last.sample:
            return True  # the next chunk of its prompt
        constraints = s.params.sampling.constraints
        free = constraints is None or not constraints.choosing
        return free and (s.round.serve or self.wants_drafting) and s.remaining > s.flight.tokens

    def _could_go_on(self, s: Session) -> bool:
        """Could the session run as soon as its slice is back?"""
        last, current = s.flight.last, s.round
        if last is None or s.state is not RUNNING:
            return False
        ends = last.sample and not last.n_draft and s.remaining <= s.flight.tokens
        goes_on = current.serve or self.wants_drafting or bool(current.inbox) or not last.sample
        return goes_on and not ends

    def _newest(self, sessions: Mapping[int, Session]) -> Iterator[Session]:
        """All sessions in flight, once each."""
        for step in self.steps:
            for handle in step.slices:
                s = sessions[handle]
                if s.flight.step == step.number:
                    yield s

    def _lead_s(self, left_s: float, cost: CostModel) -> float:
        """So long before the predicted end, for the host's work and for errors of the prediction."""
        return EARLY * self._host_s + min(cost.error, 0.25) * left_s if self._host_s else 0.0
