"""Whatever a client sends or does, it gets an answer in our shape, and nothing is left running."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from api_fakes import MODEL, ByteTokenizer, Recorder, ScriptedBackend, committed, make_app
from waiting import PATIENCE_S, until
from wisp.api.backend import Target
from wisp.api.body import SMALL_BODY_BYTES, parsed
from wisp.api.errors import ToldOfTheEnd
from wisp.core.errors import RequestError

FIELDS = [
    "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "logprobs",
    "top_logprobs", "tools", "tool_choice", "n", "logit_bias", "response_format", "stream_options", "min_tokens",
    "chat_template_kwargs",
]  # fmt: skip
NAMES = st.sampled_from(
    ["role", "user", "content", "type", "text", "tool_calls", "function", "name", "include_usage"]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | NAMES
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    backend = ScriptedBackend()
    backend.script = [committed("Hi", "stop", top=2)]
    with TestClient(make_app(backend)) as client:
        yield client


@settings(max_examples=250)
@given(
    path=st.sampled_from(["chat/completions", "completions"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON),
)
def test_any_field_of_any_type_is_answered_or_refused(
    client: TestClient, path: str, fields: dict[str, Any]
) -> None:
    body = {"model": MODEL, "prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], **fields}
    content = json.dumps(body, ensure_ascii=True).encode()
    response = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def call(backend: ScriptedBackend, recorder: Recorder, leave_on: bytes | None, **fields: Any) -> bytes:
    """One request straight to the ASGI application, by a client that leaves once it has read `leave_on`."""
    body = json.dumps({"model": MODEL, "prompt": "Hi", **fields}).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    left = asyncio.Event()
    received = b""

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal received
        received += message.get("body", b"")
        if leave_on is not None and leave_on in received:
            left.set()
            for _ in range(100):  # as on a full socket: time enough to notice
                await asyncio.sleep(0)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    await make_app(backend, recorder)(scope, receive, send)
    return received


def test_a_client_that_hangs_up_after_done_counts_as_served() -> None:
    backend, recorder = ScriptedBackend(), Recorder()
    received = asyncio.run(call(backend, recorder, b"[DONE]", stream=True))
    assert received.endswith(b"data: [DONE]\n\n")
    assert (recorder.records[0].status, recorder.records[0].finish) == (200, "stop")
    assert backend.running == 0


def test_a_client_that_hangs_up_in_the_middle_does_not() -> None:
    backend, recorder = ScriptedBackend(), Recorder()
    backend.script = [committed("Hel"), committed("lo", "stop")]
    received = asyncio.run(call(backend, recorder, b"Hel", stream=True))
    assert b"[DONE]" not in received
    assert (recorder.records[0].status, recorder.records[0].finish) == (499, "cancelled")
    assert backend.running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_shutdown_that_does_not_wait_says_so_to_clients(stream: bool) -> None:
    backend, recorder = ScriptedBackend(), Recorder()
    backend.script = [committed("Hel"), 2 * PATIENCE_S]

    async def shut_down() -> bytes:
        task = asyncio.create_task(call(backend, recorder, None, stream=stream))
        await until(lambda: backend.running)
        for _ in range(100):
            await asyncio.sleep(0)
        task.cancel()
        return await task

    received = asyncio.run(shut_down())
    assert backend.running == 0
    assert (recorder.records[0].status, recorder.records[0].finish) == (503, "error")
    assert (b"Hel" in received) == stream
    assert json.loads(received.removesuffix(b"\n\n").rpartition(b"data: ")[2])["error"] == {
        "message": "this server is shutting down",
        "type": "server_error",
        "param": None,
        "code": "verifier_unavailable",
    }
    assert b"[DONE]" not in received


def test_a_shutdown_tells_requests_that_generate_nothing_too() -> None:
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(2 * PATIENCE_S)

    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    async def shut_down() -> None:
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "query_string": b""}
        task = asyncio.create_task(ToldOfTheEnd(waits)(scope, receive, send))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(shut_down())
    assert said[0]["status"] == 503
    assert json.loads(said[1]["body"])["error"]["message"] == "this server is shutting down"


class SlowTokenizer(ByteTokenizer):
    """Takes as long, as with a long prompt, as it takes the event loop to see that it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.seen = threading.Event(), threading.Event()

    def encode(self, text: str, **how: Any) -> list[int]:
        self.begun.set()
        assert self.seen.wait(PATIENCE_S), "the event loop stood still meanwhile"
        return super().encode(text, **how)


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    backend = ScriptedBackend()
    backend.tokenizer = tokenizer = SlowTokenizer()

    async def scenario() -> bytes:
        answering = asyncio.create_task(call(backend, Recorder(), None))
        await until(tokenizer.begun.is_set)
        tokenizer.seen.set()
        return await answering

    assert b"Hello" in asyncio.run(scenario())


def test_a_large_body_is_parsed_off_the_event_loop_and_one_at_a_time() -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * SMALL_BODY_BYTES}).encode()
    at_work: list[int] = []
    most = 0
    go = threading.Event()

    def parse(fields: dict[str, Any]) -> str:
        nonlocal most
        at_work.append(1)
        most = max(most, len(at_work))
        assert go.wait(60.0), "the event loop stood still"
        at_work.pop()
        return threading.current_thread().name

    async def scenario() -> list[str]:
        tasks = [asyncio.create_task(parsed(body, parse)) for _ in range(4)]
        while not at_work:
            await asyncio.sleep(0.001)
        assert await parsed(b"{}", lambda fields: "at once") == "at once"  # others go on meanwhile
        go.set()
        return await asyncio.gather(*tasks)

    names = asyncio.run(scenario())
    assert threading.current_thread().name not in names
    assert most == 1


def test_a_key_that_sends_many_large_bodies_delays_anothers_by_one() -> None:
    body = json.dumps({"prompt": "x" * SMALL_BODY_BYTES}).encode()
    busy, go = threading.Event(), threading.Event()
    order: list[str] = []

    def parse(who: str) -> Callable[[dict[str, Any]], None]:
        def read(fields: dict[str, Any]) -> None:
            busy.set()
            assert go.wait(PATIENCE_S)
            order.append(who)

        return read

    async def scenario() -> None:
        many = [asyncio.create_task(parsed(body, parse("hog"), "hog")) for _ in range(4)]
        await until(busy.is_set)
        one = asyncio.create_task(parsed(body, parse("guest"), "guest"))
        await asyncio.sleep(0)  # it is in the queue
        go.set()
        await asyncio.gather(*many, one)

    asyncio.run(scenario())
    assert order == ["hog", "guest", "hog", "hog", "hog"]


def test_a_key_that_has_used_up_its_limits_has_no_body_parsed() -> None:
    class Strict(ScriptedBackend):
        def admit(self, key: str) -> None:
            raise RequestError(429, "not now", code="rate_limit_exceeded", retry_after=1.0)

    answer = asyncio.run(call(Strict(), Recorder(), None, prompt=7))
    assert b"rate_limit_exceeded" in answer


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_client_that_leaves_a_token_endpoint_is_no_error(
    path: str, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of its body, or while there is no verifier."""

    class Waiting(ScriptedBackend):
        async def target(self) -> Target:
            await asyncio.Event().wait()
            raise AssertionError

    parts = [{"type": "http.request", "body": b"{}" if whole else b"{", "more_body": not whole}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        """To nobody."""

    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        asyncio.run(asyncio.wait_for(make_app(Waiting())(scope, receive, send), 60.0))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_body_of_a_client_that_has_left_is_not_parsed() -> None:
    body = json.dumps({"prompt": "x" * SMALL_BODY_BYTES}).encode()
    busy, go = threading.Event(), threading.Event()
    parsed_second: list[int] = []

    def first(fields: dict[str, Any]) -> None:
        busy.set()
        assert go.wait(60.0)

    async def scenario() -> None:
        working = asyncio.create_task(parsed(body, first))
        while not busy.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(parsed(body, lambda fields: parsed_second.append(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        go.set()
        await working
        await parsed(body, lambda fields: None)  # a third one, so the second had its turn

    asyncio.run(scenario())
    assert not parsed_second


def test_a_refused_key_or_prompt_never_reaches_the_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "only for the model"
    with caplog.at_level(logging.DEBUG, logger="wisp"):
        client.post("/v1/completions", json={"model": secret, "prompt": secret, "n": 2})
        client.post("/v1/completions", json={"model": secret, "prompt": secret})
    assert len([r for r in caplog.records if r.name == "wisp.api"]) == 2
    assert secret not in caplog.text
