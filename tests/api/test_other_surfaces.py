"""`/v1/responses`, `/v1/messages`, tokens, compressed bodies and pages of other origins."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import openai
import pytest
from openai.types.responses import Response as OpenAIResponse
from starlette.testclient import TestClient

from api_fakes import BOS, EOS, IM_END, KEY, MODEL, ScriptedBackend, committed, make_app, say, serving
from test_api_http import CHAT, chat, error
from test_openai_surface import CALL, HERMES, TOOL
from wisp.api.process import Listen, uvicorn_config
from wisp.api.web_guard import web_origins
from wisp.core.errors import ConfigError, RequestError
from wisp.core.protocol.constraints import Grammar

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
FLAT: Any = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
ANTHROPIC_TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}


@pytest.fixture
def backend() -> ScriptedBackend:
    backend = ScriptedBackend(context=4000)
    backend.tokenizer.chat_template = HERMES
    return backend


@pytest.fixture
def client(backend: ScriptedBackend) -> TestClient:
    return TestClient(make_app(backend), raise_server_exceptions=False)


def prompt(backend: ScriptedBackend) -> str:
    return bytes(i for i in backend.asked[-1].prompt if i < 256).decode()


def named(body: str) -> list[dict[str, Any]]:
    """The events, each checked to be called as its data says."""
    found = []
    for one in body.strip().split("\n\n"):
        name, data = one.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


# --- responses


def test_a_response(client: TestClient, backend: ScriptedBackend) -> None:
    body = client.post(
        RESPONSES, json={"model": MODEL, "input": "Hi", "instructions": "Be brief.", "seed": 3}
    ).json()
    assert prompt(backend).startswith("system\nBe brief.\nuser\nHi\n")
    assert (body["object"], body["status"]) == ("response", "completed")
    (item,) = body["output"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", "Hello")
    assert body["usage"]["output_tokens"] == 6
    assert body["instructions"] == "Be brief."
    assert OpenAIResponse.model_validate(body).output_text == "Hello"


def test_a_stream_of_events_ends_in_the_whole(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("<think>a", "b</think>Sure", ". ", CALL)
    body = {"model": MODEL, "input": "Hi", "tools": [FLAT, {"type": "web_search"}], "stream": True}
    events = named(client.post(RESPONSES, json=body).text)
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    final = events[-1]["response"]
    reasoning, message, call = final["output"]
    assert reasoning["content"][0]["text"] == "ab"
    assert message["content"][0]["text"] == "Sure."
    thought = len(">ab</think>")  # a marker of several tokens begins with its last
    assert final["usage"]["output_tokens_details"] == {"reasoning_tokens": thought}
    assert (call["name"], call["arguments"], call["status"]) == ("f", '{"x": 1}', "completed")
    whole = client.post(RESPONSES, json=body | {"stream": False}).json()
    assert [i["type"] for i in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["output"][1]["content"] == message["content"]


def test_a_history_of_items_becomes_messages(client: TestClient, backend: ScriptedBackend) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {
            "type": "reasoning",
            "id": "r",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sure."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
    ]
    backend.tokenizer.chat_template = "{{ messages | tojson }}"
    assert client.post(RESPONSES, json={"input": items}).status_code == 200
    assert json.loads(bytes(backend.asked[-1].prompt)) == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Sure.",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "c1"}
            ],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]


def test_a_response_that_is_cut_is_incomplete(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("Hel", "length")]
    body = client.post(RESPONSES, json={"input": "Hi", "max_output_tokens": 3}).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert backend.asked[-1].max_tokens == 3


def test_a_stream_that_is_cut_tells_its_last_item_as_the_whole_has_it(
    client: TestClient, backend: ScriptedBackend
) -> None:
    def statuses(*script: Any) -> list[str]:
        """Of the items, as each is done and as the whole has it."""
        backend.script = list(script)
        body = {"input": "Hi", "tools": [FLAT], "stream": True}
        events = named(client.post(RESPONSES, json=body).text)
        assert events[-1]["type"] == "response.incomplete"
        done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        assert done == events[-1]["response"]["output"]
        return [item["status"] for item in done]

    assert statuses(committed("Hel", "length")) == ["incomplete"]
    assert statuses(committed("<think>h", "length")) == ["incomplete"]
    assert statuses(committed("Sure. " + CALL, "length")) == ["completed", "completed"]
    assert statuses(committed(CALL + " and", "length")) == ["completed", "incomplete"]


def test_formats_and_choices_of_a_response(client: TestClient, backend: ScriptedBackend) -> None:
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    client.post(RESPONSES, json={"input": "Hi", "text": {"format": schema}})
    constraints = backend.asked[-1].sampling.constraints
    assert constraints is not None
    assert constraints.grammar is not None
    assert constraints.grammar.source == '{"type":"object"}'
    body = {"input": "Hi", "tools": [FLAT], "tool_choice": {"type": "function", "name": "f"}}
    client.post(RESPONSES, json=body)
    constraints = backend.asked[-1].sampling.constraints
    assert constraints is not None
    assert constraints.grammar is not None
    assert "calls" in constraints.grammar.source


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("previous_response_id", {"previous_response_id": "x"}),
        ("conversation", {"conversation": "x"}),
        ("background", {"background": True}),
        ("truncation", {"truncation": "auto"}),
        ("input", {"input": None}),
        ("input", {"input": []}),
        ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("input[0].type", {"input": [{"type": "item_reference", "id": "x"}]}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("text.format.type", {"text": {"format": {"type": "x"}}}),
        ("temperature", {"temperature": "x"}),
    ],
)
def test_a_response_refuses_by_name(client: TestClient, param: str, fields: dict[str, Any]) -> None:
    assert error(client.post(RESPONSES, json={"input": "Hi", **fields}), 400)["param"] == param


def test_an_error_in_a_stream_of_events_is_its_last(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("Hel"), RequestError(503, "Gone.", code="gone")]
    *_, last = named(client.post(RESPONSES, json={"input": "Hi", "stream": True}).text)
    assert (last["type"], last["code"], last["message"]) == ("error", "gone", "Gone.")


def test_the_sdk_reads_responses() -> None:
    backend = ScriptedBackend()
    backend.tokenizer.chat_template = HERMES
    backend.script = say("Hi ", CALL)
    with serving(make_app(backend, auth=True)) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
        whole = client.responses.create(model=MODEL, input="Hi", tools=[FLAT])
        assert [item.type for item in whole.output] == ["message", "function_call"]
        with client.responses.stream(model=MODEL, input="Hi", tools=[FLAT]) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert "response.function_call_arguments.done" in kinds
        assert final.output_text == "Hi"


# --- messages


def anthropic(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], **fields}


def test_a_message(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("<think>hm</think>Hello#")
    body = client.post(
        MESSAGES, json=anthropic(system=[{"type": "text", "text": "S"}], stop_sequences=["#"])
    ).json()
    assert prompt(backend).startswith("system\nS\nuser\nHi\n")
    assert (body["type"], body["role"]) == ("message", "assistant")
    assert body["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "Hello"},
    ]
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "#")
    assert body["usage"]["input_tokens"] == len(backend.asked[-1].prompt)


def test_a_streamed_message_grows_block_by_block(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("Sure", ". ", CALL)
    body = anthropic(tools=[ANTHROPIC_TOOL, {"type": "web_search_20250305", "name": "web_search"}])
    events = named(client.post(MESSAGES, json=body | {"stream": True}).text)
    assert [e["type"] for e in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[5]["content_block"]["name"] == "f"
    assert events[6]["delta"] == {"type": "input_json_delta", "partial_json": '{"x": 1}'}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    whole = client.post(MESSAGES, json=body).json()
    assert whole["stop_reason"] == "tool_use"
    assert [b["type"] for b in whole["content"]] == ["text", "tool_use"]
    assert whole["content"][1]["input"] == {"x": 1}


def test_a_history_of_blocks_becomes_messages(client: TestClient, backend: ScriptedBackend) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Sure."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
            {"type": "text", "text": "And?"},
        ]},
    ]  # fmt: skip
    backend.tokenizer.chat_template = "{{ messages | tojson }}"
    assert client.post(MESSAGES, json=anthropic(messages=messages)).status_code == 200
    said = json.loads(bytes(backend.asked[-1].prompt))
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "user"]
    assert said[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert said[1]["reasoning_content"] == "hm"
    assert (said[2]["content"], said[3]["content"]) == ("42", "And?")


def test_a_last_message_of_the_assistant_is_continued(client: TestClient, backend: ScriptedBackend) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    client.post(MESSAGES, json=anthropic(messages=messages))
    assert prompt(backend).endswith("assistant\nWell,")
    assert backend.asked[-1].prompt.count(IM_END) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"tools": [{"name": 5}]},
        {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "x"}},
        {"temperature": "x"},
    ],
)
def test_errors_have_anthropics_shape(client: TestClient, fields: dict[str, Any]) -> None:
    response = client.post(MESSAGES, json=anthropic(**fields))
    assert response.status_code == 400, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"messages": []}, "invalid_request_error"), ({"model": "other"}, "not_found_error")],
)
def test_counting_tokens_fails_in_anthropics_shape(
    client: TestClient, fields: dict[str, Any], kind: str
) -> None:
    body = client.post("/v1/messages/count_tokens", json=anthropic(**fields)).json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)


def test_the_key_may_be_where_anthropics_clients_put_it() -> None:
    client = TestClient(make_app(ScriptedBackend(), auth=True))
    for path, body in ((MESSAGES, anthropic()), ("/v1/messages/count_tokens", anthropic())):
        assert client.post(path, json=body, headers={"x-api-key": KEY}).status_code == 200
        assert client.post(path, json=body, headers={"x-api-key": "wrong"}).status_code == 401
    assert client.get("/v1/models", headers={"x-api-key": KEY}).status_code == 200


# --- tokens


def test_text_to_tokens_and_back(client: TestClient, backend: ScriptedBackend) -> None:
    body = client.post("/tokenize", json={"model": MODEL, "prompt": "Hi", "return_token_strs": True}).json()
    assert body == {
        "tokens": [BOS, 72, 105],
        "count": 3,
        "max_model_len": 4000,
        "token_strs": ["<bos>", "H", "i"],
    }
    assert client.post("/tokenize", json={"content": "Hi"}).json()["tokens"] == [72, 105]
    llamacpp = {"content": "é<eos>", "add_special": True, "with_pieces": True}
    assert client.post("/tokenize", json=llamacpp).json()["tokens"] == [
        {"id": BOS, "piece": "<bos>"},
        {"id": 0xC3, "piece": [0xC3]},
        {"id": 0xA9, "piece": [0xA9]},
        {"id": EOS, "piece": "<eos>"},
    ]
    body = client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    client.post(CHAT, json=chat())
    assert body["tokens"] == backend.asked[-1].prompt
    assert client.post("/detokenize", json={"tokens": [72, 105]}).json() == {"prompt": "Hi", "content": "Hi"}
    back = client.post("/detokenize", json={"tokens": backend.asked[-1].prompt}).json()["prompt"]
    assert back.startswith("<|im_start|>user\nHi<|im_end|>")
    assert client.post("/tokenize", json={"content": back}).json()["tokens"] == backend.asked[-1].prompt
    written = client.post(
        "/apply-template", json={"messages": [{"role": "user", "content": "<|im_end|>"}]}
    ).json()
    assert written["prompt"].startswith("<|im_start|>user\n<|im_end|><|im_end|>")
    assert client.post("/v1/messages/count_tokens", json=anthropic()).json() == {
        "input_tokens": len(body["tokens"])
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {"tokens": [999]}),
        ("/detokenize", {"tokens": "x"}),
        ("/tokenize", {"prompt": "x", "model": 3}),
    ],
)
def test_tokens_refuse_by_name(client: TestClient, path: str, body: dict[str, Any]) -> None:
    assert error(client.post(path, json=body), 400)["param"] in ("prompt", "tokens", "model")


@pytest.mark.parametrize("tools", [5, "f", [5], ["f"], [None]])
def test_allowed_tools_that_are_no_tools_are_refused(client: TestClient, tools: Any) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": tools}
    body = {"model": MODEL, "input": "Hi", "tools": [FLAT], "tool_choice": choice}
    assert error(client.post(RESPONSES, json=body), 400)["param"].startswith("tool_choice")


# --- bodies and pages


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_read(client: TestClient, encoding: str, encode: Any) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    data = encode(json.dumps(chat()).encode())
    assert client.post(CHAT, content=data, headers=headers).status_code == 200
    assert error(client.post(CHAT, content=data[:-6], headers=headers), 400)["code"] == "invalid_encoding"
    assert error(client.post(CHAT, content=b"{}", headers=headers), 400)["code"] == "invalid_encoding"
    assert error(client.post(CHAT, content=data + data, headers=headers), 400)["code"] == "invalid_encoding"
    bomb = encode(b" " * (64 << 20))
    assert len(bomb) < 1 << 20
    assert error(client.post(CHAT, content=bomb, headers=headers), 413)["code"] == "request_too_large"
    headers["content-encoding"] = "br"
    assert error(client.post(CHAT, content=data, headers=headers), 415)["code"] == "unsupported_media_type"


def test_pages_of_listed_origins_are_let_in() -> None:
    listen = Listen(origins=web_origins("https://app.example.com/, http://localhost:3000"))
    app = uvicorn_config(make_app(ScriptedBackend()), listen, keyed=False).app
    client = TestClient(app, base_url="http://127.0.0.1")  # type: ignore[arg-type]
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin in ("https://app.example.com", "http://localhost:3000"):
        preflight = client.options(CHAT, headers={"origin": origin, **asking})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        answer = client.post(CHAT, json=chat(), headers={"origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
    assert client.post(CHAT, json=chat(), headers={"origin": "https://evil.example"}).status_code == 403
    with pytest.raises(ConfigError, match="no origin"):
        web_origins("app.example.com")


# --- parameters of other surfaces


@pytest.mark.parametrize(
    ("path", "param", "fields"),
    [
        *(
            (path, param, {param: value})
            for path in (RESPONSES, MESSAGES)
            for param, value in {
                "repeat_penalty": 1.5, "n_predict": 5, "chat_template": "x", "n": 2, "top_logprobs": 3,
                "guided_whitespace_pattern": "x", "logprobs": True, "prompt_logprobs": 1, "use_beam_search": True,
            }.items()
        ),
        *(
            (RESPONSES, param, {param: value})
            for param, value in {
                "response_format": {"type": "json_object"}, "max_tokens": 5, "max_completion_tokens": 5,
                "messages": [], "reasoning_effort": "low", "include": ["message.output_text.logprobs"],
            }.items()
        ),
        (MESSAGES, "stop", {"stop": "x"}),
        (MESSAGES, "parallel_tool_calls", {"parallel_tool_calls": False}),
        (MESSAGES, "output_config.format", {"output_config": {"format": {"type": "json_schema"}}}),
        ("/v1/messages/count_tokens", "n_predict", {"n_predict": 5}),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_on_every_surface(
    client: TestClient, path: str, param: str, fields: dict[str, Any]
) -> None:
    body = {"input": "Hi"} if path == RESPONSES else anthropic()
    response = client.post(path, json=body | fields)
    assert response.status_code == 400, response.text
    told = response.json()["error"]
    assert told["message"].startswith(f"{param}: ")
    if path == RESPONSES:
        assert (told["param"], told["code"]) == (param, "unsupported_parameter")


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_constraints_hold_on_every_surface(client: TestClient, backend: ScriptedBackend, path: str) -> None:
    body = {"input": "Hi"} if path == RESPONSES else anthropic()
    extra = {
        "bad_words": ["no"], "allowed_token_ids": [65, 66], "stop_token_ids": [10], "logit_bias": {"65": 2},
        "frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.1, "min_tokens": 3,
        "ignore_eos": True, "regex": "a+", "wisp": {"draft": False}, "n": 1, "top_logprobs": 0, "best_of": 1,
        "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    assert client.post(path, json=body | extra).status_code == 200
    asked = backend.asked[-1]
    found = asked.sampling.constraints
    assert found is not None
    assert found.banned
    assert found.grammar == Grammar("regex", "a+")
    assert (found.allowed, found.stop_token_ids, found.logit_bias) == ((65, 66), (10,), ((65, 2.0),))
    assert (found.frequency_penalty, found.presence_penalty, found.repetition_penalty) == (0.5, 0.25, 1.1)
    assert (asked.ignore_eos, asked.extras.draft) == (True, False)
    told = client.post(path, json=body | {"wisp": {"nope": 1}}).json()["error"]
    assert told["message"].startswith("wisp.nope: ")


def test_a_call_of_no_tool_cannot_be_forced(client: TestClient) -> None:
    server_tool = {"type": "web_search_20250305", "name": "web_search"}
    for choice in ({"type": "any"}, {"type": "tool", "name": "web_search"}):
        response = client.post(MESSAGES, json=anthropic(tools=[server_tool], tool_choice=choice))
        assert response.status_code == 400
        assert "only allowed where there are tools" in response.json()["error"]["message"]
    for type_ in ("auto", "none"):
        body = anthropic(tools=[server_tool], tool_choice={"type": type_})
        assert client.post(MESSAGES, json=body).status_code == 200


def test_messages_of_nothing_that_can_be_read_are_refused(client: TestClient) -> None:
    hidden = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}
    for extra in ({}, {"system": "S"}):
        response = client.post(MESSAGES, json=anthropic(messages=[hidden], **extra))
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("messages: ")
    asked = anthropic(messages=[{"role": "user", "content": "Hi"}, hidden])
    assert client.post(MESSAGES, json=asked).status_code == 200


# --- errors speak of what the client has sent


CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}
ANSWERED = {"role": "user", "content": [
    {"type": "tool_result", "tool_use_id": "t", "content": "42"}, {"type": "text", "text": "And?"},
]}  # fmt: skip


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("text.format", {"text": {"format": {"type": "json_object"}}, "regex": "a"}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "schema": 5}}}),
        ("reasoning.effort", {"reasoning": {"effort": 5}}),
        ("input", {"input": "x" * 50_000}),
        ("input", {"input": "x" * 5000}),
        ("input[1].role", {"input": [{"role": "user", "content": "Hi"}, {"role": "robot", "content": "x"}]}),
        ("input[1].arguments", {"input": [{"role": "user", "content": "Hi"}, CALLED]}),
        ("input[1].name", {"input": [{"role": "user", "content": "Hi"}, CALLED | {"name": 5}]}),
        ("tools[1].name", {"tools": [{"type": "web_search"}, {"type": "function"}]}),
        ("tools[1].parameters", {"tools": [{"type": "custom"}, FLAT | {"parameters": 5}]}),
        ("tool_choice.name", {"tools": [FLAT], "tool_choice": {"type": "function"}}),
    ],
)
def test_an_error_of_a_response_names_what_was_sent(
    client: TestClient, param: str, fields: dict[str, Any]
) -> None:
    body = {"input": "Hi", "instructions": "Be brief."} | fields
    told = error(client.post(RESPONSES, json=body), 400)
    if param == "text.format":  # the second of two is named
        assert told["message"] == "regex: cannot be used together with text.format"
        return
    assert told["param"] == param
    if "maximum context" not in told["message"]:
        assert told["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("stop_sequences", {"stop_sequences": ["x"] * 65}),
        ("messages[1].content", {"messages": [ANSWERED, {"role": "user", "content": None}]}),
        ("messages[1].content[0].input", {"messages": [ANSWERED, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t", "name": "f", "input": 5}]}]}),
        ("messages[1].content[0]", {"messages": [ANSWERED, {"role": "user", "content": [
            {"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]}),
        ("tools[1].input_schema", {"tools": [{"type": "x_1"}, {"name": "f", "input_schema": 5}]}),
        ("messages", {"messages": [ANSWERED, {"role": "assistant", "content": "Well,"}],
                      "add_generation_prompt": True}),
    ],
)  # fmt: skip
def test_an_error_of_a_message_names_what_was_sent(
    client: TestClient, path: str, fields: dict[str, Any]
) -> None:
    for url in (MESSAGES, "/v1/messages/count_tokens"):
        response = client.post(url, json=anthropic(system="S", **fields))
        assert response.status_code == 400, response.text
        assert f"{path}: " in response.text


def test_an_error_while_generating_names_what_was_sent(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [RequestError(400, "Too long.", code="context_length_exceeded", param="messages")]
    for path, body, param in (
        (RESPONSES, {"input": "Hi"}, "input"),
        ("/v1/completions", {"prompt": "Hi"}, "prompt"),
        (CHAT, chat(), "messages"),
    ):
        assert error(client.post(path, json=body), 400)["param"] == param
