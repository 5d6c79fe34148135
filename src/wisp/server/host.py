"""The verifier's host: gives `core.verify.verifier.Verifier` a clock, an engine thread and connections.

Everything here runs on the event loop. Events go in, actions are carried out, and whenever the engine is idle
and something has changed a Tick follows once all messages at hand have been taken in.

What may go wrong is handled where it does: a step that fails, a log that cannot be written. After any other exception
nobody knows what state the verifier is in, so it is over (`vital`): its sessions are told to go elsewhere, and the
process is asked to end. So is one whose engine is dead, or does not come back from a step.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Concatenate, ParamSpec

from wisp import __version__
from wisp.api import tracing
from wisp.api.pages.recorder import THIN, Recorder
from wisp.core.errors import EngineDeadError, InternalError
from wisp.core.protocol.messages import (
    MAX_BRANCHES,
    Cancel,
    Draft,
    Hello,
    Open,
    Refused,
    Verdict,
    Welcome,
    check_hello,
    frame_limit,
)
from wisp.core.protocol.messages import VERSION as PROTOCOL
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import Admission, KeyLimits, Refusal
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.cost import Coefficients, CostModel
from wisp.core.verify.events import (
    Action,
    EdgeLost,
    Ended,
    InEvent,
    KeyLimitsChanged,
    Limits,
    Received,
    Run,
    Send,
    StepDone,
)
from wisp.core.verify.loop import VerifierLoop
from wisp.core.verify.session import Session
from wisp.core.verify.states import State
from wisp.core.verify.verifier import Verifier
from wisp.engines.base import TargetEngine, Tokenizer
from wisp.server.compiling import Compiling
from wisp.server.defaults import PARK_S
from wisp.server.engine_thread import EngineThread
from wisp.server.event_log import EventLog, LogHeader
from wisp.server.metrics import Metrics
from wisp.server.spans import SessionSpans
from wisp.server.watchdog import LOOK_S, StepWatch, patience_s

log = logging.getLogger("wisp.host")

Sender = Callable[[Verdict | Refused], None]
Onlooker = Callable[[float, InEvent, list[Action]], None]
P = ParamSpec("P")


def vital(
    method: Callable[Concatenate[VerifierHost, P], None],
) -> Callable[Concatenate[VerifierHost, P], None]:
    """Whatever the event loop calls here: an exception in it is the verifier's last, and after that nothing happens."""

    @functools.wraps(method)
    def guarded(host: VerifierHost, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if host.failed is not None:
            return
        try:
            method(host, *args, **kwargs)
        except Exception as error:
            log.critical("the verifier failed, and its process has to end", exc_info=error)
            host.fail(InternalError(f"the verifier failed: {error!r}; the log has the traceback"))

    return guarded


class VerifierHost:
    """One engine, one verifier, many connections. Build it on the running event loop."""

    def __init__(
        self,
        engine: TargetEngine,
        tokenizer: Tokenizer,
        admission: Admission,
        *,
        model: str,
        batching: str = "wisp",
        depth: int = 1,
        history_tokens: int = 0,
        cost: Coefficients | None = None,
        park_s: float = PARK_S,
        slo_admission: bool = True,
        slo_classes: Mapping[str, Slo] = {},
        event_log: Path | None = None,
        died: Callable[[Exception], None] = lambda error: None,
        look_s: float = LOOK_S,
        patience: Callable[[Run, CostModel], float] = patience_s,
    ) -> None:
        """`depth`: steps in flight at a time. `history_tokens`: see `Limits`. `cost`: what the cost model starts from;
        None: it learns from the first step on. `died` is called once this verifier cannot go on, after its sessions
        have heard of it. Every `look_s` seconds somebody looks whether the oldest step has taken longer than `patience`
        gives it. Raises ConfigError.
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
            slo_admission=slo_admission,
            digest=info.digest,
            depth=depth,
            history_tokens=history_tokens,
        )
        self.limits = limits
        self.verifier = Verifier(limits, batching_policy(batching), admission, CostModel(cost))
        self.metrics = Metrics(self.verifier)
        self.draining = False
        self.failed: Exception | None = None  # why this verifier is over
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
            self._log = EventLog(event_log, header, self._loop.time(), self.metrics.event_log_lost.add)
        self.grammars = engine.constraints.grammars
        self._compiling = Compiling(
            self.grammars,
            lambda key: admission.ask(self._loop.time(), key),
            self._take,
            self._refuse,
            most=admission.max_sessions,
        )
        self._engine = EngineThread(engine, self._loop, self._step_done, depth=depth)
        self._died = died
        self._senders: dict[int, Sender] = {}
        self._keys: dict[int, str] = {}
        self._sockets: dict[int, bool] = {}  # connections of edges: can their sessions go elsewhere?
        self._next_connection = 0
        self.batching = batching
        self.recorder = Recorder(
            self.verifier,
            classes=slo_classes,
            device=lambda connection: connection if connection in self._sockets else THIN,
            epoch=time.time() - self._loop.time(),
        )
        self._onlookers: dict[str, Onlooker] = {"recorder": self.recorder}
        if tracing.recording():
            self._onlookers["tracing"] = SessionSpans(self.verifier)
        self._driver = VerifierLoop(
            self.verifier, self, self._log.write if self._log else None, self._look_on
        )
        self._steps: deque[Run] = deque()  # in flight
        self._watch = StepWatch(
            lambda: self._steps[0] if self._steps else None,
            lambda step: patience(step, self.verifier.cost),
            self._give_up,
        )
        self._hangs = False  # the engine's thread is in a step, and will not come back
        self._stopped = False
        self._look_s = look_s
        self._looks = self._loop.call_later(look_s, self._look)

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
            frame_limit(self.limits.slot_tokens),
            MAX_BRANCHES,
        )

    # --- connections

    def check(self, hello: Hello) -> None:
        """May this edge come in? Raises ProtocolError."""
        check_hello(hello, self.tokenizer.fingerprint, self.model)

    def admit(self, key: str) -> None:
        """Raises Refusal where an Open of `key` would be refused for the key's limits, and counts that."""
        admission = self.verifier.admission
        try:
            admission.ask(self._loop.time(), key)
        except Refusal as refusal:
            admission.turned_away(key)
            self.metrics.admission(refusal.code)
            self.recorder.refused()
            self.metrics.refused.add(1.0, refusal.code)
            raise

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
        key = self._keys.get(connection)
        if key is None or not self._compiling.held(connection, key, message):
            self._take(connection, message)

    def _take(self, connection: int, message: Open | Draft | Cancel) -> None:
        if not (self.draining and isinstance(message, Open)):
            self._receive(connection, message)
            if self.failed is None:
                return
        if not isinstance(message, Cancel):
            text = "this verifier is shutting down"
            refused = Refused(message.session, "shutting_down", text, 1.0, True, message.round)
            self._refuse(connection, message, refused)

    def _refuse(self, connection: int, message: Open | Draft, refused: Refused) -> None:
        """Answer what the verifier is not to hear. A refused Open counts as a refused session, too."""
        if self.failed is not None:  # counting may be what failed, and the edge should hear all the same
            self._send(connection, refused)
            return
        if isinstance(message, Open):
            self.metrics.admission(refused.code)
            self.recorder.refused()
        self.send(connection, refused)

    @vital
    def _receive(self, connection: int, message: Open | Draft | Cancel) -> None:
        key = self._keys[connection]
        if not isinstance(message, Open):
            self._driver.feed(Received(connection, key, message))
            return
        self.metrics.opened(self._loop.time(), message)
        known = self.verifier.knows(message.session)
        actions = self._driver.feed(Received(connection, key, message))
        sent = (a.message for a in actions if isinstance(a, Send))
        own = (m.code for m in sent if isinstance(m, Refused) and m.session == message.session)
        self.metrics.admission(next(own, "resumed" if known else "admitted"))

    def detach(self, connection: int) -> None:
        """The connection is gone; its sessions are parked."""
        self._senders.pop(connection, None)
        self._keys.pop(connection, None)
        self._compiling.lost(connection)
        if self._sockets.pop(connection, None) is not None:
            self.metrics.connections.dec()
        self._lose(connection)

    @vital
    def _lose(self, connection: int) -> None:
        self._driver.feed(EdgeLost(connection))

    @vital
    def limit(self, limits: dict[str, KeyLimits]) -> None:
        """The limits of keys have changed; these are all of them."""
        self._driver.feed(KeyLimitsChanged(limits))

    @property
    def n_sessions(self) -> int:
        return len(self.verifier.sessions)

    @property
    def n_edges(self) -> int:
        """Open session sockets."""
        return len(self._sockets)

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
        for session in leaving:
            self._send_away(session)
        return len(leaving)

    @vital
    def _send_away(self, s: Session) -> None:
        message = "this verifier is being drained; open the session again at the router"
        self.send(s.connection, Refused(s.id, "shutting_down", message, fatal=True))
        self._driver.feed(Received(s.connection, s.key, Cancel(s.id)))

    def fail(self, error: Exception) -> None:
        """This verifier is over: tell its sessions, then who can end the process."""
        if self.failed is not None:
            return
        self.failed = error
        for s in self.verifier.sessions.values():
            refused = Refused(s.id, "shutting_down", "this verifier has failed, and ends", 1.0, fatal=True)
            try:
                self._send(s.connection, refused)
            except Exception as another:  # it may be what failed, and the others should hear all the same
                log.debug("session %s was not told: %r", s.id, another)
        self._died(error)

    def stop(self) -> None:
        """End the engine thread (after its step) and free the engine. Blocks, until the step is given up at most."""
        self._driver.stop()
        try:
            self._engine.stop(lambda: self._hangs)
        finally:
            self._stopped = True
            self._looks.cancel()
            if self._log:
                self._log.close()

    # --- events and actions

    def _look_on(self, now: float, event: InEvent, actions: list[Action]) -> None:
        """For the page, and for traces. They must not break what they show."""
        for name, look in tuple(self._onlookers.items()):
            try:
                look(now, event, actions)
            except Exception:
                del self._onlookers[name]
                log.exception("the %s failed: what it shows stands still from now on", name)

    @property
    def now(self) -> float:
        return self._loop.time()

    def soon(self, do: Callable[[], None]) -> None:
        """See `core.verify.loop.Surroundings`, as for the next ones."""
        self._loop.call_soon(self._call, do)

    def at(self, time: float, do: Callable[[], None]) -> Callable[[], None]:
        return self._loop.call_at(time, self._call, do).cancel

    @vital
    def _call(self, do: Callable[[], None]) -> None:
        do()

    def run(self, step: Run) -> None:
        self._steps.append(step)
        self.metrics.dispatched(self.now, step)
        self._engine.submit(step, self.verifier.in_flight.steps[-1].planned)

    def send(self, connection: int, message: Verdict | Refused) -> None:
        self.metrics.sent(self.now, message)
        self._send(connection, message)

    def ended(self, ended: Ended) -> None:
        self.metrics.ended(ended)

    @vital
    def _look(self) -> None:
        if not self._stopped:
            self._looks = self._loop.call_later(self._look_s, self._look)
        self._watch.look(self._look_s)

    def _give_up(self, waited_s: float) -> None:
        self._hangs = True
        message = f"a step of {len(self._steps[0].slices)} slices has not ended after {waited_s:.0f} s"
        log.critical("%s; the engine hangs, and the process has to end", message)
        self.fail(EngineDeadError(message))

    @vital
    def _step_done(self, done: StepDone) -> None:
        self.metrics.step(self._loop.time(), self._steps.popleft(), done)
        dead = self._engine.dead  # before the next step can say so, too
        self._driver.feed(done)
        if dead is not None:
            self.fail(dead)

    def _send(self, connection: int, message: Verdict | Refused) -> None:
        sender = self._senders.get(connection)
        if sender is not None:
            sender(message)
