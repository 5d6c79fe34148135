"""`wisp serve` as one ASGI app on one port.

    /v1/sessions          WebSocket: edges
    /v1/chat/completions  and the rest of the OpenAI surface: thin clients
    /v1/tokenizers/{fp}   the target's tokenizer, for edges
    /v1/status            how things are, and a stream of it, for the page at /: admin keys
    /  /assets            the page (`api.pages`), which asks for that key
    /health  /metrics     without a key; what keys have used is shown to them alone

The model loads in the background once the port is open; /health says 503 until it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from wisp.api.backend import Committed, Generation, Target
from wisp.api.errors import JsonResponse, exception_handlers
from wisp.api.generating import ApiOptions
from wisp.api.keys import Keyring
from wisp.api.observe import RequestRecord
from wisp.api.pages.site import FLEET, site_routes
from wisp.api.pages.stream import StatusStream, admins_only, status_routes
from wisp.api.paths import SESSION_PATH
from wisp.api.routes import openai_routes, tokenizer_route
from wisp.api.scrape import scraped
from wisp.core.errors import InternalError, RequestError, UnavailableError
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import Admission
from wisp.core.verify.cost import Coefficients
from wisp.engines.base import TargetEngine, Tokenizer
from wisp.server.control import control_routes
from wisp.server.crowd import Crowd
from wisp.server.defaults import DRAIN_S, MAX_SESSIONS, PARK_S
from wisp.server.host import VerifierHost
from wisp.server.sockets import SessionEndpoint
from wisp.server.status import loading_status, verifier_status
from wisp.server.thin import ThinBackend
from wisp.server.watchdog import LoopWatch

log = logging.getLogger("wisp.serve")

# Python's own 5 ms is as long as a small step: the engine's thread would wait for the loop that long.
SWITCH_S = 0.0005


class Settings(msgspec.Struct, frozen=True):
    """What an operator decides.

    model:          the name that clients use
    batching:       the batching policy, by name (`core.verify.batching`)
    max_sessions:   open at once; more are refused
    park_s:         seconds that a session outlives its edge
    drain_s:        seconds that sessions have to end, once the process is told to
    event_log:      the file that records every event; None: none does
    cost:           what the cost model starts from; None: it learns from the first step on
    slo_classes:    SLOs by the names that requests may say
    slo_admission:  refuse at once a request whose SLO could not be kept
    aliases, tool_parser: see `ApiOptions`
    depth:          steps given to the engine at a time
    history_tokens: of past texts, kept for drafts of the verifier's own; 0: none are
    """

    model: str
    batching: str = "wisp"
    max_sessions: int = MAX_SESSIONS
    park_s: float = PARK_S
    drain_s: float = DRAIN_S
    event_log: Path | None = None
    cost: Coefficients | None = None
    slo_classes: dict[str, Slo] = {}
    slo_admission: bool = True
    aliases: tuple[str, ...] = ()
    tool_parser: str = ""
    depth: int = 1
    history_tokens: int = 0

    def api_options(self) -> ApiOptions:
        """Of the OpenAI surface."""
        return ApiOptions(self.aliases, self.tool_parser, slo_classes=self.slo_classes)


class ServerApp:
    """The app and what lives behind it. `load` builds engine and tokenizer; it runs in a thread."""

    def __init__(
        self, settings: Settings, keys: Keyring, load: Callable[[], tuple[TargetEngine, Tokenizer]]
    ) -> None:
        self.settings = settings
        self.keys = keys
        self._load = load
        self._host: VerifierHost | None = None
        self._thin: ThinBackend | None = None
        self.failed: Exception | None = None
        self._ended = asyncio.Event()
        self._blob: bytes = b""
        self.status = StatusStream(self._snapshot)
        backend = _Late(self)
        self.asgi = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                tokenizer_route(keys.caller, self._tokenizer),
                WebSocketRoute(
                    SESSION_PATH, Crowd(SessionEndpoint(self.host, keys.authorize), keys.authorize)
                ),
                *openai_routes(backend, authorize=keys.caller, observer=self, options=settings.api_options()),
                *site_routes(FLEET),
                *status_routes(self.status, admins_only(keys)),
                *(control_routes(self.host, keys, settings.drain_s) if keys.router else []),
            ],
            exception_handlers=exception_handlers(),
            lifespan=self._lifespan,
        )

    def host(self) -> VerifierHost:
        """The verifier. Raises UnavailableError while the model loads, and once it has failed."""
        if self.failed is not None:
            raise UnavailableError("this verifier has failed, and ends", retry_after=2.0)
        if self._host is None:
            raise UnavailableError("the model is still loading", retry_after=2.0)
        return self._host

    @property
    def ready(self) -> bool:
        """Is the model loaded?"""
        return self._host is not None

    @property
    def loading(self) -> bool:
        """Does a thread load the model? It cannot be interrupted."""
        return self._host is None and self.failed is None

    def thin(self) -> ThinBackend:
        """The backend for thin clients. Raises UnavailableError while the model loads."""
        self.host()
        assert self._thin is not None
        return self._thin

    def request_finished(self, record: RequestRecord) -> None:
        """A thin client's request has ended (see `api.observe`). Edges count their own, where their users sit."""
        if self._host is not None:
            self._host.metrics.attainment.count(record)

    async def drain(self) -> None:
        """Take no new sessions and let the present ones end."""
        if self._host is not None:
            await self._host.drain(self.settings.drain_s)
        self.status.close()

    async def ended(self) -> None:
        """Returns when this server cannot serve (any more): `failed` says why its engine does not run."""
        await self._ended.wait()

    # --- start and stop

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._start()), asyncio.create_task(self.keys.watch(self._keys_changed))]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        watchdog = LoopWatch(asyncio.get_running_loop())
        try:
            yield
        finally:
            watchdog.stop()
            self.status.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._host is not None:
                await asyncio.to_thread(self._host.stop)

    async def _start(self) -> None:
        try:
            engine, tokenizer = await asyncio.to_thread(self._load)
            self._blob = await asyncio.to_thread(lambda: gzip.compress(tokenizer.blob(), 6))
            s = self.settings
            host = VerifierHost(
                engine,
                tokenizer,
                Admission(s.max_sessions, self.keys.limits),
                model=s.model,
                batching=s.batching,
                depth=s.depth,
                history_tokens=s.history_tokens,
                cost=s.cost,
                park_s=s.park_s,
                slo_admission=s.slo_admission,
                slo_classes=s.slo_classes,
                event_log=s.event_log,
                died=self._fail,
            )
            sys.setswitchinterval(SWITCH_S)
            self._thin = ThinBackend(host)
            self._host = host
        except Exception as error:
            self._fail(error)
            return
        info = engine.info
        log.info("serving %s: %s, %s mode, %d slots of %d tokens, %s batching",
                 s.model, info.engine, info.mode, info.slots, info.slot_tokens, s.batching)  # fmt: skip
        for note in info.notes:
            log.warning("%s", note)

    def _fail(self, error: Exception) -> None:
        self.failed = self.failed or error
        self._ended.set()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            log.critical("a task of this server failed, and the process has to end", exc_info=error)
            self._fail(InternalError(f"a task of this server failed: {error!r}; the log has the traceback"))

    def _keys_changed(self) -> None:
        if self._host is not None:
            self._host.limit(self.keys.limits)

    # --- endpoints

    async def _snapshot(self, since: float) -> dict[str, Any]:
        if self._host is None:
            return loading_status(self.settings.model, str(self.failed or ""))
        return verifier_status(self._host, since)

    async def _health(self, request: Request) -> Response:
        if self.failed or self._host is None or self._host.draining:
            status = "failed" if self.failed else "loading" if self._host is None else "draining"
            return JsonResponse({"status": status}, status_code=503, headers={"retry-after": "2"})
        host = self._host
        body = {"status": "ok", "model": host.model, "mode": host.info.mode, "digest": host.info.digest}
        return JsonResponse({**body, "sessions": host.n_sessions})

    async def _metrics(self, request: Request) -> Response:
        if self._host is None:
            return Response("", status_code=503)
        return scraped(request, self._host.metrics.registry, self.settings.model, self.keys)

    async def _tokenizer(self, fingerprint: str) -> bytes:
        ours = self.host().tokenizer.fingerprint
        if fingerprint != ours:
            raise RequestError(404, f"this verifier's vocabulary is {ours}")
        return self._blob


class _Late:
    """The thin backend, once there is one."""

    def __init__(self, app: ServerApp) -> None:
        self.app = app

    @property
    def context(self) -> int:
        return self.app.thin().context if self.app.ready else 0

    async def target(self) -> Target:
        return await self.app.thin().target()

    def admit(self, key: str) -> None:
        self.app.thin().admit(key)

    def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        return self.app.thin().generate(generation)
