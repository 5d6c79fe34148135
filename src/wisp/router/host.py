"""The router's side of the session socket: it answers each Open with the address of a replica, and that is all.

It is to `server.sockets` what a verifier's host is. Fleet-wide limits per key are enforced here, by what replicas
report; each replica enforces the same limits again for itself, so that going around the router gains little.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from wisp.core.errors import ProtocolError, UnavailableError
from wisp.core.protocol.messages import Cancel, Draft, Hello, Open, Redirect, Refused, Welcome, check_hello
from wisp.core.protocol.sampling import Sampling
from wisp.core.route.placement import SETTLE_S, Choice, Placement
from wisp.core.verify.admission import Admission, KeyUsage, Refusal
from wisp.router.fleet import Fleet, Replica
from wisp.router.metrics import RouterMetrics
from wisp.server.control import Report
from wisp.server.sockets import Sender

WAITING = 64  # Opens of one key that may wait at a time
WAITING_TOKENS = 1 << 18  # of their prompts: 10 MB


class _Connection(msgspec.Struct, frozen=True):
    key: str
    send: Sender
    close: Callable[[], None] | None


class _Queue:
    """Opens of one key that wait for news of its sessions, each with the connection it came over."""

    def __init__(self) -> None:
        self.opens: deque[tuple[int, Open]] = deque()
        self._tokens = 0

    def put(self, connection: int, open_: Open) -> bool:
        """False if there is no room for it."""
        tokens = self._tokens + len(open_.prompt)
        if len(self.opens) >= WAITING or tokens > WAITING_TOKENS:
            return False
        self._tokens = tokens
        self.opens.append((connection, open_))
        return True

    def pop(self) -> tuple[int, Open]:
        connection, open_ = self.opens.popleft()
        self._tokens -= len(open_.prompt)
        return connection, open_

    def drop(self, connection: int, session: str = "") -> None:
        """Nobody waits any more for this session, or for any that came over this connection."""
        for _ in range(len(self.opens)):
            whose, open_ = self.pop()
            if whose != connection or session not in ("", open_.session):
                self.put(whose, open_)


class RouterHost:
    """Connections of edges, and of the router's own thin clients."""

    def __init__(
        self, fleet: Fleet, placement: Placement, admission: Admission, metrics: RouterMetrics
    ) -> None:
        self.fleet = fleet
        self.admission = admission
        self.draining = False
        self._placement = placement
        self._metrics = metrics
        self._connections: dict[int, _Connection] = {}
        self._next = 0
        self._recent: dict[str, deque[tuple[float, str]]] = {}  # (when, key) of placements, not yet reported
        self._waiting: dict[str, _Queue] = {}  # by key
        self._looks: set[asyncio.Task[None]] = set()  # one for each of them
        self._usage: dict[str, dict[str, KeyUsage]] = {}  # as last reported, by replica

    @property
    def here(self) -> bool:
        return self.fleet.welcome is not None and self._placement.any_open

    # --- what a session socket wants (`server.sockets.SessionHost`)

    def check(self, hello: Hello) -> None:
        """May this edge come in? Raises ProtocolError."""
        welcome = self.welcome()
        check_hello(hello, welcome.fingerprint, welcome.model)
        if not hello.redirects:
            message = (
                "this is a router of several verifiers, and this edge's release does not follow redirects"
            )
            raise ProtocolError("version_mismatch", f"{message}; install the same release on both")

    def welcome(self) -> Welcome:
        """What every replica would say. Raises UnavailableError while there is none."""
        welcome = self.fleet.welcome
        if welcome is None or not self.here:
            what = "shutting down" if self.draining else "waiting for a replica to come up"
            raise UnavailableError(f"this router is {what}", retry_after=2.0)
        return welcome

    def attach(
        self, key: str, send: Sender, *, movable: bool = False, close: Callable[[], None] | None = None
    ) -> int:
        self._next += 1
        self._connections[self._next] = _Connection(key, send, close)
        self._metrics.connections.set(self._sockets())
        return self._next

    def detach(self, connection: int) -> None:
        c = self._connections.pop(connection, None)
        if c is not None and c.key in self._waiting:
            self._waiting[c.key].drop(connection)
        self._metrics.connections.set(self._sockets())

    def _sockets(self) -> int:
        return sum(c.close is not None for c in self._connections.values())

    def receive(self, connection: int, message: Open | Draft | Cancel) -> None:
        """Answer an Open. Nothing else belongs here."""
        c = self._connections[connection]
        if isinstance(message, Cancel):
            if c.key in self._waiting:
                self._waiting[c.key].drop(connection, message.session)
            return
        if isinstance(message, Draft):
            text = "this is a router, which verifies nothing; open the session again with what is committed"
            c.send(Refused(message.session, "unknown_session", text, round=message.round))
            return
        open_ = self._without_ballast(message)
        if self._has_all(c.key) and not self._placement.knows(c.key, open_.session):
            self._wait(connection, c, open_)
        else:
            self._open(c, open_)

    def admit(self, key: str) -> None:
        """Raises Refusal where an Open of `key` would be refused for the key's limits, and counts that."""
        if self._has_all(key):
            return  # as far as is known: the Open will look twice
        try:
            self.admission.ask(asyncio.get_running_loop().time(), key)
        except Refusal as refusal:
            self.admission.turned_away(key)
            self._metrics.refused.add(1.0, refusal.code)
            raise

    def _has_all(self, key: str) -> bool:
        """Has this key as many sessions as it may have, as far as is known?"""
        limits, usage = self.admission.limits.get(key), self.admission.usage.get(key)
        return bool(limits and usage and limits.sessions and usage.sessions >= limits.sessions)

    def _without_ballast(self, open_: Open) -> Open:
        """What there is to know here, and to keep while it waits."""
        return Open(
            open_.session,
            open_.epoch,
            self._prompt(open_),
            Sampling(),
            open_.max_tokens,
            open_.round,
            avoid=open_.avoid,
            salt=open_.salt,
        )

    def _wait(self, connection: int, c: _Connection, open_: Open) -> None:
        """One of its key's sessions may have ended this moment: ask the replicas before refusing."""
        queue = self._waiting.get(c.key)
        if queue is None:
            queue = self._waiting[c.key] = _Queue()
            task = asyncio.ensure_future(self._look_twice(c.key, queue))
            self._looks.add(task)
            task.add_done_callback(self._looks.discard)
        if not queue.put(connection, open_):
            message = "this key has all the sessions that it may have, and as many waiting as may wait"
            self._refuse(c, open_, Refusal("rate_limit_exceeded", message, 1.0))

    async def _look_twice(self, key: str, queue: _Queue) -> None:
        try:
            while queue.opens:
                known = len(queue.opens)
                await asyncio.sleep(SETTLE_S)
                await self.fleet.look()
                for _ in range(min(known, len(queue.opens))):  # the others wait for the next look
                    connection, open_ = queue.pop()
                    self._open(self._connections[connection], open_)
        finally:
            del self._waiting[key]

    def _open(self, c: _Connection, open_: Open) -> None:
        if not (self.here or self.draining):
            return  # this connection is being closed, and its edge will come back
        try:
            choice = self._place(c.key, open_)
        except Refusal as error:
            self._refuse(c, open_, error)
            return
        self._metrics.placed(choice)
        if c.close is not None:
            self._metrics.redirects.add()
        c.send(Redirect(open_.session, self.fleet.address(choice.replica)))

    def _refuse(self, c: _Connection, open_: Open, why: Refusal) -> None:
        self._metrics.refused.add(1.0, why.code)
        c.send(Refused(open_.session, why.code, str(why), why.retry_after, True, open_.round))

    def _place(self, key: str, open_: Open) -> Choice:
        if self.draining:
            raise Refusal("shutting_down", "this router is shutting down", 1.0)
        now = asyncio.get_running_loop().time()
        known = self._placement.knows(key, open_.session)  # it was admitted then
        owed = self.admission.richer(key) is not None
        if not known:
            self.admission.opened(now, key)
        avoid = self.fleet.at(open_.avoid) if open_.avoid else None
        try:
            choice = self._placement.place(
                now,
                open_.session,
                key,
                open_.prompt,
                avoid.name if avoid else "",
                salt=open_.salt,
                owed=owed,
            )
        except Refusal:
            if not known:
                self.admission.closed(key)
            raise
        self._recent.setdefault(choice.replica, deque()).append((now, key))
        return choice

    def _prompt(self, open_: Open) -> list[int]:
        """The prompt, if it is one; the replica will say what is wrong with any other."""
        prompt, welcome = open_.prompt, self.fleet.welcome
        if welcome is None or not 0 < len(prompt) <= welcome.context:
            return []
        return prompt if min(prompt) >= 0 and max(prompt) < welcome.n_vocab else []

    # --- what the fleet tells

    def changed(self) -> None:
        """A replica came up or went. Without any, edges are let go: they come back when there is one."""
        self._count()
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
        self._count()

    def _count(self) -> None:
        """Count the sessions of each key at the replicas that are up, with those that are on their way to one."""
        up = {r.name for r in self.fleet.replicas.values() if r.report is not None}
        self._usage = {name: keys for name, keys in self._usage.items() if name in up}
        self._recent = {name: placed for name, placed in self._recent.items() if name in up}
        coming = Counter(key for placed in self._recent.values() for _, key in placed)
        for key, usage in self.admission.usage.items():
            usage.sessions = coming[key] + sum(k[key].sessions for k in self._usage.values() if key in k)
