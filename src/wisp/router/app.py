"""`wisp serve --replicas N`: several verifiers behind one address, as one ASGI app.

    /v1/sessions          WebSocket: edges, which are redirected to a replica
    /v1/chat/completions  and the rest of the OpenAI surface: thin clients, for whom this is the edge
    /v1/tokenizers/{fp}   the target's tokenizer
    /v1/replicas          what there is of replicas, and how to drain, restart and scale them: admin keys
    /v1/status            how the fleet is, and a stream of it, for the page at /: admin keys
    /  /assets            the page (`api.pages`), which asks for that key
    /health  /metrics     without a key

Tokens of edges never come through here: what a router costs is one decision per session.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from wisp.api.body import read_json
from wisp.api.errors import JsonResponse, error_response, exception_handlers, request_id
from wisp.api.keys import Keyring
from wisp.api.pages.site import FLEET, site_routes
from wisp.api.pages.stream import StatusStream, admins_only, status_routes
from wisp.api.paths import REPLICAS_PATH, SESSION_PATH
from wisp.api.routes import openai_routes, tokenizer_route
from wisp.api.scrape import scraped
from wisp.core.errors import RequestError, WispError
from wisp.router.fleet import Replica
from wisp.router.launch import Launcher
from wisp.router.replica import ReplicaSpec
from wisp.router.routing import Routing
from wisp.router.status import fleet_status
from wisp.server.crowd import Crowd
from wisp.server.sockets import SessionEndpoint

log = logging.getLogger("wisp.router")


class RouterApp:
    """The app and what lives behind it. Build it on the running event loop."""

    def __init__(self, spec: ReplicaSpec, replicas: int, launcher: Launcher, keys: Keyring) -> None:
        """`spec` is that of every replica, but for its name and token; its address is the router's."""
        self.keys = keys
        self._replicas = replicas
        named = functools.partial(_named, spec)
        self._routing = r = Routing(launcher, named, _tls(spec), keys, drain_s=spec.settings.drain_s)
        self.metrics, self.fleet, self.host, self.backend = r.metrics, r.fleet, r.host, r.backend
        self.status = StatusStream(self._snapshot)
        self.asgi = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                tokenizer_route(keys.caller, self._tokenizer),
                WebSocketRoute(SESSION_PATH, Crowd(SessionEndpoint(r.ready, keys.authorize), keys.authorize)),
                Route(REPLICAS_PATH, self._admin(self._list)),
                Route(f"{REPLICAS_PATH}/scale", self._admin(self._scale), methods=["POST"]),
                Route(f"{REPLICAS_PATH}/{{name}}/drain", self._admin(self._drain), methods=["POST"]),
                Route(f"{REPLICAS_PATH}/{{name}}/restart", self._admin(self._restart), methods=["POST"]),
                *site_routes(FLEET),
                *status_routes(self.status, admins_only(keys)),
                *openai_routes(
                    self.backend,
                    authorize=keys.caller,
                    observer=self.metrics,
                    options=spec.settings.api_options(),
                ),
            ],
            exception_handlers=exception_handlers(),
            lifespan=self._lifespan,
        )

    async def drain(self) -> None:
        """Take no new sessions; let every replica finish what it has, and end."""
        self.host.draining = True
        await self.fleet.stop()
        self.status.close()

    @property
    def failed(self) -> WispError | None:
        """Why this router can never serve."""
        return self.fleet.failed

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.fleet.add(self._replicas)
        watch = asyncio.create_task(self.keys.watch(self._routing.keys_changed))
        try:
            yield
        finally:
            watch.cancel()
            self.status.close()
            await self.backend.close()
            await self.fleet.close()

    # --- endpoints

    async def _snapshot(self, since: float) -> dict[str, Any]:
        return await fleet_status(self.fleet, since, draining=self.host.draining)

    async def _health(self, request: Request) -> Response:
        views = self.fleet.view()
        count = {"up": sum(v.state == "up" for v in views), "all": len(views)}
        if self.host.draining or not self.host.here:
            status = "draining" if self.host.draining else "loading"
            body: dict[str, object] = {"status": status, "replicas": count}
            return JsonResponse(body, status_code=503, headers={"retry-after": "2"})
        welcome, sessions = self.host.welcome(), sum(v.sessions for v in views)
        body = {"status": "ok", "model": welcome.model, "mode": welcome.mode, "digest": welcome.digest}
        return JsonResponse({**body, "sessions": sessions, "replicas": count})

    async def _metrics(self, request: Request) -> Response:
        welcome = self.fleet.welcome
        return scraped(request, self.metrics.registry, welcome.model if welcome else "", self.keys)

    async def _tokenizer(self, fingerprint: str) -> bytes:
        ours = self.host.welcome().fingerprint
        if fingerprint != ours:
            raise RequestError(404, f"this router's vocabulary is {ours}")
        return await self.backend.tokenizers.blob(ours)

    # --- operators

    def _admin(self, act: Callable[[Request], Awaitable[None]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that does something to the replicas and answers with how they are then."""

        async def endpoint(request: Request) -> Response:
            try:
                if not self.keys.is_admin(self.keys.caller(request)):
                    message = "this key may not manage replicas; give it `admin = true` in the key file"
                    raise RequestError(403, message, code="not_admin", type="permission_error")
                await act(request)
            except RequestError as error:
                return error_response(error, request_id(request))
            return JsonResponse({"launcher": self.fleet.launcher.name, "replicas": self.fleet.view()})

        return endpoint

    async def _list(self, request: Request) -> None:
        """Only to look."""

    async def _scale(self, request: Request) -> None:
        count = (await read_json(request)).get("replicas")
        if not isinstance(count, int) or isinstance(count, bool):
            raise RequestError(400, 'send {"replicas": N}', param="replicas")
        log.info("scaling to %d replicas", count)
        await self.fleet.scale(count)

    async def _drain(self, request: Request) -> None:
        await read_json(request)  # a page in somebody's browser cannot send JSON to a port of this machine
        await self.fleet.drain(request.path_params["name"])

    async def _restart(self, request: Request) -> None:
        await read_json(request)
        await self.fleet.restart(request.path_params["name"])


def _named(spec: ReplicaSpec, replica: Replica) -> ReplicaSpec:
    name, token, settings = replica.name, replica.token, spec.settings
    if settings.event_log is not None:  # a log is of one life: that is what replays
        log_ = settings.event_log.with_name(f"{settings.event_log.name}.{name}.{replica.lives}")
        settings = msgspec.structs.replace(settings, event_log=log_)
    return msgspec.structs.replace(spec, name=name, token=token, settings=settings)


def _tls(spec: ReplicaSpec) -> ssl.SSLContext | None:
    """Trusts exactly the certificate that the replicas show: their names are for edges, not for loopback."""
    if spec.listen.cert is None:
        return None
    context = ssl.create_default_context(cafile=str(spec.listen.cert))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
