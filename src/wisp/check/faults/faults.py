"""The faults: one function for each kind. It returns whether the fault found something to act on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from wisp.check.faults.lines import LOST, Line
from wisp.check.faults.nodes import EdgeProcess, Process, RouterProcess, VerifierProcess
from wisp.check.faults.peers import hostile_peer, old_peer
from wisp.check.faults.plan import Event
from wisp.core.verify.admission import KeyLimits

if TYPE_CHECKING:
    from wisp.check.faults.world import World

T = TypeVar("T")


def inject(world: World, event: Event) -> bool:
    """Make it happen."""
    return _KINDS[event.what](world, event)


def heal(world: World) -> None:
    """From now on nothing is broken any more."""
    net = world.net
    net.slow, net.proxied, net.outdated = 1.0, 0.0, 0.0
    for a, b in sorted(map(sorted, net.silent)):
        net.join(a, b)
    for process in world.processes:
        if process.life.frozen:
            world.loop.thaw(process.life)
    for watch in world.watches():
        if watch.process.engine is not None:
            watch.process.engine.failing.clear()
    _set_keys(world, dict(world.shape.limits))


def _one_of(things: Sequence[T], pick: int) -> T | None:
    return things[pick % len(things)] if things else None


def _servers(world: World) -> list[Process]:
    return [*world.alive(RouterProcess), *world.alive(VerifierProcess)]


# --- the network


def _line(world: World, event: Event) -> Line | None:
    return _one_of(world.net.live(), event.pick)


def _cut(world: World, event: Event) -> bool:
    line = _line(world, event)
    if line is None:
        return False
    notices: tuple[float | None, ...] = (0.0, 0.001, 0.05, 0.5, 3.0, None)
    line.cut(notices[event.more % 6], notices[event.more // 6 % 6])
    return True


def _drain_line(world: World, event: Event) -> bool:
    line = _line(world, event)
    if line is None:
        return False
    end = line.client if event.more % 3 else line.server
    if end.closed is not None:
        return False
    world.loop.run_in(end.life, end.close, LOST)
    line.drain(end)
    return True


def _stall(world: World, event: Event) -> bool:
    line = _line(world, event)
    if line is None:
        return False
    ways = ((line.up,), (line.down,), (line.up, line.down))[event.more % 3]
    for way in ways:
        way.stall()
        world.loop.run_in(world.life, way.heal, after_s=0.05 + event.x**2 * 30.0)
    return True


def _part(world: World, event: Event) -> bool:
    lives = sorted({p.life.name for p in world.processes if p.life.alive})
    if len(lives) < 2:
        return False
    a, b = lives[event.pick % len(lives)], lives[event.more % len(lives)]
    if a == b:
        return False
    world.net.part(a, b)
    world.loop.run_in(world.life, world.net.join, a, b, after_s=0.1 + event.x * 6.0)
    return True


def _slow(world: World, event: Event) -> bool:
    world.net.slow = 3.0 + event.x * 30.0

    def over() -> None:
        world.net.slow = 1.0

    world.loop.run_in(world.life, over, after_s=0.5 + event.x)
    return True


def _proxy(world: World, event: Event) -> bool:
    world.net.proxied = world.loop.now + event.x * 3.0
    return True


def _old_server(world: World, event: Event) -> bool:
    world.net.outdated = world.loop.now + event.x * 2.0
    return True


# --- processes


def _kill(world: World, event: Event) -> bool:
    server = _one_of(_servers(world), event.pick)
    if server is not None:
        server.kill()
    return server is not None


def _vanish(world: World, event: Event) -> bool:
    server = _one_of(_servers(world), event.pick)
    if server is not None:
        server.kill(silently=True)
    return server is not None


def _freeze(world: World, event: Event) -> bool:
    process = _one_of([p for p in world.processes if p.life.alive and not p.life.frozen], event.pick)
    if process is None:
        return False
    world.loop.freeze(process.life)
    world.loop.run_in(world.life, _thaw, world, process, after_s=0.05 + event.x**2 * 8.0)
    return True


def _thaw(world: World, process: Process) -> None:
    if process.life.frozen:
        world.loop.thaw(process.life)


def _stop(world: World, event: Event) -> bool:
    server = _one_of(_servers(world), event.pick)
    if isinstance(server, VerifierProcess | RouterProcess):
        server.stop()
    return server is not None


def _swap(world: World, event: Event) -> bool:
    servers = world.alive(VerifierProcess)
    if not servers or world.salt + 1 >= len(world.salts):
        return False
    world.salt += 1
    for server in servers if event.more % 2 else servers[event.pick % len(servers) :][:1]:
        server.kill()
    return True


def _edge(world: World, event: Event) -> bool:
    edge = _one_of(world.alive(EdgeProcess), event.pick)
    if edge is not None:
        edge.kill(silently=event.more % 2 == 0)
    return edge is not None


# --- engines and drafters


def _engine(what: str) -> Callable[[World, Event], bool]:
    def do(world: World, event: Event) -> bool:
        up = [p for p in world.alive(VerifierProcess) if p.engine is not None]
        process = _one_of(up, event.pick)
        if process is None:
            return False
        process.engine.failing.append(what)
        return True

    return do


def _drafter(world: World, event: Event) -> bool:
    edge = _one_of([e for e in world.alive(EdgeProcess) if e.draft is not None], event.pick)
    if edge is None:
        return False
    edge.draft.broken += 1 + event.more % 20
    return True


# --- operators


def _set_keys(world: World, limits: dict[str, KeyLimits]) -> None:
    """Write the file of keys. Each server reads it in its own time, as it is then."""
    world.limits = limits
    for server in _servers(world):
        after_s = 0.0 if world.calm else world.rng.uniform(0.0, 2.0)
        world.loop.run_in(server.life, _read_keys, world, server, after_s=after_s)


def _read_keys(world: World, server: Process) -> None:
    assert isinstance(server, VerifierProcess | RouterProcess)
    server.set_keys(world.limits)


def _revoke(world: World, event: Event) -> bool:
    name = _one_of(sorted(world.limits), event.pick)
    if name is None:
        return False
    _set_keys(world, {k: v for k, v in world.limits.items() if k != name})

    def restore() -> None:
        if not world.calm:
            _set_keys(world, {**world.limits, name: world.shape.limits[name]})

    world.loop.run_in(world.life, restore, after_s=1.0 + event.x * 3.0)
    return True


def _limit(world: World, event: Event) -> bool:
    name = _one_of(sorted(world.limits), event.pick)
    if name is None:
        return False
    choices = (
        KeyLimits(sessions=1),
        KeyLimits(sessions=3),
        KeyLimits(requests_per_minute=30),
        KeyLimits(tokens_per_minute=300),
        KeyLimits(),
    )
    _set_keys(world, {**world.limits, name: choices[event.more % len(choices)]})
    return True


def _operate(world: World, event: Event) -> bool:
    router = _one_of(world.alive(RouterProcess), 0)
    if router is None:
        return False
    replicas = list(router.fleet.replicas) if hasattr(router, "fleet") else []
    name = _one_of(replicas, event.more)
    if name is None:
        return False
    kind, count = event.pick % 3, 1 + event.more % 5
    if kind == 0:
        router.operate(lambda fleet: fleet.drain(name))
    elif kind == 1:
        router.operate(lambda fleet: fleet.restart(name))
    else:
        router.operate(lambda fleet: fleet.scale(count))
    return True


# --- users and strangers


def _leave(world: World, event: Event) -> bool:
    ask = _one_of([a for a in world.asks if not a.over], event.pick)
    if ask is None or ask.task is None:
        return False
    world.loop.run_in(ask.life, ask.task.cancel)
    return True


def _halt(world: World, event: Event) -> bool:
    ask = _one_of([a for a in world.asks if not a.over], event.pick)
    if ask is None:
        return False
    ask.halted = world.loop.now + event.x * 5.0
    return True


def _stranger(world: World, event: Event) -> tuple[str, str, bool] | None:
    server = _one_of(_servers(world), event.pick)
    key = _one_of(sorted(world.limits), event.more)
    if server is None or key is None:
        return None
    assert isinstance(server, VerifierProcess | RouterProcess)
    return f"http://{server.address}", key, isinstance(server, RouterProcess)


def _old(world: World, event: Event) -> bool:
    found = _stranger(world, event)
    if found is None:
        return False
    address, key, router = found
    rng = random.Random(f"old {event.more}")
    world.loop.spawn(world.loop.born("old"), old_peer(world, address, key, rng, router=router))
    return True


def _hostile(world: World, event: Event) -> bool:
    found = _stranger(world, event)
    if found is None:
        return False
    address, key, _ = found
    rng = random.Random(f"hostile {event.more}")
    world.loop.spawn(world.loop.born("hostile"), hostile_peer(world, address, key, rng))
    return True


_KINDS: dict[str, Callable[[World, Event], bool]] = {
    "cut": _cut,
    "drain_line": _drain_line,
    "stall": _stall,
    "part": _part,
    "slow": _slow,
    "proxy": _proxy,
    "old_server": _old_server,
    "kill": _kill,
    "vanish": _vanish,
    "freeze": _freeze,
    "stop": _stop,
    "swap": _swap,
    **{what: _engine(what) for what in ("step", "slice", "nan", "late", "hang", "dead")},
    "drafter": _drafter,
    "edge": _edge,
    "revoke": _revoke,
    "limit": _limit,
    "operate": _operate,
    "leave": _leave,
    "halt": _halt,
    "old": _old,
    "hostile": _hostile,
}
