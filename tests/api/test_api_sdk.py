"""The `openai` SDK over real sockets, and clients that leave."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from api_fakes import KEY, MODEL, Recorder, ScriptedBackend, committed, make_app, say, serving
from waiting import PATIENCE_S, eventually
from wisp.core.errors import RequestError


class Served:
    """A running server and what stands behind it."""

    def __init__(self, port: int, backend: ScriptedBackend, recorder: Recorder) -> None:
        self.port = port
        self.backend = backend
        self.recorder = recorder

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    backend, recorder = ScriptedBackend(), Recorder()
    with serving(make_app(backend, recorder, auth=True, keep_alive_s=0.05)) as port:
        yield Served(port, backend, recorder)


@pytest.fixture
def served(running: Served) -> Served:
    running.backend.script = say("Hel", "lo wor", "ld")
    running.backend.closed.clear()
    running.recorder.records.clear()
    return running


MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


def test_chat(served: Served) -> None:
    with served.client() as client:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=["wor"], seed=3)
    assert answer.choices[0].message.content == "Hello "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("Hello wor")
    assert answer.model_extra is not None
    assert answer.model_extra["metrics"]["seed"] == 3


def test_streamed_chat_with_usage_and_silence(served: Served) -> None:
    served.backend.script.insert(1, 0.12)
    with served.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
    *texts, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in texts) == "Hello world"
    assert texts[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len("Hello world") + 1


def test_completions_with_logprobs(served: Served) -> None:
    served.backend.script = [committed("ab", "length", top=1)]
    with served.client() as client:
        answer = client.completions.create(model=MODEL, prompt="Hi", logprobs=1)
        streamed = list(client.completions.create(model=MODEL, prompt="Hi", logprobs=1, stream=True))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["a", "b"], [0, 1])
    assert "".join(c.choices[0].text for c in streamed) == answer.choices[0].text == "ab"


def test_chat_logprobs(served: Served) -> None:
    served.backend.script = [committed("ab", "length", top=1)]
    with served.client() as client:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(t.token, t.bytes, len(t.top_logprobs)) for t in logprobs.content] == [
        ("a", [97], 1),
        ("b", [98], 1),
    ]


def test_models(served: Served) -> None:
    with served.client() as client:
        assert [m.id for m in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


def test_errors_are_those_that_the_sdk_knows(served: Served) -> None:
    with served.client() as client, served.client("wrong") as stranger:
        with pytest.raises(openai.NotFoundError) as not_found:
            client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, n=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model=MODEL, messages=MESSAGES)
        served.backend.script = [RequestError(429, "Full.", code="overloaded", retry_after=7)]
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        served.backend.script = [committed("a"), RequestError(503, "Lost the verifier.", code="gone")]
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="Lost the verifier"):
            list(stream)
    assert (not_found.value.code, bad.value.param) == ("model_not_found", "n")
    assert full.value.response.headers["retry-after"] == "7"


def send(port: int, stream: bool) -> socket.socket:
    """A bare connection on which a request for a completion has been sent."""
    body = json.dumps({"model": MODEL, "prompt": "Hi", "stream": stream})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    connection.sendall((head + body).encode())
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_generation(served: Served, stream: bool) -> None:
    served.backend.script = [committed("Hel"), 2 * PATIENCE_S]
    with send(served.port, stream) as connection:
        if stream:
            received = b""
            while b"Hel" not in received:
                received += connection.recv(4096)
        else:
            eventually(lambda: served.backend.running == 1)
    assert served.backend.closed.wait(PATIENCE_S), "the generation went on without its client"
    eventually(lambda: served.recorder.records)
    record = served.recorder.records[0]
    assert (record.status, record.finish, record.stream) == (499, "cancelled", stream)
    assert record.completion_tokens == 3


def test_an_sdk_stream_that_is_closed_early_cancels(served: Served) -> None:
    served.backend.script = [committed("Hel"), 2 * PATIENCE_S]
    with served.client() as client:
        stream = client.completions.create(model=MODEL, prompt="Hi", stream=True)
        assert next(iter(stream)).choices[0].text == "Hel"
        stream.close()
    assert served.backend.closed.wait(PATIENCE_S)


def test_a_connection_is_used_again(served: Served) -> None:
    with send(served.port, stream=True) as connection:
        for _ in range(2):
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                part = connection.recv(4096)
                assert part, "the server closed the connection"
                received += part
            assert b"[DONE]" in received
            body = json.dumps({"model": MODEL, "prompt": "Hi", "stream": True})
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            connection.sendall((head + body).encode())
