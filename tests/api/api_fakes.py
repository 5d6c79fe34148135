"""A byte-level tokenizer and a scripted backend: everything the surface needs, and no model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request

from wisp.api.backend import Committed, Generation, Target
from wisp.api.errors import exception_handlers
from wisp.api.generating import ApiOptions
from wisp.api.observe import RequestRecord
from wisp.api.routes import openai_routes
from wisp.core.errors import RequestError
from wisp.core.protocol.step import TokenLogprob, TopLogprob
from wisp.engines.base import Check, unasked
from wisp.engines.special import NO_STAND_INS, Special, SpecialTokens, StandIns

MODEL = "org/tiny-7b"
DIGEST = "0123456789abcdef0123456789abcdef"
EOS, BOS, IM_START, IM_END = 256, 257, 258, 259
SPECIAL = {"<eos>": EOS, "<bos>": BOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
MARKERS = SpecialTokens(Special(token, text, control=True) for text, token in SPECIAL.items())
KEY = "sk-secret"


class ByteTokenizer:
    """Ids 0-255 are bytes; four control tokens follow."""

    fingerprint = "0123456789abcdef0123"
    n_vocab = 260
    eos = frozenset({EOS, IM_END})
    bos_token = "<bos>"
    eos_token = "<eos>"
    chat_template: str | None = None
    controls = MARKERS.controls

    def __init__(self) -> None:
        self.encoded = 0  # texts

    def encode(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        stand_ins: StandIns = NO_STAND_INS,
        check: Check = unasked,
    ) -> list[int]:
        self.encoded += 1
        ids: list[int] = []
        for part in MARKERS.split(text, control=parse_special, stand_ins=stand_ins):
            check()
            ids += [part] if isinstance(part, int) else part.encode("utf-8", "replace")
        return [BOS, *ids] if add_bos and ids[:1] != [BOS] else ids

    def fewest(self, text: str) -> int:
        return len(text.encode("utf-8", "replace")) // len("<|im_start|>")

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def blob(self) -> bytes:
        return b""


class ScriptedBackend:
    """Plays `script`: items to yield, seconds to wait, exceptions to raise. Remembers what it was asked."""

    def __init__(self, context: int = 1000) -> None:
        self.tokenizer = ByteTokenizer()
        self.context = context
        self.script: list[Committed | float | Exception] = say("Hello")
        self.target_error: Exception | None = None
        self.asked: list[Generation] = []
        self.running = 0
        self.refusal: RequestError | None = None
        self.closed = threading.Event()

    async def target(self) -> Target:
        if self.target_error is not None:
            raise self.target_error
        return Target(model=MODEL, tokenizer=self.tokenizer, context=self.context, digest=DIGEST)

    def admit(self, key: str) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        self.asked.append(generation)
        self.running += 1
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Committed):
                    yield step
                else:
                    await asyncio.sleep(step)
        finally:
            self.running -= 1
            self.closed.set()


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def request_finished(self, record: RequestRecord) -> None:
        self.records.append(record)


def committed(text: str | bytes, finish: str = "", *, top: int | None = None, **spec: Any) -> Committed:
    """The bytes of `text` as tokens; an end-of-sequence token after them where `finish` is "stop".

    With `top`, each token has the log probability -0.5, and that many alternatives, the control token first.
    """
    data = text.encode() if isinstance(text, str) else text
    tokens = [*data, EOS] if finish == "stop" else list(data)
    logprobs: list[TokenLogprob] = []
    if top is not None:
        others = [TopLogprob(EOS, -0.25), TopLogprob(0xC3, float("-inf"))][:top]
        logprobs = [TokenLogprob(t, -0.5, others) for t in tokens]
    return Committed(tokens=tokens, finish=finish, logprobs=logprobs, **spec)


def say(*pieces: str | bytes) -> list[Committed | float | Exception]:
    """A script of one item per piece, ending with an end of sequence."""
    return [*(committed(p) for p in pieces[:-1]), committed(pieces[-1], "stop")]


def by_key(request: Request) -> str:
    if request.headers.get("authorization") != f"Bearer {KEY}":
        raise RequestError(401, "Wrong API key.", code="invalid_api_key")
    return "alice"


def make_app(
    backend: ScriptedBackend,
    recorder: Recorder | None = None,
    *,
    keep_alive_s: float = 10.0,
    auth: bool = False,
    **options: Any,
) -> Starlette:
    routes = openai_routes(
        backend,
        options=ApiOptions(keep_alive_s=keep_alive_s, **options),
        authorize=by_key if auth else None,
        observer=recorder,
    )
    return Starlette(routes=routes, exception_handlers=dict(exception_handlers()))


@contextlib.contextmanager
def serving(app: Starlette) -> Iterator[int]:
    """A real server on a loopback port; gives the port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.005)
            assert thread.is_alive(), "the server did not start"
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
