"""The two servers, as processes of their own: a verifier with the null engine, and a bare echo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from wisp.api.scrape import read_page
from wisp.children import Child, Children, free_ports

START_S = 120.0  # for a process to answer


class Server:
    """A child process and the address of its socket."""

    def __init__(self, child: Child, path: str) -> None:
        self.child = child
        self.url = child.url.replace("http", "ws", 1) + path

    def cpu_s(self) -> float:
        """CPU time so far, user and system, all threads; nan where there is no /proc."""
        try:
            stat = Path(f"/proc/{self.child.process.pid}/stat").read_text()
        except OSError:
            return float("nan")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(name: str, arguments: Callable[[int], list[str]], path: str) -> Iterator[Server]:
    """Run `python <arguments(port)>` on a free port, and wait until it takes sessions. Raises ChildError."""
    (port,) = free_ports(1)
    with Children() as children:
        child = children.start(name, arguments(port), port)
        with httpx.Client(trust_env=False) as client:
            child.wait_healthy(client, START_S)
        yield Server(child, path)


def verifier(sessions: int) -> contextlib.AbstractContextManager[Server]:
    """`wisp serve` with the null engine."""
    flags = ["--engine", "null", "--target", "null", "--log-level", "warning", "--drain-s", "0"]
    room = ["--max-sessions", str(2 * sessions + 64)]
    serve = ["-m", "wisp.cli", "serve", *flags, *room, "--port"]
    return started("verifier", lambda port: [*serve, str(port)], "/v1/sessions")


def echo(reply_bytes: int) -> contextlib.AbstractContextManager[Server]:
    """A bare `websockets` server that answers every frame with `reply_bytes` bytes."""
    return started("echo", lambda port: ["-m", "benchmarks.overhead.echo", str(port), str(reply_bytes)], "/")


async def steps(server: Server) -> tuple[float, float]:
    """Engine steps and slices of a verifier so far."""
    async with httpx.AsyncClient(trust_env=False) as client:
        values = read_page((await client.get(f"{server.child.url}/metrics")).text)
    return values["wisp:engine_step_seconds_count"], values["wisp:engine_slices_total"]
