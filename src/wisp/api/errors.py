"""Every error a client can see, in OpenAI's one shape: `{"error": {message, type, param, code}}`.

Exceptions are mapped here and nowhere else. An unexpected exception is logged with the request's id; the client gets
a bare `internal_error`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wisp.core.draft.refusals import busy_error
from wisp.core.errors import EngineError, ProtocolError, RequestError, UnavailableError
from wisp.core.verify.admission import Refusal

logger = logging.getLogger("wisp.api")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class JsonResponse(Response):
    """JSON by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def request_id(request: Request) -> str:
    """The caller's `x-request-id` if it is one that can go into a log line, otherwise a random one."""
    known = request.scope.get("wisp.request_id")
    if known is None:
        given = request.headers.get("x-request-id", "")
        known = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        request.scope["wisp.request_id"] = known
    return str(known)


def error_body(error: RequestError) -> dict[str, object]:
    """OpenAI's error object."""
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}


def error_response(
    error: RequestError, id_: str, body: Callable[[RequestError], object] = error_body
) -> Response:
    """The whole response to a request that ends in `error`. `body`: its shape."""
    headers = {"x-request-id": id_}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JsonResponse(body(error), status_code=error.status, headers=headers)


def to_request_error(exc: BaseException, id_: str) -> RequestError:
    """What the client is told of `exc`. Logs it, with its traceback, if it was not meant for the client."""
    if isinstance(exc, RequestError):
        return exc
    logger.error("request=%s failed unexpectedly", id_, exc_info=exc)
    if isinstance(exc, (EngineError, ProtocolError)):
        message, code = "The model engine failed on this request; it is safe to try again.", "engine_error"
    else:
        message, code = "Something went wrong on this server.", "internal_error"
    return RequestError(
        500, f"{message} The log has details under request id {id_}.", code=code, type="server_error"
    )


def shutting_down() -> UnavailableError:
    """The answer to requests that a shutdown refuses or cuts off."""
    return UnavailableError("this server is shutting down", retry_after=2.0)


def refusal_error(refusal: Refusal) -> RequestError:
    """The client's error for a request that admission refuses for now."""
    return busy_error(refusal.code, str(refusal), refusal.retry_after)


class ToldOfTheEnd:
    """ASGI middleware: a request that a shutdown cancels gets a 503.

    Without it the client has a 500 in plain text, and the log a traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if started or scope["type"] != "http":
                raise
            response = error_response(shutting_down(), request_id(Request(scope)))
            await response(scope, receive, send)


def model_not_found(asked: str, served: str) -> RequestError:
    message = f"The model `{asked}` does not exist here; this server serves `{served}`."
    return RequestError(404, message, code="model_not_found", param="model")


def context_length_exceeded(context: int, prompt: int, output: int, param: str) -> RequestError:
    """Prompt and output together do not fit. With output 0: the prompt alone leaves no room."""
    asked = f"{prompt + output} tokens ({prompt} in the prompt, {output} in the completion)"
    if not output:
        asked = f"a prompt of {prompt} tokens, which leaves no room for a completion"
    message = (
        f"This model's maximum context length is {context} tokens. However, you requested {asked}. "
        "Please shorten the prompt or ask for fewer tokens."
    )
    return RequestError(400, message, code="context_length_exceeded", param=param)


def too_long(context: int, fewest: int, param: str) -> RequestError:
    """The prompt was not read: from its size alone it has at least `fewest` tokens."""
    message = (
        f"This model's maximum context length is {context} tokens. However, your prompt has at least {fewest}: "
        "that many would have to be as long as the longest token there is. Please shorten it."
    )
    return RequestError(400, message, code="context_length_exceeded", param=param)


Handler = Callable[[Request, Exception], Awaitable[Response]]


def exception_handlers() -> Mapping[Any, Handler]:
    """For `Starlette(exception_handlers=...)`: its own 404, 405 and 500 in our shape."""
    return {HTTPException: _http_exception, RequestError: _any_exception, Exception: _any_exception}


async def _http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    path, method = request.url.path, request.method
    message, code = {
        404: (f"There is no {method} {path} here.{_versioned(request)}", "not_found"),
        405: (f"{path} does not take {method}.", "method_not_allowed"),
    }.get(exc.status_code, (exc.detail, ""))
    type_ = "server_error" if exc.status_code >= 500 else "invalid_request_error"
    response = error_response(
        RequestError(exc.status_code, message, code=code, type=type_), request_id(request)
    )
    response.headers.update(exc.headers or {})
    return response


def _versioned(request: Request) -> str:
    """A hint for clients whose base URL has no /v1, as some servers answer them."""
    scope = {**request.scope, "path": f"/v1{request.url.path}"}
    known = any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    return f" There is {scope['path']}: let the base URL end in /v1." if known else ""


async def _any_exception(request: Request, exc: Exception) -> Response:
    id_ = request_id(request)
    return error_response(to_request_error(exc, id_), id_)
