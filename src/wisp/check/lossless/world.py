"""Virtual time, trouble and a verifier's host, so that a whole fleet runs in one process and always the same way.

`Cloud` does for `core.verify.verifier.Verifier` what `wisp.server.host` does, with a heap in place of threads and sockets.
The step's arithmetic is real; only its duration is made up.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable

import msgspec

from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.errors import EngineError
from wisp.core.verify.events import Action, EdgeLost, FromEdge, InEvent, Limits, Run, Send, StepDone, Tick, WakeAt
from wisp.core.protocol.messages import Cancel, Draft, Open, Verdict, decode_from_edge, encode
from wisp.core.verify.session import IN_ENGINE
from wisp.core.verify.verifier import Verifier
from wisp.core.protocol.step import Copy
from wisp.engines.base import TargetEngine

PARK_S = 4.0
MAX_DRAFT = 32


class Chaos(msgspec.Struct, frozen=True):
    """How much goes wrong. Probabilities: the first five per engine step, the others per occasion."""

    lose: float = 0.0  # a connection breaks
    restart: float = 0.0  # the verifier is replaced by a fresh one
    fail: float = 0.0  # a step fails as a whole
    slow: float = 0.0  # a step takes seconds
    cancel: float = 0.0  # a user goes away, and asks again
    silence: float = 0.0  # an edge is silent for seconds, per drafted token
    move: float = 0.0  # a device that comes back does so at the other verifier
    meddle: float = 0.0  # an extra frame: duplicate, early, overlapping, stale or invalid
    ride: float = 0.5  # a first draft rides along with Open
    overlong: float = 0.0  # a draft goes on beyond max_tokens or the end of sequence


CALM = Chaos(ride=1.0)


class Clock:
    """Virtual seconds. What is due at one time runs in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Call `what` at time `when`."""
        self._count += 1
        heapq.heappush(self._due, (max(when, self.now), self._count, what))

    def after(self, delay: float, what: Callable[[], None]) -> None:
        """Call `what` in `delay` seconds."""
        self.at(self.now + delay, what)

    def step(self) -> bool:
        """Do the next thing. False if there is none."""
        if not self._due:
            return False
        self.now, _, what = heapq.heappop(self._due)
        what()
        return True


class Cloud:
    """A verifier at a time, on half of the engine's slots: the `side` says which, so that two can share it.

    `sent` is called with (connection, frame), `stepped` after each step.
    """

    def __init__(
        self,
        clock: Clock,
        engine: TargetEngine,
        side: int,
        eos: frozenset[int],
        batching: str,
        chaos: Chaos,
        rng: random.Random,
        counts: Counter[str],
        sent: Callable[[int, bytes], None],
        stepped: Callable[[], None],
    ) -> None:
        self.clock, self.engine, self.batching = clock, engine, batching
        self.slots = engine.info.slots // 2
        self._eos = eos
        self._first_slot = side * self.slots
        self.chaos, self.rng, self.counts = chaos, rng, counts
        self.sent, self.stepped = sent, stepped
        self.errors: list[str] = []
        self._life = 0  # which verifier: events meant for a former one are void
        self._tick_due = False
        self._timer = 0
        self._seen: set[tuple[str, int]] = set()
        self.verifier = self._fresh()

    def restart(self) -> None:
        """Another verifier, that knows nothing, on an engine that holds nothing."""
        self._life += 1
        self._tick_due = False
        self.verifier = self._fresh()
        self.counts["restarts"] += 1

    def receive(self, connection: int, key: str, frame: bytes) -> None:
        """A frame came over `connection`."""
        message = decode_from_edge(frame)
        assert isinstance(message, Open | Draft | Cancel)
        if isinstance(message, Open):
            self._count_ahead(message)
        again = isinstance(message, Draft) and (message.session, message.round) in self._seen
        if isinstance(message, Open | Draft):
            self._seen.add((message.session, message.round))
        for action in self._feed(FromEdge(connection, key, message)):
            if isinstance(action, Send) and isinstance(action.message, Verdict):  # answered without a step
                self.counts["duplicates_answered" if again else "stale_verdicts"] += 1

    def lost(self, connection: int) -> None:
        """`connection` is known to be gone."""
        self._feed(EdgeLost(connection))

    def _fresh(self) -> Verifier:
        """A verifier, some with little room and short steps, so that KV is short and prompts come in chunks."""
        info, tight = self.engine.info, self.rng.random() < 0.5
        limits = Limits(
            n_vocab=info.n_vocab,
            eos=self._eos,
            slots=self.slots,
            slot_tokens=info.slot_tokens,
            kv_tokens=max(info.slot_tokens, info.kv_tokens // 6) if tight else info.kv_tokens // 2,
            step_tokens=self.rng.choice((12, 24)) if tight else info.step_tokens,
            max_draft=MAX_DRAFT,
            park_s=PARK_S,
        )
        return Verifier(limits, batching_policy(self.batching), Admission(1 << 20))

    def _feed(self, event: InEvent) -> list[Action]:
        slots = {h: s.slot for h, s in self.verifier.sessions.items()}
        absent = set(self.verifier.index.drafting)
        actions = self.verifier.handle(self.clock.now, event)
        self._count_kv(slots)
        for action in actions:
            if isinstance(action, Send):
                self.sent(action.connection, encode(action.message))
            elif isinstance(action, Run):
                self.counts["decoded_for_absent_edges"] += sum(s.session in absent for s in action.slices)
                self._run(action)
            elif isinstance(action, WakeAt):
                self._wake(action.at)
        if not isinstance(event, Tick) and not self._tick_due and not self.verifier.running:
            self._tick_due = True
            self.clock.after(self.rng.choice((0.0, 0.0, 0.002)), self._if_alive(self._tick))
        return actions

    def _count_ahead(self, open_: Open) -> None:
        """Does the edge know more than this verifier, having been served by the other one meanwhile?"""
        for s in self.verifier.sessions.values():
            if s.id == open_.session and s.n_committed < len(open_.committed):
                self.counts["edges_ahead"] += 1
                self.counts["edges_ahead_in_step"] += s.state in IN_ENGINE

    def _count_kv(self, slots: dict[int, int | None]) -> None:
        for handle, s in self.verifier.sessions.items():
            had = slots.get(handle)
            self.counts["evictions"] += had is not None and s.slot is None
            self.counts["prefixes_reused"] += had is None and s.slot is not None and s.cached > 0
        self.counts["most_queued"] = max(self.counts["most_queued"], self.verifier.n_waiting)

    def _tick(self) -> None:
        self._tick_due = False
        self._feed(Tick())

    def _wake(self, at: float) -> None:
        self._timer += 1
        mine = self._timer
        self.clock.at(at, self._if_alive(lambda: self._tick() if self._timer == mine else None))

    def _if_alive(self, what: Callable[[], None]) -> Callable[[], None]:
        life = self._life
        return lambda: what() if self._life == life else None

    def _run(self, step: Run) -> None:
        done = self._compute(step)
        self.counts["steps"] += 1
        self.counts["slices"] += len(step.slices)
        self.counts["copies"] += len(step.copies)
        self.counts["mixed_steps"] += len(step.slices) > 1
        slow = self.rng.random() < self.chaos.slow
        duration = self.rng.uniform(0.5, 2.0) if slow else self.rng.uniform(0.004, 0.03)
        self.clock.after(duration, self._if_alive(lambda: self._done(done)))

    def _compute(self, step: Run) -> StepDone:
        try:
            first = self._first_slot
            for c in step.copies:
                self.engine.copy(Copy(c.source + first, c.target + first, c.tokens))
            slices = [msgspec.structs.replace(s, slot=s.slot + first) for s in step.slices]
            results = self.engine.run(slices)
        except EngineError as error:
            self.errors.append(str(error))
            return StepDone([], 1.0, error=str(error))
        self.errors += [r.error for r in results if r.error]
        if self.rng.random() < self.chaos.fail:
            self.counts["failed_steps"] += 1
            return StepDone([], 1.0, error="a failure made for testing")
        return StepDone(results, 1.0)

    def _done(self, done: StepDone) -> None:
        self._feed(done)
        self.stepped()
