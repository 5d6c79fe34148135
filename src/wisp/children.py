"""Child processes that serve HTTP on loopback: their logs are in a folder, and they always end with this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

import httpx

from wisp.core.errors import WispError

T = TypeVar("T")

START_S = 180.0  # a large model on a slow disk
STOP_S = 8.0  # between SIGTERM and SIGKILL
_KEPT = frozenset({"WISP_CACHE", "WISP_OFFLINE"})  # other variables are meant for the user's own processes


class ChildError(WispError):
    """A child process ended too early, or does not answer."""


@dataclass
class Child:
    """One process. `url` is where it serves, e.g. http://127.0.0.1:43210."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raises ChildError if the process has ended."""
        code = self.process.poll()
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise self.failed(how)

    def failed(self, what: str) -> ChildError:
        """An error with `what` happened, and the end of the log."""
        return ChildError(f"the {self.name} {what}. Its log ({self.log}) ends:\n{self.tail()}")

    def tail(self) -> str:
        """The last 15 lines of the log, indented."""
        text = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(f"    {line}" for line in text) or "    (nothing was logged)"

    def wait_healthy(self, client: httpx.Client, timeout_s: float = START_S) -> dict[str, Any]:
        """Poll /health until its status is 200, and return its body. Raises ChildError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(httpx.TransportError):
                answer = client.get(f"{self.url}/health", timeout=5.0)
                if answer.status_code == 200:
                    body: dict[str, Any] = answer.json()
                    return body
            time.sleep(0.05)
        raise self.failed(f"is not ready after {timeout_s:.0f} s")


class Children:
    """A context that children do not outlive, even if it is left by Ctrl-C or SIGTERM.

    The folder with the logs goes, too, unless it is left by an error.
    """

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> Children:
        self.folder = Path(tempfile.mkdtemp(prefix="wisp-children-"))
        self._signals.enter_context(_termination_unwinds())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop()
        finally:
            self._signals.close()
            if kind is None or not issubclass(kind, Exception):
                shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self, name: str, arguments: Sequence[str], port: int, env: Mapping[str, str] | None = None
    ) -> Child:
        """Start `python ARGUMENTS`, which is to serve on `port` of the loopback address, with `env` besides ours.

        One that is started again under the same name goes on with the same log.
        """
        log = self.folder / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment() | dict(env or {}),
            )
        child = Child(name, f"http://127.0.0.1:{port}", process, log)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildError if any child has ended."""
        for child in self._children:
            child.check()

    def _stop(self) -> None:
        """SIGTERM to each, the latest first, so that clients go before their servers; then SIGKILL."""
        deadline = time.monotonic() + STOP_S
        try:
            for child in reversed(self._children):
                child.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # a second Ctrl-C comes here at once
            for child in self._children:
                child.process.kill()
                child.process.wait()


@contextlib.contextmanager
def serving(
    name: str, arguments: Callable[[int, Path], Sequence[str]], timeout_s: float = START_S
) -> Iterator[Child]:
    """One child, once it answers /health, until the context is left. `arguments` makes those of `python`: from a free
    port, and a folder for files that the child reads. Raises ChildError."""
    (port,) = free_ports(1)
    with Children() as children, httpx.Client(trust_env=False) as client:
        child = children.start(name, arguments(port, children.folder), port)
        child.wait_healthy(client, timeout_s)
        yield child


def run_beside(runner: asyncio.Runner, work: Coroutine[Any, Any, T]) -> T:
    """`runner.run(work)` among children: SIGTERM and SIGHUP cancel it, and then end this process.

    The exception that they raise otherwise is lost where uvloop has called.
    """
    told: list[int] = []

    async def main() -> T:
        cancel, loop = cast("asyncio.Task[T]", asyncio.current_task()).cancel, asyncio.get_running_loop()

        def leave(number: int, frame: FrameType | None) -> None:
            told.append(number)
            loop.call_soon_threadsafe(cancel)

        with _told(leave):
            return await work

    try:
        return runner.run(main())
    finally:
        if told:
            raise SystemExit(128 + told[0])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _environment() -> dict[str, str]:
    """The children's environment: no settings meant for other processes, and no proxy on the way to loopback."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WISP_") or k in _KEPT}
    return kept | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP, which would end this process at once, into SystemExit."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _told(leave):
        yield


@contextlib.contextmanager
def _told(leave: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGTERM and SIGHUP call `leave`, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGTERM", "SIGHUP")  # the second is not everywhere
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
