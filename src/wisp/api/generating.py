"""An endpoint that generates.

A request is one straight line: authorize, read, parse, prepare, generate, answer. It ends early in exactly three ways:
a RequestError becomes the response (or, once a stream has begun, its last event), a client that leaves cancels the
generation, and a shutdown cancels everything.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from wisp.api import responses
from wisp.api.answers import answers
from wisp.api.backend import Backend, Target, together
from wisp.api.body import Bodies, HeldBody, body_limit, parsed, read_body
from wisp.api.errors import JsonResponse, error_response, model_not_found
from wisp.api.exchange import RequestContext
from wisp.api.naming import clients_words
from wisp.api.observe import Observer
from wisp.api.output import Delta, Output
from wisp.api.prepare import Prepared, PromptWork, prepare
from wisp.api.reader import Reader
from wisp.api.requests import GenerationRequest
from wisp.api.responses import Json
from wisp.api.scoring import echoes
from wisp.api.shape import Shape, Subject
from wisp.api.slo import NO_CLASSES, SloClasses
from wisp.api.sse import ClientGoneError, EventSender, unless_gone
from wisp.api.tools.families import PARSERS
from wisp.core.errors import ConfigError, RequestError

Authorize = Callable[[Request], str]
Parse = Callable[[dict[str, Any], Mapping[str, str], SloClasses], GenerationRequest]


class ApiOptions(msgspec.Struct, frozen=True):
    """What an operator says of the surface.

    aliases:      names besides the model's own that clients may ask for
    tool_parser:  the family that reads answers (`api.tools.families`); "" for that of the chat template
    keep_alive_s: a stream in which nothing comes for so long gets a comment, so that nobody cuts it off
    """

    aliases: tuple[str, ...] = ()
    tool_parser: str = ""
    keep_alive_s: float = 10.0
    slo_classes: SloClasses = NO_CLASSES


def model_names(text: str) -> tuple[str, ...]:
    """The names in a list by comma, as `--served-model-name` has it."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parser_name(text: str) -> str:
    """What `--tool-parser` says; "" for nothing. Raises ConfigError."""
    if text and text not in PARSERS:
        raise ConfigError(f"--tool-parser: there is no {text!r}; choose one of: {', '.join(sorted(PARSERS))}")
    return text


class Service(msgspec.Struct, frozen=True):
    """What all endpoints share. `authorize` gives the name of the caller's API key, or raises RequestError 401."""

    backend: Backend
    prompts: PromptWork
    bodies: Bodies
    options: ApiOptions
    authorize: Authorize | None = None
    observer: Observer | None = None

    def name(self, asked: str, target: Target) -> str:
        """The name that an answer is to give its model. Raises RequestError 404 for one that is not served."""
        if asked and asked != target.model and asked not in self.options.aliases:
            raise model_not_found(asked, target.model)
        return asked or target.model


def bearing(request: Request) -> Request:
    """The request with its key where OpenAI's clients put it. Anthropic's say `x-api-key`."""
    key = request.headers.get("x-api-key")
    if key is None or "authorization" in request.headers:
        return request
    headers = [*request.scope["headers"], (b"authorization", b"Bearer " + key.encode("latin-1"))]
    return Request({**request.scope, "headers": headers}, request.receive)


class Generating:
    """An endpoint as an ASGI application: it needs `receive` while it answers."""

    def __init__(self, service: Service, endpoint: str, parse: Parse, shape: type[Shape]) -> None:
        self._service = service
        self._endpoint = endpoint
        self._parse = parse
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        exchange = RequestContext(request, self._endpoint, self._service.observer)
        stream = EventSender(send, {"x-request-id": exchange.id})
        try:
            with exchange.accounted():
                response = await self._handle(request, exchange, stream)
        except ClientGoneError:
            return
        except RequestError as error:
            if stream.started:
                await stream.send(self._shape.failed(error))
            response = error_response(error, exchange.id, self._shape.error)
        if stream.started:
            await stream.close()
        else:
            await response(scope, receive, send)

    async def _handle(self, request: Request, exchange: RequestContext, stream: EventSender) -> Response:
        service = self._service
        if service.authorize is not None:
            exchange.key = service.authorize(bearing(request))
        with service.bodies.of(exchange.key) as held:
            limit = body_limit(service.backend.context)
            answer = self._answer(  # which alone holds the body
                await read_body(request, limit, held), held, request.headers, exchange, stream
            )
            return await unless_gone(request.receive, answer)

    async def _answer(
        self,
        body: bytes,
        held: HeldBody,
        headers: Mapping[str, str],
        exchange: RequestContext,
        stream: EventSender,
    ) -> Response:
        service, key = self._service, exchange.key
        service.backend.admit(key)  # before any work for a key that has used up its limits
        ask = exchange.ask = await parsed(
            body, lambda fields: self._parse(fields, headers, service.options.slo_classes), key
        )
        del body  # the answer may take long
        with clients_words(ask.names):
            return await self._answered(ask, held, exchange, stream)

    async def _answered(
        self, ask: GenerationRequest, held: HeldBody, exchange: RequestContext, stream: EventSender
    ) -> Response:
        service, key = self._service, exchange.key
        target = await self._target(ask, stream)
        name = service.name(ask.model, target)
        parser, trace = service.options.tool_parser, exchange.span.trace
        work = functools.partial(prepare, ask, target, exchange.id, key, parser=parser, trace=trace)
        admit = functools.partial(service.backend.admit, key)
        prepared = await service.prompts.run(key, admit, work)
        held.release()
        exchange.prompt_tokens = prepared.prompt_tokens
        with together(service.backend, prepared.generations) as generations:
            prepared = msgspec.structs.replace(prepared, generations=generations)
            return await self._generated(prepared, target, name, exchange, stream)

    async def _generated(
        self, prepared: Prepared, target: Target, name: str, exchange: RequestContext, stream: EventSender
    ) -> Response:
        service, ask = self._service, exchange.ask
        assert ask is not None
        before = await echoes(service.backend, ask, prepared, target)
        exchange.outputs = outputs = [_output(ask, prepared, target) for _ in prepared.generations]
        head = responses.new_head(name, target)
        shape = self._shape(Subject(head, target.tokenizer, ask, outputs, prepared.prompt_tokens, before))
        found = answers(service.backend, prepared.generations, outputs)
        if ask.stream:
            events = _events(found, shape, prepared, outputs)
            async with stream.kept_alive(service.options.keep_alive_s), aclosing(events):
                async for chunk in events:
                    await stream.send(chunk)
            return Response()
        choices: list[list[Delta]] = [[] for _ in outputs]
        async with aclosing(found):
            async for index, delta in found:
                choices[index].append(delta)
        answer = shape.whole(choices, *_statistics(prepared, outputs))
        return JsonResponse(answer, headers={"x-request-id": exchange.id})

    async def _target(self, ask: GenerationRequest, stream: EventSender) -> Target:
        """The model, once there is one. A stream is kept alive meanwhile."""
        if not ask.stream:
            return await self._service.backend.target()
        async with stream.kept_alive(self._service.options.keep_alive_s):
            return await self._service.backend.target()


def _output(ask: GenerationRequest, prepared: Prepared, target: Target) -> Output:
    reader = Reader(prepared.reading) if prepared.reading is not None else None
    # Who reads the log probabilities of a prompt counts on one more for each token that was asked for
    return Output(
        target.tokenizer,
        ask.stop,
        ask.logprobs is not None,
        ask.min_tokens,
        reader,
        with_end=ask.echo,
        rounds=ask.extras.rounds,
    )


async def _events(
    found: AsyncGenerator[tuple[int, Delta], None],
    shape: Shape,
    prepared: Prepared,
    outputs: list[Output],
) -> AsyncGenerator[bytes, None]:
    """The answers as events. Those that one delta gives go out together."""
    chunks = shape.opening()
    left, index = len(outputs), 0
    try:
        async for index, delta in found:
            chunks += shape.chunk(index, delta)
            left -= bool(delta.finish)
            if not left:
                break
            if delta.finish:
                chunks += shape.finished(index, delta.finish)
            if chunks:
                yield b"".join(map(shape.event, chunks))
                chunks = []
    finally:
        # Closed before the last event goes out: a client that has read [DONE] leaves no work behind
        await found.aclose()
    chunks += shape.closing(index, outputs[index].finish, *_statistics(prepared, outputs))
    yield b"".join(map(shape.event, chunks)) + shape.end


def _statistics(prepared: Prepared, outputs: list[Output]) -> tuple[Json, Json]:
    """(usage, metrics)"""
    seeds = [g.sampling.seed for g in prepared.generations]
    return responses.usage(prepared.prompt_tokens, outputs, prepared.n), responses.metrics(seeds, outputs)
