"""One replica: the app of `wisp serve`, with the token of its router. Every launcher runs this.

As a program (`python -m wisp.router.replica`) it reads its ReplicaSpec from standard input, one line of JSON, and
drains and ends when that input does: so it does not outlive its router, and a router that crashes cuts nobody off.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `wisp.cli`

import msgspec

from wisp.api.keys import Keyring
from wisp.api.logs import set_up_logging
from wisp.api.process import Listen, event_loop_factory, run_app
from wisp.api.tracing import set_up_tracing
from wisp.core.errors import ConfigError, WispError
from wisp.engines.build import load_target
from wisp.server.app import ServerApp, Settings

PORTS = 256  # how far above the router's port replicas look for one


class ReplicaSpec(msgspec.Struct, frozen=True):
    """All that a replica has to know. `engine` are the arguments of `load_target`; `token` is its router's."""

    name: str
    target: str
    engine: dict[str, Any]
    settings: Settings
    listen: Listen
    token: str
    key_file: Path | None = None
    secrets: str | None = None
    log_level: str = "info"
    log_format: str = "text"

    def encode(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    @staticmethod
    def decode(line: bytes) -> ReplicaSpec:
        return msgspec.json.decode(line, type=ReplicaSpec, dec_hook=lambda kind, value: kind(value))

    def on(self, host: str, port: int) -> ReplicaSpec:
        listen = msgspec.structs.replace(self.listen, host=host, port=port)
        return msgspec.structs.replace(self, listen=listen)


async def run_replica(
    spec: ReplicaSpec,
    stopped: Callable[[], Awaitable[None]],
    *,
    signals: bool = True,
    bound: socket.socket | None = None,
) -> None:
    """Serve until `stopped` returns. Raises what kept the model from loading."""
    keys = Keyring(spec.key_file, spec.secrets, spec.token)
    server = ServerApp(spec.settings, keys, lambda: load_target(spec.target, **spec.engine))
    run = functools.partial(run_app, keyed=bool(keys), stopped=stopped, signals=signals, bound=bound)
    await run(server.asgi, spec.listen, server.drain, server.ended, loading=lambda: server.loading)
    if server.failed is not None:
        raise server.failed


def listen_above(host: str, port: int, taken: Collection[int] = ()) -> socket.socket:
    """A socket that listens on the first free port above `port`. Raises ConfigError if there is none near."""
    for candidate in range(port + 1, min(port + 1 + PORTS, 65536)):
        if candidate in taken:
            continue
        probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, candidate))
            probe.listen(1024)
        except OSError:
            probe.close()
            continue
        return probe
    raise ConfigError(f"no free port for a replica in the {PORTS} above {port}; choose another --port")


def main() -> None:
    line = sys.stdin.buffer.readline()
    if not line:  # the router went before it had told us anything
        return
    spec = ReplicaSpec.decode(line)
    set_up_logging(spec.log_level, form=spec.log_format, who=spec.name)
    set_up_tracing("wisp-serve")

    async def serve() -> None:
        over = asyncio.Event()
        loop = asyncio.get_running_loop()

        def watch() -> None:
            os.read(sys.stdin.fileno(), 1)  # nothing more is said: this is its end
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(over.set)

        threading.Thread(target=watch, name="router", daemon=True).start()

        async def stopped() -> None:
            await over.wait()

        await run_replica(spec, stopped)

    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            runner.run(serve())
    except WispError as error:
        print(f"wisp: replica {spec.name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
