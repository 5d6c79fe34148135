"""The loop around a verifier, in a world of virtual time: when it ticks, runs, wakes up, and in which order."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from functools import partial

import pytest

from rig import SAMPLING
from toy import EOS, N_VOCAB, ToyEngine, toy_text
from wisp.core.protocol.messages import Draft, Open, Refused, Verdict
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import EdgeLost, Ended, InEvent, Limits, Received, Run, Send, StepDone, Tick
from wisp.core.verify.loop import VerifierLoop
from wisp.core.verify.verifier import Verifier

PROMPT = [1, 2, 3]
STEP_S = 0.01
LIMITS = Limits(N_VOCAB, frozenset({EOS}), 1, 64, 64, 16, max_draft=8, park_s=60.0, idle_s=1.0)


def verifier() -> Verifier:
    return Verifier(LIMITS, batching_policy("continuous"), Admission(100))


class World:
    """One KV slot, and steps of STEP_S. `did` lists what the loop had done, in order; `timers` those that are set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.did: list[str] = []
        self.told: list[Verdict | Refused] = []
        self.events: list[tuple[float, InEvent]] = []
        self.carried_out: list[Run | Send | Ended] = []
        self.engine = ToyEngine(1)
        self.timers: set[float] = set()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.loop = VerifierLoop(verifier(), self, lambda now, event: self.events.append((now, event)))

    def feed(self, event: InEvent) -> None:
        self.loop.feed(event)

    def receive(self, message: Open | Draft, connection: int = 1) -> None:
        self.feed(Received(connection, "", message))

    def soon(self, do: Callable[[], None]) -> None:
        self.did.append("soon")
        self._push(self.now, do)

    def at(self, time: float, do: Callable[[], None]) -> Callable[[], None]:
        self.timers.add(time)
        self._push(time, lambda: self._due(time, do))
        return lambda: self.timers.discard(time)

    def run(self, step: Run) -> None:
        self.did.append("run")
        self.carried_out.append(step)
        self._push(self.now + STEP_S, partial(self._done, step))

    def send(self, connection: int, message: Verdict | Refused) -> None:
        self.did.append("send")
        self.carried_out.append(Send(connection, message))
        self.told.append(message)

    def ended(self, ended: Ended) -> None:
        self.did.append(f"{ended.session} {ended.why}")
        self.carried_out.append(ended)

    def go_on(self, until: float = 1000.0) -> None:
        """Let time pass until then, or until nothing is to come."""
        while self._later and self._later[0][0] <= until:
            self.now, _, do = heapq.heappop(self._later)
            do()

    def _push(self, time: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time, next(self._order), do))

    def _due(self, time: float, do: Callable[[], None]) -> None:
        if time in self.timers:
            self.timers.remove(time)
            do()

    def _done(self, step: Run) -> None:
        for copy in step.copies:
            self.engine.copy(copy)
        self.feed(StepDone(self.engine.run(step.slices), STEP_S * 1e3))


@pytest.fixture
def world() -> World:
    return World()


def opening(session: str, *, serve: bool = False, max_tokens: int = 3) -> Open:
    return Open(session, 0, PROMPT, SAMPLING, max_tokens, serve=serve)


def test_all_messages_at_hand_are_read_before_a_step_starts(world: World) -> None:
    world.receive(opening("session-a"), 1)
    world.receive(opening("session-b"), 2)
    assert world.did == ["soon"]
    world.go_on(STEP_S / 2)
    assert world.did == ["soon", "run"]
    assert sum(isinstance(event, Tick) for _, event in world.events) == 1


def test_the_next_step_starts_before_the_verdicts_of_the_last_one_are_sent(world: World) -> None:
    world.receive(opening("session-a", serve=True))
    world.go_on(2.5 * STEP_S)
    assert world.did == ["soon", "run", "run", "send", "run", "send"]
    world.go_on()
    assert world.did[6:] == ["send"]
    tokens = [t for v in world.told if isinstance(v, Verdict) for t in v.tokens]
    assert tokens == toy_text(PROMPT, SAMPLING, 3)


def test_a_message_during_a_step_waits_for_its_end(world: World) -> None:
    world.receive(opening("session-a", serve=True, max_tokens=2))
    world.go_on(STEP_S / 2)
    world.receive(opening("session-b"), 2)
    assert world.did == ["soon", "run"]


def test_a_session_without_a_slot_is_woken_when_another_has_been_silent_for_long_enough(world: World) -> None:
    world.receive(opening("session-a"), 1)
    world.go_on()
    world.receive(opening("session-b", serve=True), 2)
    world.go_on(world.now)
    (wake,) = world.timers
    world.go_on()
    assert not world.timers
    assert world.told[-1].session == "session-b"
    assert world.now == pytest.approx(wake + 3 * STEP_S)


def test_a_step_takes_the_place_of_the_timer(world: World) -> None:
    world.receive(opening("session-a"), 1)
    world.go_on()
    world.receive(opening("session-b", serve=True), 2)
    world.go_on(world.now)
    assert len(world.timers) == 1
    world.receive(Draft("session-a", 1, 1, []), 1)
    world.go_on(world.now)
    assert world.did[-1] == "run"
    assert not world.timers


def test_a_timer_that_goes_off_together_with_a_message_asks_once(world: World) -> None:
    world.receive(opening("session-a"), 1)
    world.go_on()
    world.receive(opening("session-b", serve=True), 2)
    world.go_on(world.now)
    (world.now,) = world.timers
    before = len(world.events)
    world.receive(Draft("session-a", 1, 1, []), 1)
    world.go_on(world.now)
    assert [type(event) for _, event in world.events[before:]] == [Received, Tick]


def test_a_lost_edge_is_waited_for_and_then_its_session_ends(world: World) -> None:
    world.receive(opening("session-a"))
    world.go_on()
    world.feed(EdgeLost(1))
    lost = world.now
    world.go_on()
    assert world.did[-1] == "session-a expired"
    assert world.now == lost + LIMITS.park_s
    assert not world.loop.verifier.sessions


def test_a_stopped_loop_is_not_woken(world: World) -> None:
    world.receive(opening("session-a"))
    world.go_on()
    world.feed(EdgeLost(1))
    world.go_on(world.now)
    world.loop.stop()
    world.loop.stop()
    assert not world.timers
    world.go_on()
    assert world.loop.verifier.sessions


def test_a_recording_replays_to_the_same_actions(world: World) -> None:
    world.receive(opening("session-a"), 1)
    world.receive(opening("session-b", serve=True), 2)
    world.go_on()
    world.feed(EdgeLost(1))
    world.go_on()
    again = verifier()
    replayed = [action for now, event in world.events for action in again.handle(now, event)]
    for kind in (Run, Send, Ended):
        assert [a for a in replayed if isinstance(a, kind)] == [
            a for a in world.carried_out if isinstance(a, kind)
        ]
    assert len(world.carried_out) == 9  # four steps, their verdicts, and the end of a
