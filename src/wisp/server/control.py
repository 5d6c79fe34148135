"""The paths by which a router controls its replicas: it asks for reports, and has sessions sent away.

    GET  /v1/replica        a Report
    POST /v1/replica/move   take no more sessions, send away those that can go, wait for the others

Only who holds the router's token is answered; a verifier without a router does not have these paths.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from wisp.api.errors import JsonResponse, error_response, request_id
from wisp.api.keys import Keyring
from wisp.core.errors import RequestError
from wisp.core.protocol.messages import Welcome
from wisp.core.verify.admission import KeyUsage
from wisp.server.host import VerifierHost

REPORT_PATH = "/v1/replica"
MOVE_PATH = "/v1/replica/move"


class Report(msgspec.Struct, frozen=True):
    """How a replica is. `sessions` keep their place (`core.verify.places`); `keys` is usage since its start."""

    sessions: int
    slots: int
    max_sessions: int
    kv_tokens: int
    welcome: Welcome
    keys: dict[str, KeyUsage] = {}


def control_routes(host: Callable[[], VerifierHost], keys: Keyring, drain_s: float) -> list[Route]:
    """The routes. `host` raises UnavailableError while the model loads."""

    async def report(request: Request) -> Response:
        try:
            _check(request, keys)
            return JsonResponse(report_of(host()))
        except RequestError as error:
            return error_response(error, request_id(request))

    async def move(request: Request) -> Response:
        try:
            _check(request, keys)
            moved = host().move()
        except RequestError as error:
            return error_response(error, request_id(request))
        await host().drain(drain_s)
        return JsonResponse({"moved": moved})

    return [Route(REPORT_PATH, report), Route(MOVE_PATH, move, methods=["POST"])]


def report_of(host: VerifierHost) -> Report:
    verifier = host.verifier
    return Report(
        verifier.kept_places(asyncio.get_running_loop().time()),
        host.limits.slots,
        verifier.admission.max_sessions,
        host.limits.kv_tokens,
        host.welcome(),
        verifier.admission.usage,
    )


def _check(request: Request, keys: Keyring) -> None:
    if keys.speaks_for(request.headers.get("authorization")) is None:
        raise RequestError(404, "There is no such path here.", code="not_found")
