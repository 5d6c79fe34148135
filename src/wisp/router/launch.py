"""Starting replicas: the seam between a router and where its replicas run, and the launcher for this machine.

A launcher starts a replica and hands over a `Running`; `router.fleet` decides what to do with it and when to start
another in its place. Here a replica is a child process. `router.ray_launcher` has the other kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from typing import Protocol

from wisp.router.replica import ReplicaSpec, listen_above

log = logging.getLogger("wisp.router")


class Running(Protocol):
    """A replica that was started. It may be loading its model yet.

    address: where edges find it, as `messages.Redirect` has it. url: where the router finds it.
    """

    address: str
    url: str

    async def ended(self) -> str:
        """Wait for its end. Returns how it ended, in words."""

    def stop(self) -> None:
        """Let it finish what it has, and end. May be said again."""

    def kill(self) -> None:
        """End it now."""


class Launcher(Protocol):
    """Starts replicas. `name` is what operators call it."""

    name: str

    async def start(self, spec: ReplicaSpec) -> Running:
        """Start one. `spec.listen` is the router's own address. Raises WispError."""

    def close(self) -> None: ...


class LocalLauncher:
    """Replicas as child processes, on the ports above the router's."""

    name = "local"

    def __init__(self) -> None:
        self._children: list[_Child] = []
        self._starting: set[int] = set()  # ports

    async def start(self, spec: ReplicaSpec) -> Running:
        """Start a process. Its log goes where ours goes."""
        self._children = [child for child in self._children if child.process.returncode is None]
        host = spec.listen.host
        taken = self._starting | {child.port for child in self._children}
        with listen_above(host, spec.listen.port, taken) as probe:
            port = int(probe.getsockname()[1])
        self._starting.add(port)  # until it is a child's
        try:
            child = await self._start(spec.on(host, port))
        finally:
            self._starting.discard(port)
        self._children.append(child)
        return child

    async def _start(self, spec: ReplicaSpec) -> _Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "wisp.router.replica",
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the router, which tells them
        )
        assert process.stdin is not None
        process.stdin.write(spec.encode())  # and it stays open for as long as we live
        listen = spec.listen
        child = _Child(process, listen.host, listen.port, tls=listen.cert is not None)
        log.info("replica %s is process %d, at %s", spec.name, process.pid, child.url)
        return child

    def close(self) -> None:
        for child in self._children:
            child.kill()


class _Child:
    def __init__(self, process: asyncio.subprocess.Process, host: str, port: int, *, tls: bool) -> None:
        self.process = process
        self.port = port
        self._stopped = False
        self.address = f":{port}"
        self.url = own_url(host, port, tls=tls)

    async def ended(self) -> str:
        code = await self.process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def stop(self) -> None:
        if self._stopped:
            return  # a second signal would end it at once
        self._stopped = True
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


def own_url(host: str, port: int, *, tls: bool) -> str:
    """How one reaches, on this machine, what listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
