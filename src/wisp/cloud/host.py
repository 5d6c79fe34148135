"""The verifier's host: gives `core.verifier.Verifier` a clock, an engine thread and connections.

Everything here runs on the event loop. Events go in, actions are carried out, and whenever the engine is idle
and something has changed a Tick follows once all messages at hand have been taken in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from wisp import __version__
from wisp.cloud.engine_thread import EngineThread
from wisp.cloud.event_log import EventLog, LogHeader, read_events
from wisp.cloud.metrics import Metrics
from wisp.core.admission import Admission, KeyLimits
from wisp.core.batching import batching_policy
from wisp.core.cost import Coefficients, CostModel
from wisp.core.events import (
    Action,
    EdgeLost,
    FromEdge,
    InEvent,
    KeyLimitsChanged,
    Limits,
    Run,
    Send,
    StepDone,
    Tick,
    WakeAt,
)
from wisp.core.messages import VERSION as PROTOCOL
from wisp.core.messages import Cancel, Draft, Hello, Open, Refused, Verdict, Welcome, check_hello
from wisp.core.session import State
from wisp.core.verifier import Verifier
from wisp.engines.base import TargetEngine, Tokenizer

log = logging.getLogger("wisp.host")

Sender = Callable[[Verdict | Refused], None]


class VerifierHost:
    """One engine, one verifier, many connections. Build it on the running event loop."""

    def __init__(
        self,
        engine: TargetEngine,
        tokenizer: Tokenizer,
        admission: Admission,
        *,
        model: str,
        batching: str = "laxity",
        cost: Coefficients | None = None,
        park_s: float = 60.0,
        forecast: bool = True,
        event_log: Path | None = None,
        died: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`cost`: what the cost model starts from; None: it learns from the first step on. `died` is called once the
        engine will not run again, after its sessions have heard of it. Raises ConfigError.
        """
        info = engine.info
        self.info = info
        self.model = model
        self.tokenizer = tokenizer
        limits = Limits(
            n_vocab=info.n_vocab,
            eos=info.eos,
            slots=info.slots,
            slot_tokens=info.slot_tokens,
            kv_tokens=info.kv_tokens,
            step_tokens=info.step_tokens,
            park_s=park_s,
            forecast=forecast,
            digest=info.digest,
        )
        self.limits = limits
        self.verifier = Verifier(limits, batching_policy(batching), admission, CostModel(cost))
        self.metrics = Metrics(self.verifier)
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._log: EventLog | None = None
        if event_log is not None:
            header = LogHeader(
                __version__,
                info.engine,
                model,
                limits,
                batching,
                cost,
                admission.max_sessions,
                admission.limits,
            )
            self._log = EventLog(event_log, header, self._loop.time())
        self._engine = EngineThread(engine, self._loop, self._step_done)
        self._died = died
        self._senders: dict[int, Sender] = {}
        self._keys: dict[int, str] = {}
        self._sockets: dict[int, bool] = {}  # connections of edges: can their sessions go elsewhere?
        self._next_connection = 0
        self._tick_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._step: Run | None = None

    def welcome(self) -> Welcome:
        """What every edge is told first."""
        return Welcome(
            PROTOCOL,
            self.model,
            self.tokenizer.fingerprint,
            self.limits.n_vocab,
            sorted(self.limits.eos),
            self.limits.slot_tokens,
            self.limits.max_draft,
            self.info.engine,
            self.info.mode,
            self.limits.park_s,
            self.limits.digest,
        )

    # --- connections

    def check(self, hello: Hello) -> None:
        """May this edge come in? Raises ProtocolError."""
        check_hello(hello, self.tokenizer.fingerprint, self.model)

    def attach(
        self, key: str, send: Sender, *, movable: bool = False, close: Callable[[], None] | None = None
    ) -> int:
        """A new connection of `key`; `send` is called with its messages and must not block.

        movable: its sessions can open again elsewhere. `close` ends the connection, where it is a socket.
        """
        self._next_connection += 1
        if close is not None:
            self._sockets[self._next_connection] = movable
            self.metrics.connections.inc()
        self._senders[self._next_connection] = send
        self._keys[self._next_connection] = key
        return self._next_connection

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None:
        """A message came in."""
        key = self._keys[connection]
        if self.draining and isinstance(message, Open):
            refused = Refused(message.session, "shutting_down", "this verifier is shutting down", 1.0, True)
            self.metrics.admission(refused.code)
            self._send(connection, refused)
            return
        if isinstance(message, Cancel):
            self.metrics.cancelled(message.session)
        if not isinstance(message, Open):
            self._feed(FromEdge(connection, key, message))
            return
        self.metrics.opened(self._loop.time(), message, key)
        before = self.n_sessions
        actions = self._feed(FromEdge(connection, key, message))
        sent = (a.message for a in actions if isinstance(a, Send))
        refusal = next((m.code for m in sent if isinstance(m, Refused)), "")
        self.metrics.admission(refusal or ("admitted" if self.n_sessions > before else "resumed"))

    def detach(self, connection: int) -> None:
        """The connection is gone; its sessions are parked."""
        self._senders.pop(connection, None)
        self._keys.pop(connection, None)
        if self._sockets.pop(connection, None) is not None:
            self.metrics.connections.dec()
        self._feed(EdgeLost(connection))

    def limit(self, limits: dict[str, KeyLimits]) -> None:
        """The limits of keys have changed; these are all of them."""
        self._feed(KeyLimitsChanged(limits))

    @property
    def n_sessions(self) -> int:
        """Live sessions."""
        return len(self.verifier.sessions)

    @property
    def n_connections(self) -> int:
        """Open connections, edges and thin clients together."""
        return len(self._senders)

    async def drain(self, timeout_s: float) -> None:
        """Take no new sessions; wait until those that have an edge have ended, or `timeout_s`."""
        self.draining = True
        deadline = self._loop.time() + timeout_s
        sessions = self.verifier.sessions
        while any(s.state is not State.PARKED for s in sessions.values()) and self._loop.time() < deadline:
            await asyncio.sleep(0.05)

    def move(self) -> int:
        """Take no new sessions, and send those away that can open again elsewhere. Returns how many."""
        self.draining = True
        leaving = [s for s in self.verifier.sessions.values() if self._sockets.get(s.connection)]
        for s in leaving:
            message = "this verifier is being drained; open the session again at the front"
            refused = Refused(s.id, "shutting_down", message, fatal=True)
            self.metrics.sent(self._loop.time(), refused)
            self._send(s.connection, refused)
            self._feed(FromEdge(s.connection, s.key, Cancel(s.id)))
        return len(leaving)

    def stop(self) -> None:
        """End the engine thread (after its step) and free the engine. Blocks."""
        if self._timer is not None:
            self._timer.cancel()
        self._engine.stop()
        if self._log:
            self._log.close()

    # --- events and actions

    def _feed(self, event: InEvent) -> list[Action]:
        """Hand over an event and carry out what follows."""
        now = self._loop.time()
        if self._log:
            self._log.write(now, event)
        actions = self.verifier.handle(now, event)
        if isinstance(
            event, StepDone
        ):  # the engine's next step before anything else: it costs more than a socket
            if self._log:
                self._log.write(now, Tick())
            then = self.verifier.handle(now, Tick())
            actions = (
                [a for a in then if isinstance(a, Run)]
                + actions
                + [a for a in then if not isinstance(a, Run)]
            )
        for action in actions:
            if isinstance(action, Send):
                self.metrics.sent(now, action.message)
                self._send(action.connection, action.message)
            elif isinstance(action, Run):
                self._step = action
                self.metrics.dispatched(now, action)
                self._engine.submit(action)
            elif isinstance(action, WakeAt):
                self._wake_at(action.at)
        if not isinstance(event, Tick | StepDone) and not self._tick_due and not self.verifier.running:
            self._tick_due = True
            self._loop.call_soon(self._tick)
        return actions

    def _tick(self) -> None:
        self._tick_due = False
        self._feed(Tick())

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._tick)

    def _step_done(self, done: StepDone) -> None:
        assert self._step is not None
        self.metrics.step(self._loop.time(), self._step, done)
        self._step = None
        dead, self._engine.dead = self._engine.dead, None  # before the next step can say so, too
        self._feed(done)
        if dead is not None:
            self._died(dead)

    def _send(self, connection: int, message: Verdict | Refused) -> None:
        sender = self._senders.get(connection)
        if sender is not None:
            sender(message)


__all__ = ["EventLog", "Sender", "VerifierHost", "read_events"]
