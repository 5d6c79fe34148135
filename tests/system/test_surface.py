"""Calls, schemas, constraints, several answers and scores on the tiny pair: the same at the server and at every edge,
whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest

from harness import DRAFT, HTTP, Fleet, Process

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_pair")]

KINDS = ("server", DRAFT, "ngram", "none")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 12}, "kind": {"enum": ["lamp", "tree"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Tell me a story about Belomi."}]
CHATS: dict[str, dict[str, Any]] = {
    "required": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "schema or a call": {
        "tools": [TOOL],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    },
    "choice": {"structured_outputs": {"choice": ["a lamp", "a tree"]}},
    "regex": {"regex": "[a-z]{3,9} [0-9]{2}"},
    "penalties": {
        "frequency_penalty": 1.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"17": -100, "40": 3, "41": 3},
        "max_tokens": 40,
    },
    "banned": {"bad_words": ["Belomi"], "max_tokens": 40},
    "answers": {"n": 3, "max_tokens": 12},
}


@pytest.fixture(scope="module")
def processes(tiny_pair: None, shared: Fleet) -> dict[str, Process]:
    server = shared.serve()
    edges = {kind: shared.edge(server.url, draft=kind, ready=False) for kind in KINDS[1:]}
    return {"server": server} | {kind: edge.wait_ready() for kind, edge in edges.items()}


def post(process: Process, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{process.url}{path}", json=body, **HTTP)
    assert answer.status_code == 200, answer.text
    return answer


def chat(process: Process, fields: dict[str, Any], temperature: float) -> list[dict[str, Any]]:
    """The choices, without the ids of calls, which are random."""
    body = {"messages": MESSAGES, "seed": 5, "temperature": temperature, **fields}
    choices: list[dict[str, Any]] = post(process, "/v1/chat/completions", body).json()["choices"]
    for choice in choices:
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
    return choices


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", CHATS)
def test_an_answer_is_the_same_everywhere(
    processes: dict[str, Process], name: str, temperature: float
) -> None:
    expected = chat(processes["server"], CHATS[name], temperature)
    for kind in KINDS[1:]:
        assert chat(processes[kind], CHATS[name], temperature) == expected, kind
    message = expected[0]["message"]
    if name == "required":
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]).keys() == {"city", "unit"}
        assert expected[0]["finish_reason"] == "tool_calls"
    if name == "schema" or (name == "schema or a call" and "tool_calls" not in message):
        found = json.loads(message["content"])
        jsonschema.validate(found, SCHEMA)
        assert message["content"] == json.dumps(found)
    if name == "choice":
        assert message["content"] in ("a lamp", "a tree")
    if name == "banned":
        assert "Belomi" not in message["content"]


def streamed(process: Process, fields: dict[str, Any], temperature: float) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    body = {"messages": MESSAGES, "seed": 5, "temperature": temperature, "stream": True, **fields}
    lines = post(process, "/v1/chat/completions", body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    choices: dict[int, dict[str, Any]] = {}
    for part in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(part["index"], {"content": "", "calls": {}, "finish_reason": None})
        whole["finish_reason"] = part["finish_reason"] or whole["finish_reason"]
        whole["content"] += part["delta"].get("content") or ""
        for call in part["delta"].get("tool_calls", ()):
            said = whole["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
            for name, piece in call["function"].items():
                said[name] += piece
    return [choices[i] for i in sorted(choices)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHATS)
def test_streamed_and_whole_answers_are_equal(processes: dict[str, Process], name: str, kind: str) -> None:
    whole = [
        {
            "content": choice["message"]["content"] or "",
            "calls": {i: c["function"] for i, c in enumerate(choice["message"].get("tool_calls", ()))},
            "finish_reason": choice["finish_reason"],
        }
        for choice in chat(processes[kind], CHATS[name], 1.0)
    ]
    assert streamed(processes[kind], CHATS[name], 1.0) == whole


def test_scores_are_the_same_everywhere_and_those_of_generation(processes: dict[str, Process]) -> None:
    """What a text scores is what its tokens had when the model wrote them."""
    server = processes["server"]
    written = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    choice = post(server, "/v1/completions", written).json()["choices"][0]
    tokens = post(server, "/tokenize", {"prompt": "Once upon"}).json()["tokens"]
    again = post(server, "/tokenize", {"prompt": "Once upon" + choice["text"]}).json()["tokens"]
    body = {"prompt": again, "max_tokens": 0, "echo": True, "logprobs": 2}
    found = {kind: post(processes[kind], "/v1/completions", body).json()["choices"][0] for kind in KINDS}
    for kind in KINDS:
        assert found[kind]["text"] == "Once upon" + choice["text"]
        assert found[kind]["logprobs"] == found["server"]["logprobs"]
    scored = found["server"]["logprobs"]["token_logprobs"]
    assert scored[0] is None
    if again[: len(tokens)] == tokens and len(again) == len(tokens) + len(choice["logprobs"]["tokens"]):
        assert scored[len(tokens) :] == choice["logprobs"]["token_logprobs"]


def test_cached_tokens_of_a_prompt_are_reported(processes: dict[str, Process]) -> None:
    prompt = "A long beginning that nobody has said before: " * 4
    for kind in ("server", "none"):
        said = {"prompt": f"{kind}. {prompt}", "max_tokens": 4}
        used = [post(processes[kind], "/v1/completions", said).json()["usage"] for _ in range(2)]
        cached = [u["prompt_tokens_details"]["cached_tokens"] for u in used]
        assert cached == [cached[0], used[1]["prompt_tokens"] - 1]
        assert cached[0] < used[0]["prompt_tokens"] // 2


def test_bad_grammars_are_refused_everywhere_by_the_parameter(processes: dict[str, Process]) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
    for kind in KINDS:
        body = {"messages": MESSAGES, "response_format": schema}
        answer = httpx.post(f"{processes[kind].url}/v1/chat/completions", json=body, **HTTP)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (
            400,
            "response_format",
            "invalid_grammar",
        )
        assert '"not"' in error["message"]
