"""The processes of a soak: a router with two verifiers, and an edge before it, which die and are started again.

customers (HTTP) -> edge --+-> router -> verifier, verifier
customers (HTTP) ----------+      |            |
emulated devices (session sockets) ------------+
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Sequence

import httpx
import psutil

from benchmarks.soak.http import get
from wisp.api.scrape import read_page
from wisp.children import Child, Children

HONEST = tuple(f"honest-{n}" for n in range(4))
GREEDY = "greedy"
OPERATOR = "operator"
REPLICAS = 2
PARK_S = 2.0
PATIENCE_S = 300.0  # for what comes within seconds on a quiet machine
LOOK_S = 0.05


class Door:
    """An address that customers ask, and when they had to be disappointed there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = free_port()
        self._troubles: list[float] = []  # ends
        self._open = 0

    def troubled(self, since: float) -> bool:
        """Has something been done to this process since then?"""
        return self._open > 0 or any(end >= since for end in self._troubles)

    @contextlib.asynccontextmanager
    async def trouble(self) -> AsyncIterator[None]:
        """While something is done to it."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._troubles.append(time.monotonic())


class Stack:
    """`serve` and `draft` are flags: which target with which engine, and how the edge drafts."""

    def __init__(self, children: Children, name: str, serve: Sequence[str], draft: Sequence[str]) -> None:
        self.router, self.edge = Door("router"), Door("edge")
        self.name = name
        self._children = children
        self._folder = children.folder / name
        self._folder.mkdir()
        keys = self._folder / "keys.toml"
        names = (*HONEST, GREEDY, OPERATOR, "edge")
        tables = [f'[keys.{n}]\nsecret = "{n}"\n' + "admin = true\n" * (n == OPERATOR) for n in names]
        keys.write_text("".join(tables))
        self._serve = (
            "-m", "wisp.cli", "serve", *serve, "--replicas", str(REPLICAS),
            "--api-keys", str(keys),
            "--event-log", str(self._folder / "events"),
            "--park-s", str(PARK_S), "--port", str(self.router.port), "--log-level", "warning",
        )  # fmt: skip
        self._edge = (
            "-m", "wisp.cli", "edge", *draft, "--server", f"http://127.0.0.1:{self.router.port}",
            "--api-keys", str(keys), "--give-up-s", str(PATIENCE_S), "--port", str(self.edge.port),
            "--log-level", "warning",
        )  # fmt: skip
        self.processes: dict[str, Child] = {}
        self.lives: dict[str, int] = {"router": 0, "edge": 0}

    # --- their lives

    async def start(self) -> None:
        await self.start_router()
        await self.start_edge()

    async def start_router(self) -> None:
        """Returns when both verifiers are up, and the edge is connected, if there is one."""
        self._begin("router", self._serve, self.router.port)
        await self.wait_up()
        if "edge" in self.processes:
            await self._healthy("edge", self.edge.port)

    async def start_edge(self) -> None:
        self._begin("edge", self._edge, self.edge.port, {"WISP_API_KEY": "edge"})
        await self._healthy("edge", self.edge.port)

    def _begin(self, name: str, words: Sequence[str], port: int, env: dict[str, str] | None = None) -> None:
        self.lives[name] += 1
        self.processes[name] = self._children.start(f"{self.name}-{name}", words, port, env)

    async def wait_up(self) -> None:
        """Until the router says that all verifiers are up. Raises ChildError."""
        await self._healthy("router", self.router.port)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, EOFError, ValueError):
                if len(await self.verifiers()) == REPLICAS:
                    return
            await asyncio.sleep(LOOK_S)
        raise self.processes["router"].failed(f"does not have {REPLICAS} verifiers up")

    async def _healthy(self, name: str, port: int) -> None:
        child = self.processes[name]
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            child.check()
            with contextlib.suppress(OSError, EOFError):
                await get(port, "/health")
                return
            await asyncio.sleep(LOOK_S)
        raise child.failed(f"is not ready after {PATIENCE_S:.0f} s")

    async def kill(self, name: str) -> None:
        """kill -9, and wait for the end."""
        child = self.processes[name]
        child.process.kill()
        await asyncio.to_thread(child.process.wait)

    async def terminate(self, name: str) -> int:
        """SIGTERM, and wait for the end. Returns the exit status."""
        child = self.processes[name]
        child.process.terminate()
        return await asyncio.to_thread(child.process.wait)

    async def verifiers(self) -> dict[str, int]:
        """Ports of those that are up, by name. Raises OSError, EOFError or ValueError."""
        said = json.loads(await get(self.router.port, "/v1/replicas", OPERATOR))["replicas"]
        return {r["name"]: int(r["address"].rsplit(":", 1)[1]) for r in said if r["state"] == "up"}

    async def order(self, action: str) -> int:
        """Have the router do something with a replica. Returns the status."""
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
            url = f"http://127.0.0.1:{self.router.port}/v1/replicas{action}"
            headers = {"Authorization": f"Bearer {OPERATOR}"}
            return (await client.post(url, json={}, headers=headers)).status_code

    # --- what is seen of them

    def pid(self, name: str) -> int:
        return self.processes[name].process.pid

    def pids(self) -> dict[str, int]:
        """Of all that run, by name: router, edge, verifier-1, ..."""
        found = {n: c.process.pid for n, c in self.processes.items() if c.process.poll() is None}
        with contextlib.suppress(psutil.Error, KeyError):
            children = sorted(psutil.Process(found["router"]).children(), key=lambda p: p.create_time())
            found |= {f"verifier-{n}": p.pid for n, p in enumerate(children, 1)}
        return found

    def a_verifier(self, chance: random.Random) -> int:
        """The process id of one of them."""
        return chance.choice([pid for name, pid in self.pids().items() if name.startswith("verifier")])

    async def left(self) -> dict[str, float]:
        """What should be 0 once everybody has gone, as the processes' metrics have it."""
        found: dict[str, float] = {}
        for name, port in (await self.verifiers()).items():
            seen = read_page((await get(port, "/metrics")).decode())
            for what in (
                "num_requests_running",
                "num_requests_waiting",
                "num_requests_parked",
                "kv_cache_usage_perc",
            ):
                found[f"{name} {what}"] = seen[f"wisp:{what}"]
        seen = read_page((await get(self.router.port, "/metrics")).decode())
        found |= {f"router {k}": v for k, v in seen.items() if k.startswith("wisp:replica_sessions")}
        seen = read_page((await get(self.edge.port, "/metrics")).decode())
        found["edge num_requests_running"] = seen["wisp:num_requests_running"]
        return {name: value for name, value in found.items() if value}

    async def empty(self) -> dict[str, float]:
        """Wait until nothing is left. Returns what is left all the same."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            left = await self.left()
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(LOOK_S * 4)

    def complaints(self) -> list[str]:
        """Lines of logs that speak of an error, each kind once."""
        found: dict[str, str] = {}
        for child in self.processes.values():
            for line in child.log.read_text(errors="replace").splitlines():
                if any(bad in line for bad in ("Traceback", "ERROR", "CRITICAL")):
                    kind = "".join(c for c in line if not c.isdigit())[:160]
                    found.setdefault(kind, f"{child.name}: {line[:300]}")
        return list(found.values())


def a_key(chance: random.Random) -> str:
    """An honest one."""
    return chance.choice(HONEST)


def open_files(pid: int) -> int:
    """How many descriptors a process has open; 0 if it is gone."""
    try:
        return psutil.Process(pid).num_fds()
    except psutil.Error:
        return 0


def free_port() -> int:
    """One that nobody uses, with free ones above it for replicas, and below those that the system gives to outgoing
    connections: a process that was killed must find it free."""
    for port in random.Random().sample(range(20_000, 32_000, 10), 1_200):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for n in range(REPLICAS + 2):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + n))
            return port
    raise OSError("no free port between 20,000 and 32,000")
