"""The processes of a simulated system: verifiers, routers with their replicas, edges. Each is the product's own code.

What `wisp serve` and `wisp edge` build around it (HTTP, files, threads) is left out or, where decisions wait for it,
played by `network` and `loop`. A process is started, and ends by itself, by a signal, or by being killed; its service
manager, or the router, starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from wisp.api.keys import Keyring, digest_of
from wisp.api.process import Listen
from wisp.check.faults.engine import HashDraft, HashTarget, tokenizer
from wisp.check.faults.loop import Life
from wisp.check.faults.sockets import Listener
from wisp.core.draft.policies import Ahead
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.verify.admission import Admission, KeyLimits
from wisp.core.verify.events import Run, StepDone
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.engines.base import TargetEngine
from wisp.router.fleet import SERVING, Fleet, Replica
from wisp.router.host import RouterHost
from wisp.router.replica import ReplicaSpec
from wisp.router.routing import Routing
from wisp.router.thin import LocalLink
from wisp.server.app import Settings
from wisp.server.control import MOVE_PATH, REPORT_PATH, report_of
from wisp.server.crowd import Crowd
from wisp.server.engine_thread import EngineThread
from wisp.server.host import VerifierHost
from wisp.server.sockets import SessionEndpoint
from wisp.server.thin import ThinBackend

if TYPE_CHECKING:
    from wisp.check.faults.world import World

KILLED, STOPPED, FAILED = "killed", "exit status 0", "exit status 1"
STEP_S = (0.004, 0.03)  # a step's time, from and to
HOST_S = 0.004  # the host's part of a step, where another may be in flight
PATIENCE_S = 8.0  # with a step that does not end


class Keys(Keyring):
    """Keys of the simulation: a name is its own secret."""

    def __bool__(self) -> bool:
        return True  # as with a file of keys, even if all of them were revoked

    def set(self, limits: dict[str, KeyLimits]) -> None:
        """From now on there are these keys, and no others."""
        self.replace({digest_of(name): name for name in limits}, dict(limits))


class TimedEngine(EngineThread):
    """In place of the engine's threads: a step's arithmetic is done at once, and its end comes when it would."""

    world: World

    def __init__(
        self,
        engine: TargetEngine,
        loop: asyncio.AbstractEventLoop,
        done: Callable[[StepDone], None],
        *,
        depth: int = 1,
    ) -> None:
        self.engine, self._loop, self._done = engine, loop, done
        self._queue = engine.queue(depth)
        self._host_s = HOST_S if depth > 1 else 0.0
        self._free_at = 0.0  # when the device is done with all that it has
        self._hangs = False
        self.dead = None
        assert isinstance(engine, HashTarget)
        self._target = engine
        self._rng = self.world.net.chance(f"steps {self.world.next_engine()}")

    def submit(self, step: Run, planned: float) -> None:
        if self._hangs:
            return
        failing = self._target.failing[0] if self._target.failing else ""
        took = self._rng.uniform(*STEP_S)
        if failing in ("late", "hang"):
            self._target.failing.pop(0)
            if failing == "hang":
                self._hangs = True  # neither this step nor a later one comes back
                return
            took = self._rng.uniform(1.0, 6.0)
        self._queue.submit(step)
        done = self._collected(step, self._host_s * 1e3, None)
        done = msgspec.structs.replace(done, engine_ms=took * 1e3)
        now = self._loop.time()
        self._free_at = max(now + self._host_s, self._free_at) + took
        self._loop.call_later(self._free_at - now, self._done, done)

    def stop(self, hung: Callable[[], bool] = lambda: False) -> None:
        self.engine.close()


class Process:
    """What all have in common. `over` is told of its end, in words."""

    def __init__(self, world: World, name: str, over: Callable[[Process, str], None]) -> None:
        self.world, self.name = world, name
        self.life: Life = world.born(name)
        self._over = over
        self.ending = False

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Have the process do something."""
        self.world.loop.run_in(self.life, callback, *args)

    def kill(self, *, silently: bool = False) -> None:
        """It is gone, now. `silently`: with its machine, so nobody is told by the network."""
        self._end(KILLED, silently=silently)

    def _end(self, how: str, *, silently: bool = False) -> None:
        if self.life.alive:
            self.world.loop.die(self.life)
            self.world.net.died(self.life, silently=silently)
            self._over(self, how)


class VerifierProcess(Process):
    """`wisp serve`, alone or as a replica: the model loads, sessions are served, a signal drains it."""

    def __init__(
        self,
        world: World,
        name: str,
        address: str,
        salt: int,
        over: Callable[[Process, str], None],
        *,
        settings: Settings,
        token: str = "",
    ) -> None:
        super().__init__(world, name, over)
        self.address, self.salt, self.settings = address, salt, settings
        self.keys = Keys(router=token)
        self.keys.set(world.limits)
        self.host: VerifierHost | None = None
        self.engine: HashTarget | None = None
        self.thin: ThinBackend | None = None
        self.endpoint = SessionEndpoint(self.ready, self.keys.authorize)
        self.crowd = Crowd(self.endpoint, self.keys.authorize, world.shape.sockets)
        self._stopping = False
        world.net.listeners[address] = Listener(self.life, self.crowd, self.http)
        world.loop.run_in(self.life, self._load, after_s=world.rng.uniform(0.05, 0.6))

    def ready(self) -> VerifierHost:
        if self.host is None or self.host.failed is not None:
            raise UnavailableError("the model is still loading", retry_after=2.0)
        return self.host

    def _load(self) -> None:
        shape, s = self.world.shape, self.settings
        self.engine = HashTarget(
            self.salt, shape.slots, shape.slot_tokens, shape.kv_tokens, shape.step_tokens
        )
        self.host = VerifierHost(
            self.engine,
            tokenizer(),
            Admission(s.max_sessions, self.keys.limits),
            model=s.model,
            batching=s.batching,
            park_s=s.park_s,
            slo_admission=s.slo_admission,
            died=self._died,
            depth=shape.depth,
            history_tokens=shape.history_tokens,
            look_s=0.5,
            patience=lambda step, cost: PATIENCE_S,
        )
        self.thin = ThinBackend(self.host)
        self.world.oracles.verifier_up(self)

    def _died(self, error: Exception) -> None:
        self.world.oracles.verifier_failed(self, error)
        self.world.loop.run_in(self.life, self._end, FAILED, after_s=0.05)

    def set_keys(self, limits: dict[str, KeyLimits]) -> None:
        self.keys.set(limits)
        if self.host is not None:
            self.host.limit(self.keys.limits)

    def stop(self) -> None:
        """SIGTERM."""
        if not self._stopping and self.life.alive:
            self._stopping = self.ending = True
            self.call(lambda: self.world.loop.create_task(self._drain()))

    async def _drain(self) -> None:
        if self.host is not None:
            await self.host.drain(self.settings.drain_s)
            await asyncio.sleep(0.01)  # what is queued leaves
            self.host.stop()
        self._end(STOPPED)

    async def http(self, method: str, path: str, authorization: str) -> tuple[int, bytes]:
        """What a router asks (`server.control`)."""
        if self.keys.speaks_for(authorization) is None:
            return 404, b"{}"
        try:
            host = self.ready()
        except RequestError as error:
            return error.status, msgspec.json.encode({"error": {"message": str(error)}})
        if path == REPORT_PATH:
            return 200, msgspec.json.encode(report_of(host))
        assert path == MOVE_PATH
        moved = host.move()
        await host.drain(self.settings.drain_s)
        return 200, msgspec.json.encode({"moved": moved})


class RouterProcess(Process):
    """`wisp serve --replicas N`."""

    def __init__(
        self, world: World, name: str, address: str, replicas: int, over: Callable[[Process, str], None]
    ) -> None:
        super().__init__(world, name, over)
        self.address = address
        self.keys = Keys()
        self.keys.set(world.limits)
        self.children: list[VerifierProcess] = []
        self._replicas = replicas
        self.endpoint = SessionEndpoint(self._ready, self.keys.authorize)
        self.crowd = Crowd(self.endpoint, self.keys.authorize, world.shape.sockets)
        self.call(self._start)
        world.net.listeners[address] = Listener(self.life, self.crowd, self._http)

    def _start(self) -> None:
        drain_s = self.world.shape.drain_s
        self.routing = r = Routing(_Launcher(self), self._spec, None, self.keys, drain_s=drain_s)
        self.placement, self.fleet, self.host, self.backend = r.placement, r.fleet, r.host, r.backend
        self.fleet.add(self._replicas)
        self.world.loop.create_task(self._watch())

    async def _watch(self) -> None:
        await self.fleet.ended()
        self._end(FAILED)

    def _spec(self, replica: Replica) -> ReplicaSpec:
        settings = self.world.settings()
        return ReplicaSpec(replica.name, "hash", {}, settings, Listen(), replica.token)

    def _ready(self) -> RouterHost:
        return self.routing.ready()  # which is made once the process runs

    def set_keys(self, limits: dict[str, KeyLimits]) -> None:
        self.keys.set(limits)
        self.routing.keys_changed()

    def link(self, key: str) -> LocalLink:
        """That of the router's own thin clients of a key."""
        link = self.backend._edge(key).link
        assert isinstance(link, LocalLink)
        return link

    def operate(self, what: Callable[[Fleet], Awaitable[None]]) -> None:
        """Have an operator do something to the fleet. What is refused is refused."""

        async def work() -> None:
            with contextlib.suppress(RequestError):
                await what(self.fleet)

        self.call(lambda: self.world.loop.create_task(work()))

    def launch(self, spec: ReplicaSpec) -> VerifierProcess:
        """At the first free address, which may be that of one that has died."""
        hosts = (f"{self.name}-{n}" for n in itertools.count(1))
        host = next(h for h in hosts if f"{h}:80" not in self.world.net.listeners)
        child = VerifierProcess(
            self.world,
            host,
            f"{host}:80",
            self.world.salt,
            self.world.replica_over,
            settings=spec.settings,
            token=spec.token,
        )
        self.children = [c for c in self.children if c.life.alive]
        self.children.append(child)
        self.world.processes.append(child)
        return child

    def stop(self) -> None:
        """SIGTERM: every replica finishes what it has."""
        if not self.ending and self.life.alive:
            self.ending = True
            self.call(lambda: self.world.loop.create_task(self._drain()))

    async def _drain(self) -> None:
        self.host.draining = True
        await self.fleet.stop()
        await self.backend.close()
        await self.fleet.close()
        self._end(STOPPED)

    def left_behind(self) -> list[str]:
        """What is there that should not be, once everybody has gone."""
        host, serving = self.host, [r for r in self.fleet.replicas.values() if r.state in SERVING]
        counts = {
            "connections": host._sockets(),
            "Opens that wait": sum(len(queue.opens) for queue in host._waiting.values()),
            "looks": len(host._looks),
            "sockets in the crowd": len(self.crowd._inside),
            "sessions counted": sum(u.sessions for u in host.admission.usage.values()),
            "sessions of thin clients": sum(e.sessions for e in self.backend._edges.values()),
            "replicas that are gone": len(self.placement._replicas.keys() - {r.name for r in serving}),
        }
        return [f"{self.name}: {n} {what}" for what, n in counts.items() if n]

    def kill(self, *, silently: bool = False) -> None:
        """Its replicas notice: they drain and end."""
        super().kill(silently=silently)
        for child in self.children:
            child.stop()

    async def _http(self, method: str, path: str, authorization: str) -> tuple[int, bytes]:
        return 404, b"{}"


class _Launcher:
    name = "virtual"

    def __init__(self, router: RouterProcess) -> None:
        self._router = router

    async def start(self, spec: ReplicaSpec) -> _Running:
        await asyncio.sleep(self._router.world.rng.uniform(0.01, 0.2))
        return _Running(self._router.launch(spec))

    def close(self) -> None:
        """The replicas end with their router."""


class _Running:
    """A replica that was started, as `router.launch.Running`."""

    def __init__(self, child: VerifierProcess) -> None:
        self._child = child
        self.address = child.address
        self.url = f"http://{child.address}"

    async def ended(self) -> str:
        return await self._child.world.wait_for_end(self._child)

    def stop(self) -> None:
        self._child.stop()

    def kill(self) -> None:
        self._child.kill()


class EdgeProcess(Process):
    """`wisp edge`: a link, a drafter, and the users of its API."""

    def __init__(
        self, world: World, name: str, home: str, key: str, kind: str, over: Callable[[Process, str], None]
    ) -> None:
        super().__init__(world, name, over)
        self.key = key
        rng = world.net.chance(f"drafter {name} {world.loop.now}")
        self.draft = HashDraft(world.salt, rng.choice((0.3, 0.7, 0.9, 1.0)), rng) if kind else None
        self._home, self._kind = home, kind
        self.link: VerifierLink | None = None
        self.backend: EdgeBackend | None = None
        self.call(self._start)

    def _start(self) -> None:
        world = self.world
        self.link = VerifierLink(f"http://{self._home}", self.key, give_up_s=world.shape.give_up_s)
        ahead = Ahead(energy=0.02) if world.net.chance(f"ahead {self.name}").random() < 0.6 else None
        policies = world.policies(self._kind or "fixed:1")
        history = world.shape.history_tokens
        self.backend = EdgeBackend(self.link, None, self.draft, policies, ahead, history)  # type: ignore[arg-type]
        self.link.start()
