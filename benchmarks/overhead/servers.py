"""The two servers, as processes of their own: a verifier with the null engine, and a bare echo."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import httpx

from wisp.api.scrape import read_page
from wisp.children import Child, serving
from wisp.sim.serving import cpu_s

START_S = 120.0  # for a process to answer


class Server:
    """A child process and the address of its socket."""

    def __init__(self, child: Child, path: str) -> None:
        self.child = child
        self.url = child.url.replace("http", "ws", 1) + path

    def cpu_s(self) -> float:
        """CPU time so far, user and system, all threads; nan where there is no /proc."""
        seconds = cpu_s(self.child.process.pid)
        return math.nan if seconds is None else seconds


@contextlib.contextmanager
def started(name: str, arguments: Callable[[int], list[str]], path: str) -> Iterator[Server]:
    """`python ARGUMENTS`, which takes sessions at `path`. Raises ChildError if it does not start."""
    with serving(name, lambda port, _: arguments(port), START_S) as child:
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
