"""The endpoints, request by request, without sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fakes import (
    BOS,
    EOS,
    IM_END,
    IM_START,
    KEY,
    MODEL,
    Recorder,
    ScriptedBackend,
    committed,
    make_app,
    say,
)
from wisp.api.backend import Target
from wisp.api.body import LEAST_LIMIT_BYTES, SMALL_BODY_BYTES, body_limit
from wisp.core.errors import EngineError, RequestError, UnavailableError

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def client(backend: ScriptedBackend, recorder: Recorder) -> TestClient:
    return TestClient(make_app(backend, recorder), raise_server_exceptions=False)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hi", **fields}


def events(body: str) -> list[Any]:
    """The data of each event, comments left out; the last is "[DONE]" if all went well."""
    data = [e.removeprefix("data: ") for e in body.split("\n\n") if e.startswith("data: ")]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


def error(response: Any, status: int) -> dict[str, Any]:
    """The error object, checked to be in the one shape."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    assert found["code"], "clients tell refusals apart by their code"
    return found


# --- answers


def test_a_chat_completion(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [
        committed("Hel", drafted=4, accepted=2, from_draft=2, cached=5),
        committed("lo", "stop", drafted=2, accepted=2, from_draft=2, cached=5),
    ]
    body = client.post(CHAT, json=chat(seed=7)).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    assert body["system_fingerprint"] == "wisp-0123456789ab"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = backend.tokenizer.encode(prompt, add_bos=False, parse_special=True)
    assert backend.asked[0].prompt == ids
    assert body["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 6,
        "total_tokens": len(ids) + 6,
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 4,
            "rejected_prediction_tokens": 2,
            "reasoning_tokens": 0,
        },
    }
    assert body["metrics"] == {
        "seed": 7,
        "speculative_decoding": {
            "mean_acceptance_length": 3.0,
            "draft_acceptance_rate": 0.6667,
            "acceptance_histogram": [0, 0, 2],
            "num_spec_steps": 2,
            "num_accepted_draft_tokens": 4,
            "num_draft_tokens": 6,
        },
    }


def test_a_text_completion(client: TestClient, backend: ScriptedBackend) -> None:
    body = client.post(TEXT, json=text()).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    asked = backend.asked[0]
    assert asked.prompt == [BOS, *b"Hi"]
    assert asked.max_tokens == 16
    assert (asked.sampling.temperature, asked.sampling.top_p) == (1.0, 1.0)


def test_control_tokens_in_a_raw_prompt_count_and_the_bos_comes_once(
    client: TestClient, backend: ScriptedBackend
) -> None:
    for prompt in ("<|im_start|>user\nhi<|im_end|>\n", "<bos>hi", "<eos>"):
        assert client.post(TEXT, json=text(prompt=prompt)).status_code == 200
    assert [asked.prompt for asked in backend.asked] == [
        [BOS, IM_START, *b"user\nhi", IM_END, *b"\n"],
        [BOS, *b"hi"],
        [BOS, EOS],
    ]


@pytest.mark.parametrize("prompt", [[72, 105], [[72, 105]]])
def test_a_prompt_of_token_ids_is_taken_as_it_is(
    client: TestClient, backend: ScriptedBackend, prompt: list[Any]
) -> None:
    assert client.post(TEXT, json=text(prompt=prompt)).status_code == 200
    assert backend.asked[0].prompt == [72, 105]


def test_without_a_seed_one_is_drawn_and_returned(client: TestClient, backend: ScriptedBackend) -> None:
    seeds = [client.post(CHAT, json=chat()).json()["metrics"]["seed"] for _ in range(3)]
    assert seeds == [asked.sampling.seed for asked in backend.asked]
    assert len(set(seeds)) == 3
    assert max(seeds) < 1 << 53


def test_parameters_reach_the_backend(client: TestClient, backend: ScriptedBackend) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -3}
    headers = {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "40.5", "x-request-id": "mine-1"}
    body = chat(
        **fields, max_tokens=5, max_completion_tokens=9, ignore_eos=True, logprobs=True, top_logprobs=2
    )
    backend.script = [committed("x", "stop", top=2)]
    response = client.post(CHAT, json=body, headers=headers)
    asked = backend.asked[0]
    assert response.headers["x-request-id"] == asked.request_id == "mine-1"
    s = asked.sampling
    assert {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "min_p": s.min_p,
        "seed": s.seed,
    } == fields
    assert (asked.max_tokens, asked.ignore_eos, asked.logprobs) == (9, True, 2)
    assert asked.slo is not None
    assert (asked.slo.ttft_ms, asked.slo.tpot_ms) == (250.0, 40.5)


def test_harmless_unknown_and_neutral_fields_are_accepted(client: TestClient) -> None:
    neutral = {
        "user": "u", "store": False, "parallel_tool_calls": True, "n": 1, "frequency_penalty": 0, "logit_bias": {},
        "presence_penalty": 0.0, "response_format": {"type": "text"}, "modalities": ["text"], "stop": None,
        "top_k": -1, "seed": None, "no_such_field": {"deep": []}, "tool_choice": "auto", "functions": None,
    }  # fmt: skip
    assert client.post(CHAT, json=chat(**neutral)).status_code == 200
    assert client.post(TEXT, json=text(best_of=1, echo=False, suffix="", logit_bias=None)).status_code == 200


def test_a_chat_without_a_limit_may_use_what_is_left(client: TestClient, backend: ScriptedBackend) -> None:
    client.post(CHAT, json=chat())
    asked = backend.asked[0]
    assert len(asked.prompt) + asked.max_tokens == backend.context


def test_the_default_of_16_tokens_shrinks_to_what_is_left(
    client: TestClient, backend: ScriptedBackend
) -> None:
    backend.context = 10
    client.post(TEXT, json=text())
    assert backend.asked[0].max_tokens == 7


# --- streams


def test_a_streamed_chat(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("Hel", "lo")
    response = client.post(CHAT, json=chat(stream=True, seed=1))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo"}, None),
        ({}, "stop"),
    ]
    assert [c.get("metrics", {}).get("seed") for c in chunks] == [None, None, None, 1]
    assert "usage" not in chunks[-1]


def test_a_streamed_completion_with_usage(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("Hel", "lo")
    response = client.post(TEXT, json=text(stream=True, seed=1, stream_options={"include_usage": True}))
    *chunks, last, _ = events(response.text)
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"], c["usage"]) for c in chunks] == [
        ("Hel", None, None),
        ("lo", None, None),
        ("", "stop", None),
    ]
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (3, 6)
    assert last["metrics"]["seed"] == 1


@pytest.mark.parametrize("n", [1, 2])
def test_each_chunk_says_how_many_tokens_there_are_so_far(
    client: TestClient, backend: ScriptedBackend, n: int
) -> None:
    """Chunks of speculation hold several tokens: benchmarks count them by this."""
    backend.script = say("Hel", "lo")
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = client.post(CHAT, json=chat(stream=True, n=n, stream_options=options))
    *chunks, last, _ = events(response.text)
    so_far = [c["usage"]["completion_tokens"] for c in chunks]
    assert so_far[:n] == [0] * n
    assert so_far == sorted(so_far)
    assert {c["usage"]["prompt_tokens"] for c in chunks} == {last["usage"]["prompt_tokens"]}
    assert so_far[-1] == last["usage"]["completion_tokens"]
    assert n > 1 or so_far == [0, 3, 6, 6], "choices run side by side; one alone is told token by token"
    alone = client.post(CHAT, json=chat(stream=True, stream_options={"continuous_usage_stats": True}))
    assert not any("usage" in c for c in events(alone.text)[:-1])


def test_silence_is_filled_with_comments(backend: ScriptedBackend) -> None:
    backend.script = [1.0, *say("x")]
    client = TestClient(make_app(backend, keep_alive_s=0.05))
    body = client.post(TEXT, json=text(stream=True)).text
    assert re.match(r"(: keep-alive\n\n){2,}data: ", body)
    assert events(body)[-1] == "[DONE]"


def test_an_error_before_the_first_token_has_its_status(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [RequestError(429, "Full.", code="overloaded", type="rate_limit_error", retry_after=1.2)]
    for stream in (True, False):
        response = client.post(CHAT, json=chat(stream=stream))
        assert error(response, 429)["code"] == "overloaded"
        assert response.headers["retry-after"] == "2"


def test_an_error_in_mid_stream_is_the_last_event(
    client: TestClient, backend: ScriptedBackend, recorder: Recorder
) -> None:
    backend.script = [committed("Hel"), UnavailableError("The verifier left.")]
    response = client.post(TEXT, json=text(stream=True))
    assert response.status_code == 200
    first, last = events(response.text)
    assert first["choices"][0]["text"] == "Hel"
    assert last["error"]["code"] == "verifier_unavailable"
    assert (recorder.records[0].status, recorder.records[0].finish) == (503, "error")


# --- stop strings


@pytest.mark.parametrize("groups", [["one\n\nUser: two"], ["one", "\n", "\nUs", "er: two"]])
@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_cuts_the_answer_and_the_count(
    client: TestClient, backend: ScriptedBackend, groups: list[str], stream: bool
) -> None:
    backend.script = say(*groups)
    body = text(stop=["\n\nUser:"], stream=stream, stream_options={"include_usage": True} if stream else None)
    response = client.post(TEXT, json=body)
    if stream:
        *chunks, last, _ = events(response.text)
        answer = "".join(c["choices"][0]["text"] for c in chunks)
        finish, usage = chunks[-1]["choices"][0]["finish_reason"], last["usage"]
    else:
        whole = response.json()
        answer, finish = whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]
        usage = whole["usage"]
    assert (answer, finish) == ("one", "stop")
    assert usage["completion_tokens"] == len("one\n\nUser:")
    assert backend.running == 0


def test_a_stop_string_ends_the_generation_at_once(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("a#"), RequestError(500, "asked for more than it needed")]
    assert client.post(CHAT, json=chat(stop="#")).json()["choices"][0]["message"]["content"] == "a"


# --- log probabilities


def test_chat_logprobs(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("a", top=2), committed("é", "stop", top=2)]
    choice = client.post(CHAT, json=chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    top = [
        {"token": "token_id:256", "logprob": -0.25, "bytes": None},
        {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3]},
    ]
    assert choice["logprobs"] == {
        "content": [
            {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top},
            {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": top},
            {"token": "\ufffd", "logprob": -0.5, "bytes": [0xA9], "top_logprobs": top},
        ],
        "refusal": None,
    }


def test_completion_logprobs(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("aé!", "length", top=1)]
    choice = client.post(TEXT, json=text(logprobs=1)).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"token_id:256": -0.25}] * 4,
        "text_offset": [0, 1, 1, 2],
    }


def test_streamed_logprobs_are_those_of_the_whole(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("a€#b", top=1), committed("## c", "stop", top=1)]
    body = text(logprobs=1, stop="##")
    whole = client.post(TEXT, json=body).json()["choices"][0]
    chunks = [e["choices"][0] for e in events(client.post(TEXT, json=body | {"stream": True}).text)[:-1]]
    assert "".join(c["text"] for c in chunks) == whole["text"] == "a€#b"
    for name, values in whole["logprobs"].items():
        assert [v for c in chunks if c["logprobs"] for v in c["logprobs"][name]] == values
    assert len(whole["logprobs"]["tokens"]) == len("a€#b".encode())


# --- models


def test_a_slash_at_the_end_of_the_models_is_no_model_without_a_name(client: TestClient) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == [MODEL]
    assert client.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 1000
    assert error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


# --- refusals


def big_list(n: int) -> list[str]:
    return ["x"] * n


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 0), ("n", True), ("n", 500), ("frequency_penalty", 2.5), ("presence_penalty", "x"),
        ("repetition_penalty", 0), ("logit_bias", {"5": 101}), ("logit_bias", {"x": 1}), ("logit_bias", {"999": 1}),
        ("response_format", "json"), ("modalities", ["text", "audio"]), ("repeat_penalty", 1.1),
        ("include_stop_str_in_output", True), ("truncate_prompt_tokens", 5), ("bad_words", "x"), ("echo", True),
        ("allowed_token_ids", [260]), ("stop_token_ids", [-1]), ("guided_json", 3), ("guided_choice", []),
        ("audio", {"voice": "x"}), ("stop", big_list(65)), ("stop", [1]), ("stop", "x" * 2000),
        ("temperature", "hot"), ("temperature", -1), ("temperature", True), ("top_p", 0), ("top_p", 1.5),
        ("top_k", 1.5), ("top_k", -2), ("min_p", 2), ("seed", "x"), ("seed", 1 << 64), ("max_tokens", 0),
        ("max_tokens", "many"), ("max_completion_tokens", -1), ("stream", "yes"), ("logprobs", 3),
        ("top_logprobs", 5), ("tool_choice", "required"), ("min_tokens", 5000),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("tools", "x"), ("messages", []),
        ("messages", "Hi"), ("ignore_eos", 1), ("stream_options", {"include_usage": True}),
        ("chat_template_kwargs", {"messages": []}), ("chat_template", "{{ 1 }}"), ("model", 5),
        ("functions", [{"name": "f"}]),
    ],
)  # fmt: skip
def test_chat_refuses_by_name(client: TestClient, backend: ScriptedBackend, param: str, value: Any) -> None:
    refused = error(client.post(CHAT, json=chat(**{param: value})), 400)
    assert refused["param"] == param
    assert param in refused["message"]
    assert backend.asked == []


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("prompt", None), ("prompt", ["a", 5]), ("prompt", [[1], ["a"]]), ("prompt", [1, "a"]), ("prompt", [True]),
        ("prompt", []), ("prompt", [999]), ("prompt", [-1]), ("prompt", {"a": 1}), ("suffix", "x"), ("echo", 1),
        ("best_of", 2), ("prompt", ["a"] * 129), ("max_tokens", 0), ("max_tokens", -1), ("prompt_logprobs", 21),
        ("logprobs", True), ("logprobs", 6), ("logprobs", -1),
    ],
)  # fmt: skip
def test_completion_refuses_by_name(client: TestClient, param: str, value: Any) -> None:
    assert error(client.post(TEXT, json=text(**{param: value})), 400)["param"] == param


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("messages[0]", "Hi"),
        ("messages[0].role", {"role": "robot", "content": "x"}),
        ("messages[0].content", {"role": "user", "content": None}),
        ("messages[0].content", {"role": "user", "content": 5}),
        ("messages[0].content[0].type", {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        ("messages[0].content[0].text", {"role": "user", "content": [{"type": "text", "text": 1}]}),
        ("messages[0].tool_calls[0].function", {"role": "assistant", "tool_calls": [{}]}),
        ("messages[0].tool_calls[0].function.arguments",
         {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
        ("messages[0].tool_calls", {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}),
    ],
)  # fmt: skip
def test_bad_messages_are_refused_where_they_are_bad(client: TestClient, param: str, message: Any) -> None:
    refused = error(client.post(CHAT, json=chat(messages=[message])), 400)
    assert refused["param"] == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"abc": 1}}, "logit_bias: expected an integer as every key"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: expected an integer of at least 0 as every key"),
        ({"logit_bias": {"1": None}}, "logit_bias: expected a number as every value, got null"),
        ({"logit_bias": {"1": "x"}}, "logit_bias: expected a number as every value, got a string"),
        ({"logit_bias": [1]}, "logit_bias: expected an object, got a list"),
        ({"stop": [1]}, "stop: expected a string, got 1 at [0]"),
        ({"stop": ["a", []]}, "stop: expected a string, got a list at [1]"),
        ({"stop": 5}, "stop: expected a string or a list, got 5"),
        ({"bad_words": [None]}, "bad_words: expected a string, got null at [0]"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids: expected an integer of at least 0, got -1 at [1]"),
        (
            {"stream_options": {"include_usage": 5}},
            "stream_options.include_usage: expected true or false, got 5",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_told_where_it_is(
    client: TestClient, fields: dict[str, Any], message: str
) -> None:
    assert error(client.post(CHAT, json=chat(**fields)), 400)["message"] == message


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "soon", "1.1e9", "1e300"])
def test_slo_headers_must_be_positive_and_no_more_than_a_verifier_takes(
    client: TestClient, name: str, value: str
) -> None:
    assert error(client.post(CHAT, json=chat(), headers={name: value}), 400)["param"] == name


def test_another_model_is_not_found(client: TestClient) -> None:
    refused = error(client.post(CHAT, json=chat(model="gpt-4o")), 404)
    assert (refused["code"], refused["param"]) == ("model_not_found", "model")


def test_prompts_beyond_the_context_are_refused_with_the_counts(
    client: TestClient, backend: ScriptedBackend
) -> None:
    backend.context = 20
    too_long = error(client.post(TEXT, json=text(prompt="x" * 30)), 400)
    assert too_long["code"] == "context_length_exceeded"
    assert "20 tokens" in too_long["message"]
    assert "31 tokens" in too_long["message"]
    assert client.post(TEXT, json=text(max_tokens=18)).status_code == 200
    assert backend.asked[0].max_tokens == 17  # what is left


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"x"', b"\xff", b'{"model": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000],
    ids=["empty", "open", "list", "string", "bytes", "nan", "surrogate", "deep"],
)
def test_malformed_json(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert error(client.post(CHAT, content=body, headers=headers), 400)["code"] == "invalid_json"


def test_a_body_may_be_as_large_as_the_context_has_use_for(
    client: TestClient, backend: ScriptedBackend
) -> None:
    headers = {"content-type": "application/json"}
    for context in (0, 1000, 100_000):
        backend.context = context
        limit = body_limit(context)
        for content in (
            b" " * (limit + 1),
            (b" " * SMALL_BODY_BYTES for _ in range(limit // SMALL_BODY_BYTES + 1)),
        ):
            assert (
                error(client.post(CHAT, content=content, headers=headers), 413)["code"] == "request_too_large"
            )
        assert error(client.post(CHAT, content=b" " * limit, headers=headers), 400)["code"] == "invalid_json"
    assert LEAST_LIMIT_BYTES < body_limit(1000) < body_limit(100_000)


def test_only_json_is_taken_so_that_a_web_page_cannot_post(client: TestClient) -> None:
    body = json.dumps(chat()).encode()
    for headers in ({"content-type": "text/plain"}, {}):
        assert (
            error(client.post(CHAT, content=body, headers=headers), 415)["code"] == "unsupported_media_type"
        )


def test_the_frameworks_own_errors_have_our_shape(client: TestClient) -> None:
    assert error(client.get("/v1/nothing"), 404)["code"] == "not_found"
    refused = client.get(CHAT)
    assert error(refused, 405)["code"] == "method_not_allowed"
    assert refused.headers["allow"] == "POST"


def test_no_verifier_is_503_with_retry_after(client: TestClient, backend: ScriptedBackend) -> None:
    backend.target_error = UnavailableError("No verifier within 5 s.", retry_after=3)
    for response in (client.post(CHAT, json=chat(stream=True)), client.get("/v1/models")):
        assert error(response, 503)["type"] == "server_error"
        assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("failure", "code"),
    [(ValueError("the prompt was: Hi"), "internal_error"), (EngineError("slot 3"), "engine_error")],
)
def test_an_unexpected_failure_is_logged_and_not_told(
    client: TestClient,
    backend: ScriptedBackend,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
    code: str,
) -> None:
    backend.script = [failure]
    told = error(client.post(CHAT, json=chat(), headers={"x-request-id": "r-9"}), 500)
    assert told["code"] == code
    assert str(failure) not in told["message"]
    assert "r-9" in told["message"]
    logged = [r for r in caplog.records if r.exc_info]
    assert len(logged) == 1
    assert "r-9" in logged[0].getMessage()


def test_a_generation_without_an_end_is_an_error(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("abc")]
    assert error(client.post(CHAT, json=chat()), 500)["code"] == "engine_error"


# --- keys, logs, records


def test_the_api_key_guards_everything(backend: ScriptedBackend, recorder: Recorder) -> None:
    client = TestClient(make_app(backend, recorder, auth=True))
    for response in (
        client.post(CHAT, json=chat()),
        client.get("/v1/models"),
        client.get(f"/v1/models/{MODEL}"),
    ):
        assert error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.post(CHAT, json=chat(), headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert backend.asked[0].key == "alice"
    assert [r.key for r in recorder.records] == ["", "alice"]


def test_a_request_id_that_could_forge_log_lines_is_replaced(client: TestClient) -> None:
    response = client.post(CHAT, json=chat(), headers={"x-request-id": "a b\tstatus=200"})
    assert response.headers["x-request-id"].startswith("req-")


def test_one_log_line_without_any_content(
    client: TestClient, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.script = [committed("reply", "length", drafted=5, accepted=3, from_draft=3)]
    with caplog.at_level(logging.INFO, logger="wisp.api"):
        client.post(TEXT, json=text(prompt="question"), headers={"x-request-id": "r-1"})
    (line,) = [r.getMessage() for r in caplog.records if r.name == "wisp.api"]
    assert line.startswith(
        "request=r-1 endpoint=completions key=- status=200 finish=length code=- stream=false"
    )
    assert "prompt_tokens=9 completion_tokens=5 drafted=5 accepted=3" in line
    assert "question" not in line
    assert "reply" not in line


def test_observers_get_every_observation(
    client: TestClient, backend: ScriptedBackend, recorder: Recorder
) -> None:
    backend.script = [
        0.01,
        committed("ab", drafted=2, accepted=1, from_draft=1),
        0.02,
        committed("c", "stop"),
    ]
    client.post(TEXT, json=text(stream=True), headers={"x-slo-ttft-ms": "100000"})
    client.post(TEXT, json=text(prompt=5))
    served, refused = recorder.records
    assert (served.endpoint, served.status, served.finish, served.stream) == (
        "completions",
        200,
        "stop",
        True,
    )
    assert (served.prompt_tokens, served.completion_tokens) == (3, 4)
    assert served.arrived + 0.01 <= served.first <= served.last <= served.ended
    assert served.gaps_s == [served.last - served.first]
    assert served.served().ttft_ms >= 10
    assert served.served().slo.ttft_ms == 100000
    assert (served.spec.num_draft_tokens, served.spec.num_accepted_draft_tokens) == (2, 1)
    assert (refused.status, refused.finish, refused.completion_tokens) == (400, "error", 0)
    assert not refused.served().ok


def test_an_observer_that_fails_breaks_nothing(backend: ScriptedBackend) -> None:
    client = TestClient(make_app(backend, object()))  # type: ignore[arg-type]
    assert client.post(CHAT, json=chat()).status_code == 200


# --- messages and templates


def test_text_parts_are_joined_and_developer_is_system(client: TestClient, backend: ScriptedBackend) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    backend.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments.x }}{% endfor %}]{% endfor %}{{ tools | length }}"
    )
    tool = {"type": "function", "function": {"name": "f"}}
    response = client.post(CHAT, json=chat(messages=messages, tools=[tool]))
    assert response.status_code == 200, response.text
    assert (
        bytes(backend.asked[0].prompt).decode() == "[system:Be brief.][user:a\nb][assistant:None1][tool:42]1"
    )


@pytest.mark.parametrize(
    "extra",
    [
        {"stop": ""}, {"stop": [""]}, {"stop": ["", "#"]}, {"stop": None}, {"n": 1.0}, {"max_tokens": 16.0},
        {"logprobs": False}, {"logprobs": None}, {"stream_options": None}, {"min_tokens": 0}, {"min_tokens": 3},
        {"logit_bias": None}, {"user": "u"}, {"temperature": 2.3e-308}, {"temperature": 5e-324}, {"best_of": 1},
    ],
    ids=str,
)  # fmt: skip
def test_harmless_values_are_taken_as_peers_take_them(client: TestClient, extra: dict[str, Any]) -> None:
    assert client.post(TEXT, json=text(**extra)).status_code == 200
    extra = {k: v for k, v in extra.items() if k != "best_of"}
    assert client.post(CHAT, json=chat(**extra, tools=[], tool_choice=None)).status_code == 200


def test_a_history_as_models_leave_it_is_taken(client: TestClient, backend: ScriptedBackend) -> None:
    """An assistant that said nothing, a tool that returned nothing, arguments that are no JSON object."""
    calls = [{"function": {"name": "f", "arguments": a}} for a in ("{oops", "[1]", '{"x": 1}', "", None)]
    messages = [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": []},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": None},
    ]
    backend.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}"
        "{% for c in m.tool_calls %}|{{ c.function.arguments }}{% endfor %}]{% endfor %}"
    )
    response = client.post(CHAT, json=chat(messages=messages))
    assert response.status_code == 200, response.text
    said = bytes(backend.asked[0].prompt).decode()
    assert said == "[u:a][a:][a:][a:][a:None|{oops|[1]|{'x': 1}|{}|{}][t:]"


def test_an_answer_has_its_least_number_of_tokens(client: TestClient, backend: ScriptedBackend) -> None:
    """Neither an end of sequence nor a stop string ends it sooner."""
    backend.script = say("a#b#c#d")
    body = client.post(TEXT, json=text(min_tokens=3, stop="#")).json()
    assert body["choices"][0]["text"] == "a#b"
    sampling = backend.asked[0].sampling
    assert (sampling.min_tokens, sampling.ends) == (3, (EOS, IM_END))
    client.post(TEXT, json=text(min_tokens=3, ignore_eos=True))
    assert backend.asked[1].sampling.min_tokens == 0  # nothing ends it anyway
    client.post(TEXT, json=text(min_tokens=3, ignore_eos=True, stop_token_ids=[65]))
    sampling = backend.asked[2].sampling
    assert (sampling.min_tokens, sampling.ends, sampling.barred(2)) == (3, (), (65,))


def test_tool_choice_none_hides_tools(client: TestClient, backend: ScriptedBackend) -> None:
    backend.tokenizer.chat_template = "{{ tools is none }}"
    tool = {"type": "function", "function": {"name": "f"}}
    client.post(CHAT, json=chat(tools=[tool], tool_choice="none"))
    assert bytes(backend.asked[0].prompt) == b"True"


def test_template_arguments_reach_the_template(client: TestClient, backend: ScriptedBackend) -> None:
    backend.tokenizer.chat_template = "{{ enable_thinking }}"
    client.post(CHAT, json=chat(chat_template_kwargs={"enable_thinking": False}))
    assert bytes(backend.asked[0].prompt) == b"False"


def test_a_refusal_by_the_template_is_a_400(client: TestClient, backend: ScriptedBackend) -> None:
    backend.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    refused = error(client.post(CHAT, json=chat()), 400)
    assert refused["param"] == "messages"
    assert "roles must alternate" in refused["message"]


def test_control_tokens_of_the_template_are_parsed(client: TestClient, backend: ScriptedBackend) -> None:
    client.post(CHAT, json=chat())
    assert IM_END in backend.asked[0].prompt


class _Absent(ScriptedBackend):
    """Its verifier is away for a while, and may not come back."""

    def __init__(self, seconds: float, error: RequestError | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.target_error = error

    async def target(self) -> Target:
        await asyncio.sleep(self.seconds)
        return await super().target()


def test_a_stream_is_kept_alive_while_there_is_no_verifier_yet() -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    client = TestClient(make_app(_Absent(0.2), keep_alive_s=0.05))
    answer = client.post("/v1/chat/completions", json=body).text
    assert answer.startswith(": keep-alive\n\n")
    assert answer.endswith("data: [DONE]\n\n")
    client = TestClient(make_app(_Absent(0.2, UnavailableError("no verifier")), keep_alive_s=0.05))
    answer = client.post("/v1/chat/completions", json=body).text
    assert answer.startswith(": keep-alive\n\n")
    assert "verifier_unavailable" in answer
