"""The front's side of the session socket: it answers each Open with the address of a replica, and that is all.

It is to `cloud.sockets` what a verifier's host is. Fleet-wide limits per key are enforced here, by what replicas
report; each replica enforces the same limits again for itself, so that going around the front gains little.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from wisp.cloud.control import Report
from wisp.cloud.sockets import Sender
from wisp.core.admission import Admission, KeyUsage, Refusal
from wisp.core.errors import ProtocolError, UnavailableError
from wisp.core.messages import Cancel, Draft, Hello, Open, Redirect, Refused, Welcome, check_hello
from wisp.core.placement import SETTLE_S, Choice, Placement
from wisp.front.fleet import Fleet, Replica
from wisp.front.metrics import FrontMetrics


class _Connection(msgspec.Struct, frozen=True):
    key: str
    send: Sender
    close: Callable[[], None] | None


class FrontHost:
    """Connections of edges, and of the front's own thin clients."""

    def __init__(
        self, fleet: Fleet, placement: Placement, admission: Admission, metrics: FrontMetrics
    ) -> None:
        self.fleet = fleet
        self.admission = admission
        self.draining = False
        self._placement = placement
        self._metrics = metrics
        self._connections: dict[int, _Connection] = {}
        self._next = 0
        self._recent: dict[str, deque[tuple[float, str]]] = {}  # (when, key) of placements, not yet reported
        self._waiting: set[asyncio.Task[None]] = set()
        self._usage: dict[str, dict[str, KeyUsage]] = {}  # as last reported, by replica

    @property
    def here(self) -> bool:
        """Is there a replica that takes sessions?"""
        return self.fleet.welcome is not None and self._placement.any_open

    # --- what a session socket wants (`cloud.sockets.SessionHost`)

    def check(self, hello: Hello) -> None:
        """May this edge come in? Raises ProtocolError."""
        welcome = self.welcome()
        check_hello(hello, welcome.fingerprint, welcome.model)
        if not hello.redirects:
            message = (
                "this is a front of several verifiers, and this edge's release does not follow redirects"
            )
            raise ProtocolError("version_mismatch", f"{message}; install the same release on both")

    def welcome(self) -> Welcome:
        """What every replica would say. Raises UnavailableError while there is none."""
        welcome = self.fleet.welcome
        if welcome is None or not self.here:
            what = "shutting down" if self.draining else "waiting for a replica to come up"
            raise UnavailableError(f"this front is {what}", retry_after=2.0)
        return welcome

    def attach(
        self, key: str, send: Sender, *, movable: bool = False, close: Callable[[], None] | None = None
    ) -> int:
        """A new connection."""
        self._next += 1
        self._connections[self._next] = _Connection(key, send, close)
        self._metrics.connections.set(self._sockets())
        return self._next

    def detach(self, connection: int) -> None:
        """The connection is gone."""
        self._connections.pop(connection, None)
        self._metrics.connections.set(self._sockets())

    def _sockets(self) -> int:
        return sum(c.close is not None for c in self._connections.values())

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None:
        """Answer an Open. Nothing else belongs here."""
        if isinstance(message, Cancel):
            return
        c = self._connections[connection]
        if isinstance(message, Draft):
            text = "this is a front, which verifies nothing; open the session again with what is committed"
            c.send(Refused(message.session, "unknown_session", text, round=message.round))
            return
        if self._has_all(c.key) and not self._placement.knows(message.session):
            task = asyncio.ensure_future(self._look_twice(c, message))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
        else:
            self._open(c, message)

    def _has_all(self, key: str) -> bool:
        """Has this key as many sessions as it may have, as far as is known?"""
        limits, usage = self.admission.limits.get(key), self.admission.usage.get(key)
        return bool(limits and usage and limits.sessions and usage.sessions >= limits.sessions)

    async def _look_twice(self, c: _Connection, open_: Open) -> None:
        """One of its sessions may have ended this moment: ask the replicas before refusing."""
        await asyncio.sleep(SETTLE_S)
        await self.fleet.look()
        self._open(c, open_)

    def _open(self, c: _Connection, open_: Open) -> None:
        if not (self.here or self.draining):
            return  # this connection is being closed, and its edge will come back
        try:
            choice = self._place(c.key, open_)
        except Refusal as error:
            self._metrics.refused.labels(error.code).inc()
            c.send(Refused(open_.session, error.code, str(error), error.retry_after, True, open_.round))
            return
        self._metrics.placed(choice)
        if c.close is not None:
            self._metrics.redirects.inc()
        c.send(Redirect(open_.session, self.fleet.address(choice.replica)))

    def _place(self, key: str, open_: Open) -> Choice:
        if self.draining:
            raise Refusal("shutting_down", "this front is shutting down", 1.0)
        now = asyncio.get_running_loop().time()
        known = self._placement.knows(open_.session)  # it was admitted then
        if not known:
            self.admission.opened(now, key)
        avoid = self.fleet.at(open_.avoid) if open_.avoid else None
        try:
            choice = self._placement.place(
                now, open_.session, key, self._prompt(open_), avoid.name if avoid else ""
            )
        except Refusal:
            if not known:
                self.admission.closed(key)
            raise
        self._recent.setdefault(choice.replica, deque()).append((now, key))
        return choice

    def _prompt(self, open_: Open) -> list[int]:
        """The prompt, if it is one; the replica will say what is wrong with any other."""
        prompt, welcome = open_.prompt, self.welcome()
        sound = bool(prompt) and len(prompt) <= welcome.context and min(prompt) >= 0
        return prompt if sound and max(prompt) < welcome.n_vocab else []

    # --- what the fleet tells

    def changed(self) -> None:
        """A replica came up or went. Without any, edges are let go: they come back when there is one."""
        if self.here:
            return
        for c in list(self._connections.values()):
            if c.close is not None:
                c.close()

    def heard(self, replica: Replica, report: Report) -> None:
        """Take a replica's report into account: what its keys have used since its last."""
        now = asyncio.get_running_loop().time()
        before = self._usage.get(replica.name, {})
        self._usage[replica.name] = report.keys
        recent = self._recent.get(replica.name, deque())
        while recent and recent[0][0] < now - SETTLE_S:
            recent.popleft()
        for key, usage in report.keys.items():
            old = before.get(key, KeyUsage())
            if usage.requests < old.requests:  # it was started again since
                old = KeyUsage()
            self.admission.usage.setdefault(key, KeyUsage())
            prompt, output = usage.prompt_tokens - old.prompt_tokens, usage.output_tokens - old.output_tokens
            if prompt or output:
                self.admission.served(now, key, prompt, output)
        up = {r.name for r in self.fleet.replicas.values() if r.report is not None}
        self._usage = {name: keys for name, keys in self._usage.items() if name in up}
        self._recent = {name: placed for name, placed in self._recent.items() if name in up}
        coming = Counter(key for placed in self._recent.values() for _, key in placed)
        for key, usage in self.admission.usage.items():
            usage.sessions = coming[key] + sum(k[key].sessions for k in self._usage.values() if key in k)
