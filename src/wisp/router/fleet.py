"""The replicas of a router: started, looked at every moment, started again when they die, drained when told to.

Each replica has one task, its life:

    while wanted:  start -> (look at it until it ends) -> wait a little

and everything that is learned goes to `core.route.placement`, which decides where sessions go. A drain shuts the
replica for new sessions, has it send away those it has (their edges come back to the router with what is committed),
and ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import ssl
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from enum import Enum

import httpx
import msgspec

from wisp.api.keys import on_behalf
from wisp.api.paths import TOKENIZER_PATH
from wisp.core.errors import ConfigError, RequestError, UnavailableError, WispError
from wisp.core.protocol.messages import DIGESTS_SINCE, Welcome
from wisp.core.route.placement import Placement, ReplicaSize
from wisp.router.launch import Launcher, Running
from wisp.router.replica import ReplicaSpec
from wisp.server.control import MOVE_PATH, REPORT_PATH, Report
from wisp.server.defaults import MOST_REPLICAS

log = logging.getLogger("wisp.router")

LOOK_S = 0.25  # between two looks at a replica
ANSWER_S = 1.0  # without an answer: others are preferred, and nobody waits for it
SILENT_S = 5.0  # without a report: nothing new goes there
BACKOFF_S = (0.2, 30.0)  # first and longest wait before a replica that died is started again
STEADY_S = 60.0  # one that lived so long may die without being waited for
END_S = 15.0  # to end, beyond the time for a drain, before it is killed


class State(Enum):
    """Where a replica stands."""

    STARTING = "starting"
    UP = "up"
    SILENT = "silent"  # its process runs, but does not answer
    DRAINING = "draining"
    DOWN = "down"  # between two lives


SERVING = frozenset({State.UP, State.SILENT, State.DRAINING})


class Replica:
    """What is known of one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.STARTING
        self.running: Running | None = None
        self.lives = 0
        self.token = ""  # of this life: so nobody is taken for another
        self.report: Report | None = None
        self.heard = 0.0
        self.restarts = 0
        self.wanted = True
        self.planned = False  # its next end is no accident
        self.was = ""  # how its last life ended
        self.unlike = ""  # why this life was not taken in
        self.life: asyncio.Task[None] | None = None
        self.over = asyncio.Event()  # set at the end of each life


class View(msgspec.Struct, frozen=True):
    """What operators see of a replica."""

    name: str
    state: str
    address: str
    sessions: int
    restarts: int
    last_end: str


class Fleet:
    """The replicas. `spec` says what to start for one. `changed` is called whenever one has come up or
    gone, `heard` after each report."""

    def __init__(
        self,
        launcher: Launcher,
        spec: Callable[[Replica], ReplicaSpec],
        placement: Placement,
        tls: ssl.SSLContext | None,
        *,
        drain_s: float,
        changed: Callable[[], None],
        heard: Callable[[Replica, Report], None],
    ) -> None:
        self.launcher = launcher
        self.replicas: dict[str, Replica] = {}
        self.welcome: Welcome | None = None  # of those that are up, or were last
        self.failed: WispError | None = None  # none could start
        self.stopping = False
        self._ended = asyncio.Event()
        self._spec = spec
        self._placement = placement
        self._drain_s = drain_s
        self._changed = changed
        self._heard = heard
        self._next = 1
        self._client = httpx.AsyncClient(timeout=SILENT_S, trust_env=False, verify=tls or True)

    # --- what operators do

    def add(self, count: int = 1) -> list[Replica]:
        """Start more replicas; they are up once their models are loaded."""
        new = []
        for _ in range(count):
            replica = Replica(f"r{self._next}")
            self._next += 1
            self.replicas[replica.name] = replica
            replica.life = asyncio.create_task(self._live(replica))
            replica.life.add_done_callback(functools.partial(self._over, replica))
            new.append(replica)
        return new

    async def scale(self, count: int) -> None:
        """Have `count` replicas: start some (and return), or drain the youngest. Raises RequestError."""
        self._check_running()
        if not 1 <= count <= MOST_REPLICAS:
            raise RequestError(
                400, f"the number of replicas must be from 1 to {MOST_REPLICAS}", param="replicas"
            )
        wanted = [r for r in self.replicas.values() if r.wanted]
        if count > len(wanted):
            self.add(count - len(wanted))
            return
        # The youngest go, but of the others one has to be up
        order = sorted(wanted, key=lambda r: (r.state is not State.UP, wanted.index(r)))
        await asyncio.gather(*(self._leave(r) for r in order[count:]))

    async def drain(self, name: str) -> None:
        """Move a replica's sessions to the others and end it, for good. Raises RequestError."""
        self._check_running()
        replica = self._named(name)
        others = [r for r in self.replicas.values() if r is not replica and r.state is State.UP]
        if not others:
            message = f"{name} is the only replica that is up: scale up first, or use restart"
            raise RequestError(409, message, code="last_replica")
        await self._leave(replica)

    async def restart(self, name: str) -> None:
        """Move a replica's sessions to the others (if there are any), end it, and start it afresh."""
        self._check_running()
        replica = self._named(name)
        if not replica.wanted:
            raise RequestError(409, f"{name} is being drained", code="draining")
        replica.planned = True
        replica.over.clear()
        await self._empty(replica)
        try:
            async with asyncio.timeout(self._drain_s + END_S):
                await replica.over.wait()
        except TimeoutError:
            self._kill(replica)

    async def stop(self) -> None:
        """The end of the router: let every replica finish what it has, where it is."""
        self.stopping = True
        for replica in self.replicas.values():
            replica.wanted = False
            self._placement.shut(replica.name)
        self._changed()
        lives = [self._finish(r) for r in self.replicas.values()]
        await asyncio.gather(*lives)

    async def close(self) -> None:
        for replica in self.replicas.values():
            if replica.life is not None:
                replica.life.cancel()
        await asyncio.gather(*(r.life for r in self.replicas.values() if r.life), return_exceptions=True)
        await self._client.aclose()
        self.launcher.close()

    async def ended(self) -> None:
        """Returns when this fleet can never serve; `failed` says why."""
        await self._ended.wait()

    # --- what others ask

    def view(self) -> list[View]:
        """All replicas, the oldest first."""
        return [
            View(
                r.name,
                r.state.value,
                r.running.address if r.running else "",
                self._placement.sessions(r.name),
                r.restarts,
                r.was,
            )
            for r in self.replicas.values()
        ]

    def up(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.state is State.UP]

    async def look(self) -> None:
        """Hear from every replica now, or from those that answer in time."""
        looks = [asyncio.ensure_future(self._look(r, r.running)) for r in self.up() if r.running is not None]
        if looks:
            _, late = await asyncio.wait(looks, timeout=ANSWER_S)
            for look in late:
                look.cancel()

    def address(self, name: str) -> str:
        """Where edges find a replica that is up."""
        running = self.replicas[name].running
        assert running is not None
        return running.address

    def at(self, address: str) -> Replica | None:
        return next((r for r in self.replicas.values() if r.running and r.running.address == address), None)

    async def tokenizer(self, fingerprint: str) -> bytes:
        """The target's tokenizer, gzipped, from any replica that is up. Raises httpx.HTTPError or UnavailableError."""
        replica = next(iter(self.up()), None)
        if replica is None or replica.running is None:
            raise UnavailableError("no replica is up to give the tokenizer", retry_after=1.0)
        url = f"{replica.running.url}{TOKENIZER_PATH}/{fingerprint}"
        async with self._client.stream("GET", url, headers=_us(replica)) as response:
            response.raise_for_status()
            return b"".join([chunk async for chunk in response.aiter_raw()])

    async def get(self, replica: Replica, path: str) -> bytes:
        """What a replica that is up answers to its router. Raises httpx.HTTPError."""
        if replica.running is None:
            raise httpx.ConnectError("it is not running")
        url = f"{replica.running.url}{path}"
        response = await self._client.get(url, headers=_us(replica), timeout=ANSWER_S)
        return response.raise_for_status().content

    # --- a replica's life

    async def _live(self, r: Replica) -> None:
        wait = BACKOFF_S[0]
        while True:
            began = time.monotonic()
            try:
                r.was = await self._one_life(r)
            except Exception as error:  # whatever it is, the others go on, and this one is tried again
                r.was = str(error) or repr(error)
                log.debug("replica %s", r.name, exc_info=error)
            planned, r.planned = r.planned, False
            r.over.set()
            if not r.wanted:
                return
            if self.welcome is None and all(other.was for other in self.replicas.values()):
                self._fail(r)
                return
            if planned:
                log.info("replica %s: %s; starting it again", r.name, r.was)
                continue
            r.restarts += 1
            wait = BACKOFF_S[0] if time.monotonic() - began > STEADY_S else wait
            log.warning("replica %s: %s; starting it again in %.1f s", r.name, r.was, wait)
            await asyncio.sleep(wait)
            wait = min(wait * 2, BACKOFF_S[1])

    def _over(self, r: Replica, life: asyncio.Task[None]) -> None:
        """Its life is over, if only before it began."""
        r.over.set()
        if not r.wanted:
            self.replicas.pop(r.name, None)
            self._changed()

    def _fail(self, r: Replica) -> None:
        if self.failed is None:
            self.failed = ConfigError(f"replica {r.name} could not start ({r.was}); its log is above")
        self._ended.set()

    async def _one_life(self, r: Replica) -> str:
        r.state = State.STARTING
        r.token = secrets.token_hex(32)
        r.lives += 1
        r.unlike = ""
        running = r.running = await self.launcher.start(self._spec(r))
        ended = asyncio.ensure_future(running.ended())
        try:
            while not ended.done():
                look = asyncio.ensure_future(self._look(r, running))
                either = {ended, look}
                if not (await asyncio.wait(either, timeout=ANSWER_S, return_when=FIRST_COMPLETED))[0]:
                    self._placement.late(r.name)
                    await asyncio.wait(either, return_when=FIRST_COMPLETED)
                if ended.done():
                    look.cancel()
                await asyncio.wait({look})
                await asyncio.wait({ended}, timeout=LOOK_S)
            return r.unlike or ended.result()
        finally:
            if not ended.done():
                running.kill()
                ended.cancel()
            self._placement.gone(r.name)
            r.running = r.report = None
            r.state = State.DOWN
            self._changed()

    async def _look(self, r: Replica, running: Running) -> None:
        try:
            response = await self._client.get(f"{running.url}{REPORT_PATH}", headers=_us(r))
            report = msgspec.json.decode(response.content, type=Report) if response.is_success else None
        except (httpx.HTTPError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            log.debug("replica %s: no report: %r", r.name, error)
            report = None
        if r.running is not running:
            return  # it ended meanwhile
        now = time.monotonic()
        if report is None:
            if r.state is State.UP and now > r.heard + SILENT_S:
                log.warning("replica %s does not answer; nothing new goes there", r.name)
                self._become(r, State.SILENT)
            return
        r.heard, r.report = now, report
        if r.state is State.STARTING:
            if problem := self._other(report.welcome):
                log.error("replica %s %s; it is not taken in", r.name, problem)
                r.unlike = problem
                running.kill()
                return
            self._placement.up(r.name, ReplicaSize(report.slots, report.kv_tokens, report.max_sessions))
            self.welcome = report.welcome
            log.info("replica %s is up at %s", r.name, running.url)
            self._become(r, State.UP)
        elif r.state is State.SILENT:
            log.info("replica %s answers again", r.name)
            self._become(r, State.UP)
        self._placement.reported(asyncio.get_running_loop().time(), r.name, report.sessions)
        self._heard(r, report)

    def _other(self, welcome: Welcome) -> str:
        """How it differs from the fleet, in words, or "". Sessions move between replicas in mid-answer, and the model's
        file may have been replaced meanwhile. Where no other replica has sessions, the new one defines the fleet."""
        if not welcome.digest:
            return f"does not say which weights it runs: it needs WISP {DIGESTS_SINCE} or later"
        ours = self.welcome
        if ours is None or ours.digest == welcome.digest:
            return ""
        if not any(r.state in SERVING for r in self.replicas.values()):
            log.warning(
                "the fleet's model has changed: %s (%s), was %s (%s)", *_names(welcome), *_names(ours)
            )
            return ""
        (model, digest), (of, same) = _names(welcome), _names(ours)
        what = f"runs {model} ({digest}), with other weights or settings than the others' {of} ({same})"
        return f"{what}: if that is meant, restart those, too"

    def _become(self, r: Replica, state: State) -> None:
        r.state = state
        self._placement.shut(r.name, shut=state is not State.UP)
        self._changed()

    # --- draining

    def _named(self, name: str) -> Replica:
        if name not in self.replicas:
            known = ", ".join(self.replicas) or "none"
            raise RequestError(404, f"there is no replica {name}; there are: {known}", code="unknown_replica")
        return self.replicas[name]

    def _check_running(self) -> None:
        if self.stopping:
            raise RequestError(503, "the router is shutting down", code="shutting_down", type="server_error")

    async def _leave(self, r: Replica) -> None:
        r.wanted = False
        await self._empty(r)
        await self._finish(r)

    async def _empty(self, r: Replica) -> None:
        """Send its sessions away, and ask it to end."""
        running = r.running
        if running is None or r.state in (State.STARTING, State.DOWN):
            if r.life is not None and not r.wanted:
                r.life.cancel()
            elif running is not None:
                running.stop()
            else:
                r.planned = False
                r.over.set()
            return
        if r.state is State.SILENT:
            running.kill()  # it would not hear us
            return
        self._become(r, State.DRAINING)
        began = time.monotonic()
        with contextlib.suppress(httpx.HTTPError, ValueError):  # no answer, or one that is not JSON
            url = f"{running.url}{MOVE_PATH}"
            timeout = self._drain_s + SILENT_S
            response = await self._client.post(url, headers=_us(r), timeout=timeout)
            moved = response.json().get("moved", 0)
            log.info("replica %s: %d sessions moved in %.2f s", r.name, moved, time.monotonic() - began)
        running.stop()

    async def _finish(self, r: Replica) -> None:
        """Wait until it is gone, and see to it."""
        if r.life is None:
            return
        if r.running is None:
            r.life.cancel()
        else:
            r.running.stop()
        if not (await asyncio.wait({r.life}, timeout=self._drain_s + END_S))[0]:
            self._kill(r)
            r.life.cancel()
            await asyncio.wait({r.life})

    def _kill(self, r: Replica) -> None:
        log.warning("replica %s did not end in time, and is killed", r.name)
        if r.running is not None:
            r.running.kill()


def _names(welcome: Welcome) -> tuple[str, str]:
    return welcome.model, welcome.digest[:12]


def _us(r: Replica) -> dict[str, str]:
    """Headers by which a replica knows its router."""
    return {"Authorization": f"Bearer {on_behalf(r.token, 'router')}"}
