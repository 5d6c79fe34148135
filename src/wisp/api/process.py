"""Running an ASGI app as a process: binding, TLS, and a drain on SIGTERM. Shared by `serve` and `edge`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import uvicorn
from starlette.types import ASGIApp

from wisp.api.addresses import Addresses, raise_descriptors
from wisp.api.connections import HttpConnection, SessionConnection
from wisp.api.errors import ToldOfTheEnd
from wisp.api.http import KEEP_ALIVE_S
from wisp.api.web_guard import WebGuard, cross_origin, is_loopback
from wisp.core.errors import ConfigError
from wisp.core.protocol.messages import FRAME_EXTRA

log = logging.getLogger("wisp")


class Listen(msgspec.Struct, frozen=True):
    """Where to listen, and for whom. `cert` and `key` are PEM files; both or neither.

    allowed_hosts: names besides loopback's that clients without a key may call this process by
    keep_alive_s: how long an idle HTTP connection is kept for its client's next request
    origins: web pages that may use this process from a browser, as browsers write them
    """

    host: str = "127.0.0.1"
    port: int = 8100
    cert: Path | None = None
    key: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    keep_alive_s: float = KEEP_ALIVE_S
    origins: tuple[str, ...] = ()

    def check(self, *, keyed: bool) -> None:
        """Raises ConfigError where others could reach this process without a key, or a file is missing."""
        if not keyed and not is_loopback(self.host):
            raise ConfigError(
                f"refusing to listen on {self.host} without an API key: others could use this machine. "
                "Give --api-keys FILE (or WISP_API_KEYS), or listen on 127.0.0.1"
            )
        if (self.cert is None) != (self.key is None):
            raise ConfigError("TLS needs both a certificate and its key: --tls-cert FILE --tls-key FILE")
        for file in (self.cert, self.key):
            if file is not None and not file.is_file():
                raise ConfigError(f"no such TLS file: {file}")

    def try_port(self) -> None:
        """Bind, and let go again. Raises ConfigError where that fails: said before a model is loaded or waited for."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot listen on {self.host}: {reason}; mend --host") from None
        bound, away = 0, None
        for family, kind, protocol, _, address in found:
            try:
                tried = socket.socket(family, kind, protocol)
            except OSError:  # a family that this machine does not have: asyncio passes it over, too
                continue
            with tried:
                tried.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix"
                )  # as asyncio does
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, True)
                try:
                    tried.bind(address)
                    bound += 1
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL:
                        raise ConfigError(_not_listening(self.host, self.port, error)) from None
                    away = error  # such as ::1 where IPv6 is switched off: another address of the host may do
        if away is not None and not bound:
            raise ConfigError(_not_listening(self.host, self.port, away))


def _not_listening(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"cannot listen on {host}:{port}: it is taken; choose another with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"cannot listen on {host}: it is no address of this machine; mend --host"
    return f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --port"


class _Server(uvicorn.Server):
    """Uvicorn, but signals are ours: the first asks for a drain, the second ends at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def uvicorn_config(app: ASGIApp, listen: Listen, *, keyed: bool) -> uvicorn.Config:
    """How `app` is served: what every port of ours has in common."""
    if listen.origins:
        app = cross_origin(app, listen.origins)
    hosts = {listen.host, *listen.allowed_hosts}
    guarded = ToldOfTheEnd(WebGuard(app, keyed=keyed, hosts=hosts, origins=listen.origins))
    return uvicorn.Config(
        guarded,
        host=listen.host,
        port=listen.port,
        ssl_certfile=listen.cert,
        ssl_keyfile=listen.key,
        log_config=None,
        access_log=False,
        lifespan="on",
        http=functools.partial(HttpConnection, addresses=Addresses()),  # type: ignore[arg-type] # called alone
        timeout_keep_alive=listen.keep_alive_s,  # type: ignore[arg-type] # any number will do
        ws=SessionConnection,
        ws_max_size=FRAME_EXTRA,  # until the application says what it takes
        ws_per_message_deflate=False,
        ws_ping_interval=10.0,
        ws_ping_timeout=20.0,
        timeout_graceful_shutdown=5,
        server_header=False,
    )


async def run_app(
    app: ASGIApp,
    listen: Listen,
    drain: Callable[[], Awaitable[None]],
    ended: Callable[[], Awaitable[None]] | None = None,
    *,
    keyed: bool,
    stopped: Callable[[], Awaitable[None]] | None = None,
    signals: bool = True,
    at_once: Callable[[], None] = lambda: None,
    loading: Callable[[], bool] = lambda: False,
    bound: socket.socket | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `ended`, then `drain`, then stop. Raises ConfigError if the port is taken.

    keyed: `app` asks every caller for a key; otherwise web pages are kept out here.
    stopped: returns when a stop is wanted for another reason than a signal. `at_once` is called before an end
    without a drain. Without `signals` none are looked at: then this may run in any thread. `loading`: does a thread
    load a model? A stop does not wait for it, and ends the process. `bound` is a socket that listens there already.
    """
    raise_descriptors()
    config = uvicorn_config(app, listen, keyed=keyed)
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"cannot use the TLS files {listen.cert} and {listen.key}: {error}. Both have to be PEM, and the key the "
            "certificate's own"
        ) from None
    server = _Server(config)
    stopping = False

    def stop_once() -> None:
        if not stopping:
            stop()

    def stop() -> None:
        nonlocal stopping
        if stopping:
            log.warning("ending at once, with whatever is open")
            at_once()
            _exit(1)  # a step of the engine may take long yet, and cannot be interrupted
        stopping = True
        log.info("stopping: draining; a second signal ends at once")
        task = asyncio.ensure_future(drain())
        task.add_done_callback(lambda _: setattr(server, "should_exit", True))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
        loop.add_signal_handler(number, stop)
    asked = asyncio.ensure_future(stopped()) if stopped is not None else None
    if asked is not None:
        asked.add_done_callback(lambda task: None if task.cancelled() else stop_once())
    watcher = asyncio.ensure_future(ended()) if ended is not None else None
    if watcher is not None:
        watcher.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve([bound] if bound is not None else None)
        if asked is not None:
            asked.cancel()
        if signals and loading():
            _exit(0)
    except SystemExit:
        message = f"cannot listen on {listen.host}:{listen.port}; is it taken? choose another with --port"
        if signals and loading():
            print(f"wisp: {message}", file=sys.stderr)
            _exit(2)
        raise ConfigError(message) from None


def _exit(status: int) -> NoReturn:
    """End, whatever the threads do. Threads in native code neither listen nor survive an orderly end of the process."""
    logging.shutdown()
    os._exit(status)


def event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop where it exists (about half the time per message), otherwise asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop

    def new_event_loop() -> asyncio.AbstractEventLoop:
        loop = uvloop.new_event_loop()
        loop.set_exception_handler(_not_unheard_names)
        return loop

    return new_event_loop


def _not_unheard_names(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Where a name is looked up for longer than a connection may take, uvloop logs the failure that nobody waits for
    any more, as an error. Why there is no connection has been said by then.
    """
    if not isinstance(context.get("exception"), socket.gaierror):
        loop.default_exception_handler(context)
