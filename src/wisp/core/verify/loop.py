"""The loop around a `Verifier`, without I/O: events go in, actions are carried out, a Tick follows.

    feed(event)  ->  verifier.handle  ->  send(...), run(step), wake at a time
                     then, after all events at hand, a Tick if another step may be planned

The live server, the simulator and the lossless check drive their verifiers with this one loop. They differ in their
`Surroundings`: the clock, the engine and the connections, real or simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from wisp.core.protocol.messages import Refused, Verdict
from wisp.core.verify.events import Action, Ended, InEvent, Run, Send, StepDone, Tick, WakeAt
from wisp.core.verify.verifier import Verifier


class Surroundings(Protocol):
    """Clock, engine and connections. `now` is in seconds and never goes back."""

    @property
    def now(self) -> float: ...

    def soon(self, do: Callable[[], None]) -> None:
        """Call `do` once the events at hand have been fed."""

    def at(self, time: float, do: Callable[[], None]) -> Callable[[], None]:
        """Call `do` at `time`. Returns a function that cancels this."""

    def run(self, step: Run) -> None:
        """Start a step. Its StepDone is fed later."""

    def send(self, connection: int, message: Verdict | Refused) -> None: ...

    def ended(self, ended: Ended) -> None:
        """A session has ended without a message to its edge."""


class VerifierLoop:
    """Drives one verifier."""

    def __init__(
        self,
        verifier: Verifier,
        surroundings: Surroundings,
        record: Callable[[float, InEvent], None] | None = None,
        watch: Callable[[float, InEvent, list[Action]], None] | None = None,
    ) -> None:
        """`record` is called with every event before it is handled (an event log), `watch` after, with its actions."""
        self.verifier = verifier
        self._world = surroundings
        self._record = record
        self._watch = watch
        self._tick_due = False
        self._cancel_wake: Callable[[], None] | None = None

    def feed(self, event: InEvent) -> list[Action]:
        """Handle an event and carry out its actions, which are also returned."""
        actions = self._handle(event)
        if isinstance(event, StepDone):
            # Start the next step before sending verdicts: an idle engine costs more than a later frame.
            then = self._handle(Tick())
            runs = [action for action in then if isinstance(action, Run)]
            actions = [*runs, *actions, *(action for action in then if not isinstance(action, Run))]
        for action in actions:
            if isinstance(action, Send):
                self._world.send(action.connection, action.message)
            elif isinstance(action, Run):
                self.stop()  # the next wake-up time follows, or comes with the end of the step
                self._world.run(action)
            elif isinstance(action, WakeAt):
                self._wake_at(action.at)
            else:
                self._world.ended(action)
        if not (isinstance(event, Tick | StepDone) or self._tick_due or self.verifier.running):
            self._tick_due = True
            self._world.soon(self._tick)
        return actions

    def stop(self) -> None:
        if self._cancel_wake is not None:
            self._cancel_wake()
            self._cancel_wake = None

    def _handle(self, event: InEvent) -> list[Action]:
        now = self._world.now
        if self._record is not None:
            self._record(now, event)
        actions = self.verifier.handle(now, event)
        if self._watch is not None:
            self._watch(now, event, actions)
        return actions

    def _tick(self) -> None:
        self._tick_due = False
        self.feed(Tick())

    def _wake_at(self, at: float) -> None:
        self.stop()
        self._cancel_wake = self._world.at(at, self._woken)

    def _woken(self) -> None:
        if not self._tick_due:
            self.feed(Tick())
