"""A verifier in virtual time, and trouble for it: a whole fleet runs in one process, and a seed decides everything.

`core.verify.loop` drives the verifier, as in the live server. A step's arithmetic is real, its duration is random.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from wisp.core.errors import EngineError, StepLostError
from wisp.core.protocol.messages import (
    MAX_DRAFT,
    Cancel,
    Draft,
    Open,
    Refused,
    Verdict,
    decode_edge_message,
    encode,
)
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Action, EdgeLost, Ended, InEvent, Limits, Received, Run, Send, StepDone
from wisp.core.verify.loop import VerifierLoop
from wisp.core.verify.states import IN_ENGINE
from wisp.core.verify.verifier import Verifier
from wisp.engines.base import TargetEngine
from wisp.engines.in_order import OneAtATime
from wisp.sim.timeline import Timeline

PARK_S = 4.0
HOST_MS = 5.0  # of each step: so early are steps planned while others run
FAILURE = "a failure made for testing"


class Chaos(msgspec.Struct, frozen=True):
    """Probabilities of trouble: the first five per engine step, the others per occasion."""

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


class ChaosServer:
    """A verifier at a time, on half of the engine's slots: the `side` says which, so that two can share it.

    `sent` is called with (connection, frame), `stepped` after each step. `depth`: steps in flight; None: 1 or 2, by
    chance.
    """

    def __init__(
        self,
        clock: Timeline,
        engine: TargetEngine,
        side: int,
        eos: frozenset[int],
        batching: str,
        chaos: Chaos,
        rng: random.Random,
        counts: Counter[str],
        sent: Callable[[int, bytes], None],
        stepped: Callable[[], None],
        depth: int | None = None,
    ) -> None:
        self.clock, self.engine, self.batching = clock, engine, batching
        self.slots = engine.info.slots // 2
        self._eos = eos
        self._first_slot = side * self.slots
        self._depth = depth
        self.chaos, self.rng, self.counts = chaos, rng, counts
        self.sent, self.stepped = sent, stepped
        self.errors: list[str] = []
        self._seen: set[tuple[str, int]] = set()
        self._loop = self._fresh()

    @property
    def verifier(self) -> Verifier:
        return self._loop.verifier

    def restart(self) -> None:
        """Replace the verifier by a fresh one, on an empty engine."""
        self._loop = self._fresh()
        self.counts["restarts"] += 1

    def receive(self, connection: int, key: str, frame: bytes) -> None:
        message = decode_edge_message(frame)
        assert isinstance(message, Open | Draft | Cancel)
        if isinstance(message, Open):
            self._count_ahead(message)
        again = isinstance(message, Draft) and (message.session, message.round) in self._seen
        if isinstance(message, Open | Draft):
            self._seen.add((message.session, message.round))
        for action in self._loop.feed(Received(connection, key, message)):
            if isinstance(action, Send) and isinstance(action.message, Verdict):  # answered without a step
                self.counts["duplicates_answered" if again else "stale_verdicts"] += 1

    def lost(self, connection: int) -> None:
        self._loop.feed(EdgeLost(connection))

    def _fresh(self) -> _CountingLoop:
        """A verifier, some with little KV and short steps, so that KV is short and prompts come in chunks."""
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
            depth=self._depth or self.rng.choice((1, 2)),
            history_tokens=self.rng.choice((0, 300, 1 << 14)),
        )
        self._queue = OneAtATime(_Half(self.engine, self._first_slot, self._fails), limits.depth)
        self._free_at = 0.0
        verifier = Verifier(limits, batching_policy(self.batching), Admission(1 << 20))
        return _CountingLoop(verifier, self, self.counts)

    def _count_ahead(self, open_: Open) -> None:
        """Does the edge know more than this verifier, having been served by the other one meanwhile?"""
        for s in self.verifier.sessions.values():
            if s.id == open_.session and s.n_committed < len(open_.committed):
                self.counts["edges_ahead"] += 1
                self.counts["edges_ahead_in_step"] += s.state in IN_ENGINE

    # --- the surroundings of the present verifier

    @property
    def now(self) -> float:
        return self.clock.now

    def soon(self, do: Callable[[], None]) -> None:
        """Sometimes a little later, so that frames overtake it."""
        self.clock.after(self.rng.choice((0.0, 0.0, 0.002)), self._unless_replaced(do))

    def at(self, time: float, do: Callable[[], None]) -> Callable[[], None]:
        return self.clock.at(time, self._unless_replaced(do))

    def send(self, connection: int, message: Verdict | Refused) -> None:
        self.sent(connection, encode(message))

    def ended(self, ended: Ended) -> None:
        """Counted by the devices themselves."""

    def run(self, step: Run) -> None:
        result = self._compute(step)
        self.counts["steps"] += 1
        self.counts["slices"] += len(step.slices)
        self.counts["copies"] += len(step.copies)
        self.counts["mixed_steps"] += len(step.slices) > 1
        slow = self.rng.random() < self.chaos.slow
        duration = self.rng.uniform(0.5, 2.0) if slow else self.rng.uniform(0.004, 0.03)
        self.counts["steps_ahead"] += self.verifier.in_flight.steps[0].number != step.step
        self.counts["decoded_ahead"] += sum(s.after >= 0 for s in step.slices)
        self._free_at = max(self._free_at, self.clock.now) + duration
        self.clock.at(self._free_at, self._unless_replaced(lambda: self._step_done(result)))

    def _fails(self) -> bool:
        fails = self.rng.random() < self.chaos.fail
        self.counts["failed_steps"] += fails
        return fails

    def _step_done(self, done: StepDone) -> None:
        self._loop.feed(done)
        self.stepped()

    def _unless_replaced(self, do: Callable[[], None]) -> Callable[[], None]:
        """`do`, which is void once another verifier has taken the present one's place."""
        loop = self._loop
        return lambda: do() if loop is self._loop else None

    def _compute(self, step: Run) -> StepDone:
        self._queue.submit(step)
        try:
            done = self._queue.collect()
        except EngineError as error:
            if str(error) != FAILURE and not isinstance(error, StepLostError):
                self.errors.append(str(error))
            return StepDone([], 1.0, error=str(error), step=step.step)
        self.errors += [r.error for r in done.results if r.error]
        return StepDone(done.results, 1.0, step=step.step, host_ms=HOST_MS)


class _Half:
    """Half of the engine's slots, as those of an engine whose steps sometimes fail."""

    def __init__(self, engine: TargetEngine, first_slot: int, fails: Callable[[], bool]) -> None:
        self._engine = engine
        self._first = first_slot
        self._fails = fails

    def copy(self, copy: Copy) -> None:
        self._engine.copy(Copy(copy.source + self._first, copy.target + self._first, copy.tokens))

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        results = self._engine.run([msgspec.structs.replace(s, slot=s.slot + self._first) for s in batch])
        if self._fails():
            raise EngineError(FAILURE)
        return results


class _CountingLoop(VerifierLoop):
    """Counts the situations that a check must provoke."""

    def __init__(self, verifier: Verifier, server: ChaosServer, counts: Counter[str]) -> None:
        super().__init__(verifier, server)
        self._counts = counts

    def _handle(self, event: InEvent) -> list[Action]:
        own = self.verifier.own_drafts
        proposed, accepted = own.proposed, own.accepted
        slots = {h: s.slot for h, s in self.verifier.sessions.items()}
        drafting = set(self.verifier.index.drafting)
        actions = super()._handle(event)
        self._counts["own_draft_tokens"] += own.proposed - proposed
        self._counts["own_draft_tokens_accepted"] += own.accepted - accepted
        for handle, s in self.verifier.sessions.items():
            had = slots.get(handle)
            self._counts["evictions"] += had is not None and s.slot is None
            self._counts["prefixes_reused"] += had is None and s.slot is not None and s.cached > 0
        self._counts["most_queued"] = max(self._counts["most_queued"], self.verifier.n_waiting)
        for action in actions:
            if isinstance(action, Run):
                self._counts["decoded_for_absent_edges"] += sum(s.session in drafting for s in action.slices)
        return actions
