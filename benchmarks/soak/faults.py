"""The faults of a soak. Each returns when everything is as it was before."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
from collections.abc import Awaitable, Callable, Sequence

import psutil

from benchmarks.soak.http import Line, Said, get, session_socket
from benchmarks.soak.parties import Tally, answered
from benchmarks.soak.stack import LOOK_S, PATIENCE_S, Door, Stack, a_key, open_files
from benchmarks.soak.texts import Jobs
from wisp.api.scrape import read_page
from wisp.core.protocol.messages import Open
from wisp.core.protocol.sampling import Sampling

SPARE_FILES = 6  # descriptors that a process may have beyond those that it has, where they run out
CROWD = 2_000  # connections at once
CROWD_TOKENS = 4
LONG = 2_000  # tokens of an answer that nobody reads
SLOW_S = 0.02  # between two reads of a slow reader
SLOW_TOKENS = 100
# Connections that come while descriptors are short, and sessions that go on while something else is
SUDDEN = 64
HOLD_S = 5.0  # descriptors are short for so long, at most


class Trouble:
    """One run's means to do harm."""

    def __init__(self, stack: Stack, tally: Tally, jobs: Jobs, chance: random.Random, crowd: int) -> None:
        self.stack = stack
        self.tally = tally
        self.jobs = jobs
        self.chance = chance
        self.crowd = crowd

    # --- processes die

    async def kill_router(self) -> None:
        """Its verifiers finish what they have, and end."""
        async with self.stack.router.trouble():
            await self.stack.kill("router")
            await self.stack.start_router()

    async def kill_verifier(self) -> None:
        """Its sessions go on at the other."""
        psutil.Process(self.stack.a_verifier(self.chance)).kill()
        await self._one_less()
        await self.stack.wait_up()

    async def kill_edge(self) -> None:
        async with self.stack.edge.trouble():
            await self.stack.kill("edge")
            await self.stack.start_edge()

    async def restart_router(self) -> None:
        """SIGTERM: it finishes answers, and refuses others."""
        async with self.stack.router.trouble():
            await self._ends("router")
            await self.stack.start_router()

    async def restart_edge(self) -> None:
        async with self.stack.edge.trouble():
            await self._ends("edge")
            await self.stack.start_edge()

    async def restart_verifier(self) -> None:
        """By its router: its sessions move to the other."""
        name = self.chance.choice(list(await self.stack.verifiers()))
        status = await self.stack.order(f"/{name}/restart")
        if status != 200:
            self.tally.find(f"the restart of a verifier: status {status}")
        await self.stack.wait_up()

    async def _ends(self, name: str) -> None:
        if (status := await self.stack.terminate(name)) != 0:
            self.tally.find(f"the {name} ended with {status} on SIGTERM")

    async def _one_less(self) -> None:
        """Until the router has noticed."""
        while len(await self.stack.verifiers()) > 1:
            await asyncio.sleep(LOOK_S)

    # --- what they need runs out

    async def few_files_router(self) -> None:
        await self._few_files(self.stack.pid("router"), self.stack.router.port, self.stack.router)

    async def few_files_edge(self) -> None:
        await self._few_files(self.stack.pid("edge"), self.stack.edge.port, self.stack.edge)

    async def few_files_verifier(self) -> None:
        verifiers = await self.stack.verifiers()
        pid = self.stack.a_verifier(self.chance)
        port = next(
            c.laddr.port for c in psutil.Process(pid).net_connections() if c.laddr.port in verifiers.values()
        )
        await self._few_files(pid, port, None)

    async def _few_files(self, pid: int, port: int, door: Door | None) -> None:
        """Connections beyond the descriptors of a process. Afterwards it answers as before."""
        async with door.trouble() if door else contextlib.nullcontext():
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files(pid) + SPARE_FILES, before[1]))
            lines = [Line(port, a_key(self.chance)) for _ in range(SUDDEN)]
            await asyncio.gather(*(line.connect() for line in lines), return_exceptions=True)
            looks = [asyncio.ensure_future(get(port, "/health")) for _ in range(SUDDEN)]
            await asyncio.wait(looks, timeout=HOLD_S)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            for line in lines:
                line.close()
            for look in looks:
                look.cancel()
            await asyncio.gather(*looks, return_exceptions=True)
            if not await self._answers(port):
                self.tally.find(f"after descriptors ran out, port {port} does not answer /health")

    async def _answers(self, port: int) -> bool:
        """Wait for an answer: a connection made as descriptors are there again may be closed with those before it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    with contextlib.suppress(OSError, EOFError):
                        await get(port, "/health")
                        return True
                    await asyncio.sleep(LOOK_S)
        return False

    async def full_disk(self) -> None:
        """Verifiers cannot write files any more. They say so, and serve on without an event log until they are started
        again."""
        pids = [pid for name, pid in self.stack.pids().items() if name.startswith("verifier")]
        limits = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
        for pid, (_, hard) in zip(pids, limits, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
        await self._served(SUDDEN)
        for name, port in (await self.stack.verifiers()).items():
            if not await self._says_event_log_lost(port):
                self.tally.find(f"{name} does not say in its metrics that its disk is full")
        for pid, limit in zip(pids, limits, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)

    async def _says_event_log_lost(self, port: int) -> bool:
        for _ in range(int(PATIENCE_S / LOOK_S)):
            seen = read_page((await get(port, "/metrics")).decode())
            if seen["wisp:event_log_lost_total"]:
                return True
            await asyncio.sleep(LOOK_S)
        return False

    async def _served(self, sessions: int) -> None:
        """Until others have ended so many."""
        done = self.tally.done
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if self.tally.done >= done + sessions:
                return
            await asyncio.sleep(LOOK_S)

    # --- peers that are a burden

    async def slow_readers(self) -> None:
        """At the router and at the edge. They get their whole text."""

        async def one(door: Door) -> None:
            line = Line(door.port, a_key(self.chance), small=True)
            job = self.jobs(self.chance, SLOW_TOKENS)
            await answered(line, door, job, self.tally, self.chance, stream=True, pause_s=SLOW_S)
            line.close()

        await asyncio.gather(*(one(door) for door in (self.stack.router, self.stack.edge) for _ in range(4)))

    async def deaf_readers(self) -> None:
        """They read nothing. Their answers end all the same, and no verifier keeps anything for them."""
        lines: list[Line] = []
        asked: list[asyncio.Task[Said]] = []
        for door in (self.stack.router, self.stack.edge):
            for _ in range(2):
                job = self.jobs(self.chance, LONG)
                line = Line(door.port, a_key(self.chance), small=True)
                _, writer = await line.connect()
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                lines.append(line)
                asked.append(asyncio.create_task(line.complete(job, stream=True)))
        for port in (await self.stack.verifiers()).values():
            number = self.chance.getrandbits(40)
            opens = [
                Open(
                    f"deaf-session-{number + n}", 0, [n], Sampling(seed=n), LONG, serve=True, ignore_eos=True
                )
                for n in range(2)
            ]
            with contextlib.suppress(OSError, EOFError):
                lines.append(await session_socket(port, a_key(self.chance), *opens))
        await self._served(4 * SUDDEN)
        for line in lines:
            line.close()
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    async def many_connections(self) -> None:
        """So many at once: two of five at the router, two at the edge, and one an edge's. All of them ask.

        Edges come first: their handshakes take long on a busy machine, and customers that wait for them in silence are
        refused.
        """
        doors = (self.stack.router, self.stack.edge)
        people = [
            (Line(door.port, a_key(self.chance)), door) for door in doors for _ in range(self.crowd * 2 // 5)
        ]
        router = self.stack.router.port
        sockets = [session_socket(router, a_key(self.chance)) for _ in range(self.crowd // 5)]
        gate = asyncio.Semaphore(100)  # below what a port queues

        async def held(some: Awaitable[object]) -> object:
            async with gate:
                return await some

        opened = await asyncio.gather(*map(held, sockets), return_exceptions=True)
        opened += await asyncio.gather(*(held(line.connect()) for line, _ in people), return_exceptions=True)
        failed = [x for x in opened if isinstance(x, BaseException)]
        if failed:
            self.tally.find(f"{len(failed)} of {self.crowd} connections failed: {failed[0]!r}")

        async def ask(line: Line, door: Door) -> None:
            job = self.jobs(self.chance, CROWD_TOKENS)
            await answered(line, door, job, self.tally, self.chance)
            line.close()

        await asyncio.gather(*(ask(line, door) for line, door in people))
        for line in opened:
            if isinstance(line, Line):
                line.close()


KINDS: dict[str, Callable[[Trouble], Awaitable[None]]] = {
    "verifier killed": Trouble.kill_verifier,
    "edge killed": Trouble.kill_edge,
    "router killed": Trouble.kill_router,
    "verifier restarted": Trouble.restart_verifier,
    "edge restarted": Trouble.restart_edge,
    "router restarted": Trouble.restart_router,
    "router out of descriptors": Trouble.few_files_router,
    "edge out of descriptors": Trouble.few_files_edge,
    "verifier out of descriptors": Trouble.few_files_verifier,
    "disk full": Trouble.full_disk,
    "slow readers": Trouble.slow_readers,
    "deaf readers": Trouble.deaf_readers,
    "many connections": Trouble.many_connections,
}
DEATHS = tuple(kind for kind in KINDS if kind.endswith(("killed", "restarted")))


def schedule(chance: random.Random, rounds: int, kinds: Sequence[str]) -> list[str]:
    """Each kind once in a round, in any order."""
    return [kind for _ in range(rounds) for kind in chance.sample(list(kinds), len(kinds))]
