"""The verifier's host: gives `core.verifier.Verifier` a clock, an engine thread and connections.

Everything here runs on the event loop. Events go in, actions are carried out, and whenever the engine is idle
and something has changed a Tick follows once all messages at hand have been taken in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from wisp.cloud.engine_thread import EngineThread
from wisp.cloud.metrics import Metrics
from wisp.core.admission import Admission
from wisp.core.batching import batching_policy
from wisp.core.events import EdgeLost, FromEdge, InEvent, Limits, Run, Send, StepDone, Tick, WakeAt
from wisp.core.messages import VERSION as PROTOCOL
from wisp.core.messages import Cancel, Draft, Open, Refused, Verdict, Welcome
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
        batching: str = "continuous",
        park_s: float = 60.0,
        event_log: Path | None = None,
        died: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`died` is called once the engine will not run again, after its sessions have heard of it."""
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
        )
        self.limits = limits
        self.verifier = Verifier(limits, batching_policy(batching), admission)
        self.metrics = Metrics(self.verifier)
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._engine = EngineThread(engine, self._loop, self._step_done)
        self._died = died
        self._senders: dict[int, Sender] = {}
        self._keys: dict[int, str] = {}
        self._next_connection = 0
        self._tick_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._step: Run | None = None
        self._log = EventLog(event_log) if event_log else None

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
        )

    # --- connections

    def attach(self, key: str, send: Sender) -> int:
        """A new connection of `key`; `send` is called with its messages and must not block."""
        self._next_connection += 1
        self._senders[self._next_connection] = send
        self._keys[self._next_connection] = key
        return self._next_connection

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None:
        """A message came in."""
        key = self._keys[connection]
        if self.draining and isinstance(message, Open):
            refused = Refused(message.session, "shutting_down", "this verifier is shutting down", 1.0, True)
            self._send(connection, refused)
            return
        if isinstance(message, Cancel):
            self.metrics.cancelled(message.session)
        if isinstance(message, Open):
            self.metrics.opened(self._loop.time(), message, key)
        self._feed(FromEdge(connection, key, message))

    def detach(self, connection: int) -> None:
        """The connection is gone; its sessions are parked."""
        self._senders.pop(connection, None)
        self._keys.pop(connection, None)
        self._feed(EdgeLost(connection))

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

    def stop(self) -> None:
        """End the engine thread (after its step) and free the engine. Blocks."""
        if self._timer is not None:
            self._timer.cancel()
        self._engine.stop()
        if self._log:
            self._log.close()

    # --- events and actions

    def _feed(self, event: InEvent) -> None:
        now = self._loop.time()
        if self._log:
            self._log.write(now, event)
        for action in self.verifier.handle(now, event):
            if isinstance(action, Send):
                self.metrics.sent(now, action.message)
                self._send(action.connection, action.message)
            elif isinstance(action, Run):
                self._step = action
                self._engine.submit(action)
            elif isinstance(action, WakeAt):
                self._wake_at(action.at)
        if not isinstance(event, Tick) and not self._tick_due and not self.verifier.running:
            self._tick_due = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._tick_due = False
        self._feed(Tick())

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._tick)

    def _step_done(self, done: StepDone) -> None:
        assert self._step is not None
        self.metrics.step(self._step, done)
        self._step = None
        self._feed(done)
        dead, self._engine.dead = self._engine.dead, None
        if dead is not None:
            self._died(dead)

    def _send(self, connection: int, message: Verdict | Refused) -> None:
        sender = self._senders.get(connection)
        if sender is not None:
            sender(message)


class EventLog:
    """Every (now, event) of a run, length-prefixed msgpack: `Verifier` replays it to identical actions."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._encoder = msgspec.msgpack.Encoder()

    def write(self, now: float, event: InEvent) -> None:
        """Append one event."""
        data = self._encoder.encode((now, event))
        self._file.write(len(data).to_bytes(4, "little") + data)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_events(path: Path) -> list[tuple[float, InEvent]]:
    """The (now, event) pairs of an event log, in order; one that a crash cut short at the end is left out."""
    decoder = msgspec.msgpack.Decoder(tuple[float, InEvent])
    data = path.read_bytes()
    events, at = [], 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data):
            break
        events.append(decoder.decode(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return events
