"""`wisp edge` as an ASGI app: the OpenAI surface on the device, a page to try it, /health and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from wisp.api.errors import JsonResponse, exception_handlers
from wisp.api.generating import ApiOptions
from wisp.api.keys import Keyring
from wisp.api.pages.site import PLAYGROUND, site_routes
from wisp.api.pages.stream import StatusStream, status_routes
from wisp.api.routes import openai_routes
from wisp.api.scrape import scraped
from wisp.core.draft.patience import GIVE_UP_S
from wisp.core.draft.policies import Ahead, Policies
from wisp.edge.backend import EdgeBackend
from wisp.edge.customers import Customers
from wisp.edge.link import VerifierLink
from wisp.edge.metrics import EdgeMetrics
from wisp.edge.status import edge_status
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.base import DraftEngine

_DEFAULTS = ApiOptions()


class EdgeApp:
    """The app with its connection, backend, keys and metrics."""

    def __init__(
        self,
        server: str,
        *,
        api_key: str | None,
        keys: Keyring,
        drafter: DraftEngine | None,
        fingerprint: str,
        policies: Policies,
        ahead: Ahead | None = None,
        give_up_s: float = GIVE_UP_S,
        history_tokens: int = 0,
        options: ApiOptions = _DEFAULTS,
    ) -> None:
        """`fingerprint`: of the draft model's vocabulary; "" if none is loaded. `history_tokens`: of past answers, for
        drafts; 0: none are kept.
        """
        self.keys = keys
        self.link = VerifierLink(server, api_key, fingerprint=fingerprint, give_up_s=give_up_s)
        self.backend = EdgeBackend(
            self.link, TokenizerCache(server, api_key), drafter, policies, ahead, history_tokens
        )
        self.customers = Customers(self.backend, keys)
        self.metrics = EdgeMetrics(self.backend)
        self.status = StatusStream(self._snapshot)
        self.asgi = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                *site_routes(PLAYGROUND),
                *status_routes(self.status, keys.caller),
                *openai_routes(
                    self.customers,
                    options=options,
                    authorize=keys.caller,
                    observer=self.metrics,
                ),
            ],
            exception_handlers=exception_handlers(),
            lifespan=self._lifespan,
        )

    async def drain(self) -> None:
        """Nothing to wait for: open answers end with the process, by design."""
        self.status.close()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.link.start()
        watch = asyncio.create_task(self.keys.watch(self._keys_changed))
        try:
            yield
        finally:
            watch.cancel()
            self.status.close()
            await self.link.close()
            self.backend.close()

    def _keys_changed(self) -> None:
        revoked, new = self.customers.limits_changed()
        self.backend.customers_changed(revoked, new)

    async def _snapshot(self, since: float) -> dict[str, Any]:
        return edge_status(self.backend, self.link.problem or "connecting", self.link.url)

    async def _health(self, request: Request) -> Response:
        welcome = self.link.welcome
        if welcome is None:
            problem = self.link.problem or "connecting"
            return JsonResponse({"status": "no verifier", "problem": problem}, status_code=503)
        body = {"status": "ok", "model": welcome.model, "mode": welcome.mode, "digest": welcome.digest}
        return JsonResponse(body)

    async def _metrics(self, request: Request) -> Response:
        welcome = self.link.welcome
        return scraped(request, self.metrics.registry, welcome.model if welcome else "", self.keys)
