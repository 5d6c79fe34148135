"""A system in virtual time: its processes, network, users and faults. A plan decides everything.

storm   the plan's events happen, and users ask
calm    all that was broken heals, and each request must end
after   everybody goes, and nothing may be left
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

import wisp.edge.backend
import wisp.edge.link
import wisp.server.host
from wisp.api.backend import Backend
from wisp.check.faults.engine import digest_of
from wisp.check.faults.faults import heal, inject
from wisp.check.faults.loop import Life, NoThread, Restless, VirtualLoop, present_life, virtual
from wisp.check.faults.network import Network
from wisp.check.faults.nodes import EdgeProcess, Process, RouterProcess, TimedEngine, VerifierProcess
from wisp.check.faults.oracles import Oracles, VerifierWatch, Violation
from wisp.check.faults.peers import old_server
from wisp.check.faults.plan import STORM_S, Event, Plan
from wisp.check.faults.sockets import VirtualClient, VirtualConnect
from wisp.check.faults.users import Ask, some_tokens
from wisp.core.draft.policies import Policies
from wisp.core.verify.admission import KeyLimits
from wisp.engines.build import read_predictor
from wisp.server.app import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

HOME, ANY = "home:80", "any:80"
CALM_S = 90.0  # in which every request must end once nothing fails any more
GONE_S = 45.0  # after which the last connection is known to be lost
SETTLE_S = 3.0  # for what comes last: reports of replicas, sessions sent away
SALTS = 50  # models that may be tried one after another


@cache
def _predictor() -> Any:
    return read_predictor()


class Found(msgspec.Struct, frozen=True):
    """A violation: what was not true, and when."""

    what: str
    at: float


class Outcome(msgspec.Struct, frozen=True):
    """What came of a run. faults: that took effect, by kind. seen: situations at verifiers. asks: requests by outcome.
    events: of verifiers. trace: a hash of all that happened, in order."""

    seed: int
    faults: dict[str, int]
    seen: dict[str, int]
    asks: dict[str, int]
    tokens: int
    events: int
    turns: int
    virtual_s: float
    trace: str
    found: Found | None


class World:
    """One run."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.shape = plan, plan.shape
        self.loop = VirtualLoop(self._trouble)
        self.net = Network(self.loop, plan.seed)
        self.rng = self.net.chance("world")
        self.homes = [HOME, *(f"home{i}:80" for i in range(1, self.shape.verifiers))]
        if self.shape.balanced:
            self.net.balanced[ANY], self.homes = self.homes, [ANY]
        self.oracles = Oracles(self)
        self.found: Found | None = None
        self.happened: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()  # situations at verifiers
        self.events = 0  # of verifiers
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0
        self.salt = 0
        self.salts = {digest_of(salt): salt for salt in range(SALTS)}
        self.limits: dict[str, KeyLimits] = dict(self.shape.limits)
        self.liars: set[str] = set()
        self.processes: list[Process] = []
        self.asks: list[Ask] = []
        self.life = self.loop.born("world")
        self.calm = self.leaving = False
        self._ends: dict[Process, tuple[str, list[tuple[Life, asyncio.Future[str]]]]] = {}
        self._engines = self._asked = 0
        self._trace = hashlib.blake2b(digest_size=12)
        self.loop.blocking_s = lambda: self.rng.choice((0.002, 0.002, 0.005, 0.02))

    # --- what others ask

    def violated(self, what: str) -> Violation:
        """Something is not as it must be; the first such thing is what the run has found."""
        if self.found is None:
            self.found = Found(what, round(self.loop.now, 6))
        return Violation(what)

    def _trouble(self, what: str) -> None:
        self.violated(what)

    def born(self, name: str) -> Life:
        """A process starts; its clock begins anywhere."""
        return self.loop.born(name, self.rng.choice((0.0, 7.5, 3e3, 1e6)))

    def next_engine(self) -> int:
        self._engines += 1
        return self._engines

    def policies(self, spec: str) -> Policies:
        return Policies(spec, _predictor())

    def settings(self) -> Settings:
        s = self.shape
        return Settings(
            model="hash",
            batching=s.batching,
            max_sessions=s.max_sessions,
            park_s=s.park_s,
            drain_s=s.drain_s,
            slo_admission=s.slo_admission,
        )

    def note(self, *what: object) -> None:
        """For the trace."""
        self._trace.update(repr((round(self.loop.now, 9), *what)).encode())

    def watches(self) -> list[VerifierWatch]:
        """Of the verifiers that are up."""
        return [w for w in self.oracles.watches if w.process.life.alive]

    def names(self) -> list[str]:
        """Of all sessions at verifiers."""
        return [s.id for w in self.watches() for s in w.verifier.sessions.values()]

    def key_of(self, name: str) -> str:
        found = (s.key for w in self.watches() for s in w.verifier.sessions.values() if s.id == name)
        return next(found, "")

    def alive(self, kind: type[Process]) -> list[Any]:
        return [p for p in self.processes if isinstance(p, kind) and p.life.alive]

    # --- processes

    async def wait_for_end(self, process: Process) -> str:
        """For the process that looks after another."""
        how, waiting = self._ends.setdefault(process, ("", []))
        if how:
            return how
        future: asyncio.Future[str] = self.loop.create_future()
        waiting.append((present_life(), future))
        return await future

    def _told(self, process: Process, how: str) -> None:
        self.note("end", process.name, how)
        _, waiting = self._ends.get(process, ("", []))
        self._ends[process] = (how, [])
        for life, future in waiting:
            self.loop.run_in(life, _settle, future, how, after_s=0.001)

    def replica_over(self, process: Process, how: str) -> None:
        self._told(process, how)

    def _again(self, start: Callable[[], None], floor_s: float = 0.05) -> Callable[[Process, str], None]:
        """A service manager: what ends is started again, a little later."""

        def over(process: Process, how: str) -> None:
            self._told(process, how)
            if not self.leaving:
                self.loop.run_in(self.life, start, after_s=floor_s + self.rng.choice((0.0, 0.3, 2.0)))

        return over

    def start_router(self) -> None:
        process = RouterProcess(self, "home", HOME, self.shape.replicas, self._again(self.start_router))
        self.processes.append(process)

    def start_verifier(self, number: int) -> None:
        name = f"home{number}" if number else "home"
        over = self._again(lambda: self.start_verifier(number))
        process = VerifierProcess(self, name, f"{name}:80", self.salt, over, settings=self.settings())
        self.processes.append(process)

    def start_edge(self, number: int) -> None:
        if self.leaving:
            return
        key, kind = self.shape.edges[number]
        home = self.homes[number % len(self.homes)]
        over = self._again(lambda: self.start_edge(number))
        self.processes.append(EdgeProcess(self, f"edge{number}", home, key, kind, over))

    # --- users

    def ask(self, pick: int, number: int, former: list[int] | None = None) -> None:
        """A user asks: of an edge, or as a thin client of a server."""
        if self.calm:
            return
        self._asked += 1
        name = f"ask {self._asked}"
        edges = self.alive(EdgeProcess)
        servers: list[Process] = [*self.alive(RouterProcess), *self.alive(VerifierProcess)]
        if edges and pick % 4:
            edge = edges[pick // 4 % len(edges)]
            ask = Ask(self, edge.life, name, number, former or [])

            async def connected() -> str:
                assert edge.link is not None
                digest: str = (await edge.link.connected()).digest
                return digest

            ask.start("", connected, lambda: edge.backend)
        elif servers and self.limits:
            server = servers[pick // 4 % len(servers)]
            key = list(self.limits)[number % len(self.limits)]
            ask = Ask(self, server.life, name, number, former or [])
            if isinstance(server, RouterProcess):
                self._ask_router(ask, server, key)
            elif isinstance(server, VerifierProcess) and server.thin is not None:
                self._ask_verifier(ask, server, key)
            else:
                return
        else:
            return
        self.asks.append(ask)

    def _ask_router(self, ask: Ask, router: RouterProcess, key: str) -> None:
        async def connected() -> str:
            return (await router.link(key).connected()).digest

        ask.start(key, connected, lambda: router.backend)

    def _ask_verifier(self, ask: Ask, server: VerifierProcess, key: str) -> None:
        thin = server.thin
        assert thin is not None

        async def connected() -> str:
            return (await thin.target()).digest

        backend: Backend = thin
        ask.start(key, connected, lambda: backend)

    def asked(self, ask: Ask) -> None:
        """An ask is over; now and then its user goes on with the chat."""
        given = ask.watch.given if ask.watch is not None else 0
        self.note("asked", ask.name, ask.outcome, given)
        self.outcomes[ask.outcome] += 1
        self.tokens += given
        if ask.again and not self.calm and ask.watch is not None and ask.watch.finish:
            assert ask.watch.text is not None
            rng = random.Random(f"again {ask.name}")
            former = [*ask.prompt, *ask.watch.text.tokens, *some_tokens(rng, 4)]
            if len(former) < self.shape.slot_tokens - 10:
                after_s = rng.uniform(0.01, 0.5)
                self.loop.run_in(
                    self.life, self.ask, rng.getrandbits(20), rng.getrandbits(30), former, after_s=after_s
                )

    # --- the run

    def run(self) -> Outcome:
        """From the first to the last moment."""
        swaps: list[tuple[object, str, object]] = [
            (wisp.edge.link, "_Connect", VirtualConnect),
            (wisp.edge.backend, "ThreadPoolExecutor", NoThread),
            (wisp.server.host, "EngineThread", TimedEngine),
            (httpx, "AsyncClient", VirtualClient),
        ]
        VirtualConnect.net = VirtualClient.net = self.net
        self.net.old_server = old_server
        TimedEngine.world = self
        with virtual(self.loop, self.plan.seed, swaps):
            self._begin()
            self._storm()
            if self.found is None:
                self._calm()
            if self.found is None:
                self._leave()
        return Outcome(
            self.plan.seed,
            dict(sorted(self.happened.items())),
            dict(sorted((+self.seen).items())),
            dict(sorted(self.outcomes.items())),
            self.tokens,
            self.events,
            self.loop.turns,
            round(self.loop.now, 3),
            self._trace.hexdigest(),
            self.found,
        )

    def _begin(self) -> None:
        if self.shape.replicas:
            self.loop.run_in(self.life, self.start_router)
        for number in range(self.shape.verifiers):
            self.loop.run_in(self.life, self.start_verifier, number)
        for number in range(len(self.shape.edges)):
            self.loop.run_in(self.life, self.start_edge, number, after_s=self.rng.uniform(0.0, 0.5))

    def _storm(self) -> None:
        for event in self.plan.events:
            self.loop.run_in(self.life, self._inject, event, after_s=event.at)
        self._run_until(STORM_S)

    def _inject(self, event: Event) -> None:
        if event.what == "ask":
            self.ask(event.pick, event.more)
        elif inject(self, event):
            self.happened[event.what] += 1
            self.note("fault", event.what)

    def _run_until(self, time: float, done: Callable[[], bool] = lambda: False) -> bool:
        """True if it was done in time."""
        self.loop.run_in(self.life, lambda: None, after_s=max(0.0, time - self.loop.now))
        try:
            self.loop.run(lambda: self.found is not None or self.loop.now >= time or done())
        except Restless as error:
            self.violated(str(error))
        return done()

    def _calm(self) -> None:
        self.calm = True
        heal(self)
        waiting = list(self.asks)

        def over() -> bool:
            while waiting and waiting[-1].over:
                waiting.pop()
            return not waiting

        done = self._run_until(self.loop.now + CALM_S, over)
        if not done and self.found is None:
            for ask in self.asks:
                if not ask.over:
                    given = ask.watch.given if ask.watch is not None else 0
                    self.violated(
                        f"{ask.name} has not ended {CALM_S:g} s after the last fault; it has {given} tokens"
                    )

    def _leave(self) -> None:
        left: list[str] = []
        if not self._run_until(self.loop.now + GONE_S + self.shape.park_s, self._nobody_served):
            names = [
                (w.process.name, s.id, s.state.name)
                for w in self.watches()
                for s in w.verifier.sessions.values()
            ]
            left.append(f"sessions that nobody asks for: {names}")
        self.leaving = True
        for edge in self.alive(EdgeProcess):
            if edge.backend is None or edge.link is None:  # it has just been born
                continue
            if edge.backend.sessions or edge.link._listeners:
                left.append(
                    f"{edge.name}: {edge.backend.sessions} sessions, {len(edge.link._listeners)} listeners"
                )
            edge.kill()
        self._run_until(self.loop.now + GONE_S + self.shape.park_s, self._empty)
        self._run_until(self.loop.now + SETTLE_S)
        for watch in self.watches():
            left += watch.left_behind()
        for router in self.alive(RouterProcess):
            left += router.left_behind()
        if left and self.found is None:
            self.violated("left behind: " + "; ".join(left))

    def _nobody_served(self) -> bool:
        return not any(w.verifier.sessions for w in self.watches())

    def _empty(self) -> bool:
        """Have all peers left the servers? Connections that have yet to say hello are waited for, too."""
        served = any(
            w.verifier.sessions or w.host._senders or w.process.crowd._inside for w in self.watches()
        )
        return not served and not any(r.crowd._inside for r in self.alive(RouterProcess))


def _settle(future: asyncio.Future[str], how: str) -> None:
    if not future.done():
        future.set_result(how)


def run_plan(plan: Plan) -> Outcome:
    """Run it."""
    return World(plan).run()
