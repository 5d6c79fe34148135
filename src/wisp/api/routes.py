"""The OpenAI surface, and Anthropic's messages, as Starlette routes over any `Backend`."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from wisp.api import responses
from wisp.api.anthropic_format import AnthropicFormat
from wisp.api.anthropic_request import count_tokens, parse_anthropic
from wisp.api.backend import Backend, Target
from wisp.api.body import Bodies, body_limit, parsed, read_body
from wisp.api.errors import JsonResponse, error_body, error_response, request_id, to_request_error
from wisp.api.exchange import CLIENT_CLOSED
from wisp.api.fields import Fields
from wisp.api.formats import ChatFormat, CompletionFormat
from wisp.api.generating import ApiOptions, Authorize, Generating, Service, bearing
from wisp.api.observe import Observer
from wisp.api.paths import TOKENIZER_PATH
from wisp.api.prepare import PromptWork
from wisp.api.requests import parse_chat, parse_completion
from wisp.api.responses import Json
from wisp.api.responses_format import ResponsesFormat
from wisp.api.responses_request import parse_response
from wisp.api.sse import ClientGoneError, unless_gone
from wisp.api.tokens import apply_template, detokenize, tokenize, tokenizer_info
from wisp.core.errors import RequestError
from wisp.engines.base import Check

_DEFAULTS = ApiOptions()
Endpoint = Callable[[Request], Awaitable[Response]]
TokenWork = Callable[[Json, Target, Check], Json]


def openai_routes(
    backend: Backend,
    *,
    options: ApiOptions = _DEFAULTS,
    authorize: Authorize | None = None,
    observer: Observer | None = None,
) -> list[Route]:
    """Routes for models, all endpoints that generate, and tokens.

    The application should also be given `errors.exception_handlers()`, for paths and methods that do not exist.
    """
    service = Service(backend, PromptWork(), Bodies(), options, authorize, observer)
    endpoints = (
        ("/v1/chat/completions", Generating(service, "chat.completions", parse_chat, ChatFormat)),
        ("/v1/completions", Generating(service, "completions", parse_completion, CompletionFormat)),
        ("/v1/responses", Generating(service, "responses", parse_response, ResponsesFormat)),
        ("/v1/messages", Generating(service, "messages", parse_anthropic, AnthropicFormat)),
    )
    return [
        *_model_routes(service),
        *_token_routes(service),
        *(Route(path, app, methods=["POST"], name=path) for path, app in endpoints),
    ]


def tokenizer_route(authorize: Authorize, blob: Callable[[str], Awaitable[bytes]]) -> Route:
    """The target's tokenizer, for edges. `blob` gives it, gzipped, for a fingerprint, or raises RequestError."""

    async def endpoint(request: Request) -> Response:
        try:
            authorize(request)
            content = await blob(request.path_params["fingerprint"])
        except RequestError as error:
            return error_response(error, request_id(request))
        headers = {"content-encoding": "gzip", "cache-control": "max-age=31536000, immutable"}
        return Response(content, media_type="application/octet-stream", headers=headers)

    return Route(f"{TOKENIZER_PATH}/{{fingerprint}}", endpoint)


def _token_routes(service: Service) -> list[Route]:
    def endpoint(work: TokenWork, error_of: Callable[[RequestError], Json]) -> Endpoint:
        async def answer(request: Request) -> Response:
            id_ = request_id(request)
            try:
                found = await _tokens(service, request, work)
            except (ClientDisconnect, ClientGoneError):
                return Response(status_code=CLIENT_CLOSED)  # which nobody reads
            except Exception as exc:
                return error_response(to_request_error(exc, id_), id_, error_of)
            return JsonResponse(found, headers={"x-request-id": id_})

        return answer

    works: dict[str, TokenWork] = {
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/apply-template": apply_template,
    }
    return [
        *(Route(path, endpoint(work, error_body), methods=["POST"]) for path, work in works.items()),
        Route("/v1/messages/count_tokens", endpoint(count_tokens, AnthropicFormat.error), methods=["POST"]),
    ]


async def _tokens(service: Service, request: Request, work: TokenWork) -> Json:
    """What `work` finds for a request. Raises RequestError, ClientDisconnect and ClientGoneError."""
    key = service.authorize(bearing(request)) if service.authorize is not None else ""
    with service.bodies.of(key) as held:
        body = await read_body(request, body_limit(service.backend.context), held)

        async def worked() -> Json:
            service.backend.admit(key)
            admit = functools.partial(service.backend.admit, key)
            fields = await parsed(body, lambda found: found, key)
            target = await service.backend.target()
            service.name(Fields(fields).string("model") or "", target)
            return await service.prompts.run(key, admit, functools.partial(work, fields, target))

        return await unless_gone(request.receive, worked())


def _model_routes(service: Service) -> list[Route]:
    def guarded(answer: Callable[[Request, Target], Json]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            id_ = request_id(request)
            try:
                if service.authorize is not None:
                    service.authorize(bearing(request))
                body = answer(request, await service.backend.target())
            except Exception as exc:
                return error_response(to_request_error(exc, id_), id_)
            return JsonResponse(body, headers={"x-request-id": id_})

        return endpoint

    def retrieve(request: Request, target: Target) -> Json:
        return responses.model_object(target, service.name(request.path_params["id"], target))

    def listed(request: Request, target: Target) -> Json:
        return responses.model_list(target, service.options.aliases)

    return [
        Route("/v1/models", guarded(listed), methods=["GET"]),
        Route("/v1/models/", guarded(listed), methods=["GET"]),  # otherwise a model without a name
        Route("/v1/models/{id:path}", guarded(retrieve), methods=["GET"]),
        Route("/tokenizer_info", guarded(lambda _, target: tokenizer_info(target)), methods=["GET"]),
    ]
