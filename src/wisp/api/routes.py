"""The OpenAI endpoints as Starlette routes over any `Backend`.

A generating request is one straight line: authorize, read, parse, prepare, generate, answer. It ends early in
exactly three ways: a RequestError becomes the response (or, once a stream has begun, its last event), a
client that leaves cancels the generation, and a shutdown cancels everything.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from wisp.api import responses
from wisp.api.backend import Backend, Generation, Target
from wisp.api.body import body_limit, parsed, read_body
from wisp.api.errors import (
    JsonResponse,
    error_body,
    error_response,
    model_not_found,
    request_id,
    to_request_error,
)
from wisp.api.exchange import RequestContext
from wisp.api.observe import Observer
from wisp.api.output import Delta, Output
from wisp.api.prepare import PromptWork, prepare
from wisp.api.requests import NO_CLASSES, GenerationRequest, SloClasses, parse_chat, parse_completion
from wisp.api.responses import ChatFormat, CompletionFormat, Json, ResponseFormat
from wisp.api.sse import (
    DONE,
    KEEP_ALIVE,
    ClientGoneError,
    EventSender,
    close,
    event,
    unless_gone,
    with_keep_alive,
)
from wisp.core.errors import EngineError, RequestError

Authorize = Callable[[Request], str]
Parse = Callable[[dict[str, Any], Mapping[str, str], SloClasses], GenerationRequest]


def openai_routes(
    backend: Backend,
    *,
    keep_alive_s: float = 10.0,
    authorize: Authorize | None = None,
    observer: Observer | None = None,
    slo_classes: SloClasses = NO_CLASSES,
) -> list[Route]:
    """Routes for models, chat completions and completions.

    keep_alive_s: a stream in which nothing comes for so long gets a comment, so that nobody cuts it off.
    authorize: gives the name of the caller's API key, or raises RequestError 401. The application should also
    be given `errors.exception_handlers()`, for paths and methods that do not exist.
    """

    prompts = PromptWork()

    def generating(path: str, endpoint: str, parse: Parse, shape: type[ResponseFormat]) -> Route:
        app = _Generating(
            backend, prompts, endpoint, parse, shape, keep_alive_s, authorize, observer, slo_classes
        )
        return Route(path, app, methods=["POST"], name=endpoint)

    return [
        *_model_routes(backend, authorize),
        generating("/v1/chat/completions", "chat.completions", parse_chat, ChatFormat),
        generating("/v1/completions", "completions", parse_completion, CompletionFormat),
    ]


def _model_routes(backend: Backend, authorize: Authorize | None) -> list[Route]:
    def guarded(answer: Callable[[Request, Target], Json]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            id_ = request_id(request)
            try:
                if authorize is not None:
                    authorize(request)
                body = answer(request, await backend.target())
            except Exception as exc:
                return error_response(to_request_error(exc, id_), id_)
            return JsonResponse(body, headers={"x-request-id": id_})

        return endpoint

    def retrieve(request: Request, target: Target) -> Json:
        _check_model(request.path_params["id"], target)
        return responses.model_object(target)

    list_ = guarded(lambda _, target: responses.model_list(target))
    return [
        Route("/v1/models", list_, methods=["GET"]),
        Route("/v1/models/", list_, methods=["GET"]),  # otherwise a model without a name
        Route("/v1/models/{id:path}", guarded(retrieve), methods=["GET"]),
    ]


def _check_model(asked: str, target: Target) -> None:
    if asked != target.model:
        raise model_not_found(asked, target.model)


class _Generating:
    """An endpoint that generates, as an ASGI application: it needs `receive` while it answers."""

    def __init__(
        self,
        backend: Backend,
        prompts: PromptWork,
        endpoint: str,
        parse: Parse,
        shape: type[ResponseFormat],
        keep_alive_s: float,
        authorize: Authorize | None,
        observer: Observer | None,
        slo_classes: SloClasses,
    ) -> None:
        self._backend = backend
        self._prompts = prompts
        self._endpoint = endpoint
        self._parse = parse
        self._shape = shape
        self._keep_alive_s = keep_alive_s
        self._authorize = authorize
        self._observer = observer
        self._slo_classes = slo_classes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        exchange = RequestContext(request, self._endpoint, self._observer)
        stream = EventSender(send, {"x-request-id": exchange.id})
        try:
            with exchange.accounted():
                response = await self._handle(request, exchange, stream)
        except ClientGoneError:
            return
        except RequestError as error:
            if stream.started:
                await stream.send(event(error_body(error)))
            response = error_response(error, exchange.id)
        if stream.started:
            await stream.close()
        else:
            await response(scope, receive, send)

    async def _handle(self, request: Request, exchange: RequestContext, stream: EventSender) -> Response:
        if self._authorize is not None:
            exchange.key = self._authorize(request)
        body = await read_body(request, body_limit(self._backend.context))
        return await unless_gone(request.receive, self._answer(body, request.headers, exchange, stream))

    async def _answer(
        self, body: bytes, headers: Mapping[str, str], exchange: RequestContext, stream: EventSender
    ) -> Response:
        key = exchange.key
        self._backend.admit(key)  # before any work for a key that has used up its limits
        ask = exchange.ask = await parsed(
            body, lambda fields: self._parse(fields, headers, self._slo_classes), key
        )
        target = await self._target(ask, stream)
        _check_model(ask.model, target)
        work = functools.partial(prepare, ask, target, exchange.id, key)
        admit = functools.partial(self._backend.admit, key)
        generation = await self._prompts.run(key, admit, work)
        exchange.prompt_tokens = len(generation.prompt)
        wants_logprobs = ask.logprobs is not None
        exchange.output = output = Output(
            target.tokenizer, ask.stop, wants_logprobs, ask.min_tokens, rounds=ask.extras.rounds
        )
        head = responses.new_head(ask.chat, target)
        shape = self._shape(head, target.tokenizer, wants_logprobs, ask.include_usage)
        deltas = _deltas(self._backend, generation, output)
        if ask.stream:
            events = _events(deltas, shape, generation, output)
            async with aclosing(with_keep_alive(events, self._keep_alive_s)) as chunks:
                async for chunk in chunks:
                    await stream.send(chunk)
            return Response()
        async with aclosing(deltas):
            whole = [delta async for delta in deltas]
        answer = shape.whole(whole, *_statistics(generation, output))
        return JsonResponse(answer, headers={"x-request-id": exchange.id})

    async def _target(self, ask: GenerationRequest, stream: EventSender) -> Target:
        """The model, once there is one. A stream is kept alive meanwhile."""
        waiting = asyncio.ensure_future(self._backend.target())
        try:
            while ask.stream and not (await asyncio.wait({waiting}, timeout=self._keep_alive_s))[0]:
                await stream.send(KEEP_ALIVE)
            return await waiting
        finally:
            waiting.cancel()


async def _deltas(backend: Backend, generation: Generation, output: Output) -> AsyncGenerator[Delta, None]:
    """What the client may read, as it becomes certain, up to the end. Closes the generation in any case."""
    committed = backend.generate(generation)
    try:
        async for item in committed:
            delta = output.add(item, time.monotonic())
            yield delta
            if delta.finish:
                return
        raise EngineError("the generation ended without a finish")
    finally:
        await close(committed)


async def _events(
    deltas: AsyncGenerator[Delta, None], shape: ResponseFormat, generation: Generation, output: Output
) -> AsyncGenerator[bytes, None]:
    """The answer as events. Those that one delta gives go out together."""
    opening = shape.opening()
    try:
        async for delta in deltas:
            chunks = opening + shape.chunk(delta)
            opening = []
            if delta.finish:
                break
            if chunks:
                yield b"".join(map(event, chunks))
    finally:
        # Closed before the last event goes out: a client that has read [DONE] leaves no work behind
        await deltas.aclose()
    chunks += shape.closing(output.finish, *_statistics(generation, output))
    yield b"".join(map(event, chunks)) + DONE


def _statistics(generation: Generation, output: Output) -> tuple[Json, Json]:
    """(usage, metrics)"""
    return (
        responses.usage(len(generation.prompt), output),
        responses.metrics(generation.sampling.seed, output),
    )
