"""The two servers, as processes of their own: a verifier with the null engine, and a bare echo."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from wisp.core.errors import UnavailableError

START_S = 30.0  # for a process to answer


class Server:
    """A server process on a port of this machine."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, path: str) -> None:
        self.process = process
        self.url = f"ws://127.0.0.1:{port}{path}"
        self.http = f"http://127.0.0.1:{port}"

    def cpu_s(self) -> float:
        """CPU time so far, user and system, all threads; nan where there is no /proc."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return float("nan")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(arguments: Callable[[int], list[str]], path: str) -> Iterator[Server]:
    """Run `python <arguments(port)>` on a free port, without this process's WISP settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WISP_")}
    process = subprocess.Popen([sys.executable, *arguments(port)], env=environment)
    try:
        yield Server(process, port, path)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def verifier(sessions: int) -> contextlib.AbstractContextManager[Server]:
    """`wisp serve` with the null engine."""
    flags = ["--engine", "null", "--target", "null", "--log-level", "warning", "--drain-s", "0"]
    room = ["--max-sessions", str(2 * sessions + 64)]
    return started(
        lambda port: ["-m", "wisp.cli", "serve", *flags, *room, "--port", str(port)], "/v1/sessions"
    )


def echo(reply_bytes: int) -> contextlib.AbstractContextManager[Server]:
    """A bare `websockets` server that answers every frame with `reply_bytes` bytes."""
    return started(lambda port: ["-m", "wisp.lab.overhead", str(port), str(reply_bytes)], "/")


async def ready(server: Server) -> None:
    """Wait until `server` can take sessions. Raises UnavailableError if it does not come up."""
    deadline = time.monotonic() + START_S
    async with httpx.AsyncClient(trust_env=False) as client:
        while time.monotonic() < deadline and server.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{server.http}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
    raise UnavailableError("a server for the benchmark did not start")


async def steps(server: Server) -> tuple[float, float]:
    """Engine steps and slices of a verifier so far."""
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"{server.http}/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return float(values["wisp:engine_step_seconds_count"]), float(values["wisp:engine_slices_total"])
