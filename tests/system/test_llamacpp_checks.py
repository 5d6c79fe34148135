"""What llama.cpp's own server tests check of OpenAI's and Anthropic's surface, on a verifier and an edge that drafts.

docs/compatibility-llamacpp.md lists all of llama.cpp's checks, and says which test shows what.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from harness import HTTP, MODEL, Fleet, Process, Stream
from waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_pair")]

TEXT, CHAT, RESPONSES, MESSAGES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
)
PORTS = ("server", "edge")
ALIAS = "the-other-name"
ASKED = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
PROMPT = "I believe the meaning of life is"
LONG = "word " * 600  # more than the context of the harness
TOOL = {
    "type": "function",
    "function": {
        "name": "test",
        "parameters": {
            "type": "object",
            "properties": {"success": {"type": "boolean", "const": True}},
            "required": ["success"],
            "additionalProperties": False,  # or a small model thinks of others for ever
        },
    },
}
ANTHROPIC_TOOL = {"name": "test", "input_schema": TOOL["function"]["parameters"]}  # type: ignore[index]


@pytest.fixture(scope="module")
def processes(tiny_pair: None, shared: Fleet) -> dict[str, Process]:
    server = shared.serve("--served-model-name", ALIAS)
    return {"server": server, "edge": shared.edge(server.url, "--served-model-name", ALIAS)}


@pytest.fixture(params=PORTS)
def process(request: pytest.FixtureRequest, processes: dict[str, Process]) -> Process:
    return processes[request.param]


@pytest.fixture
def url(process: Process) -> str:
    return process.url


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, **HTTP)


def good(url: str, path: str, **body: Any) -> dict[str, Any]:
    answer = post(url, path, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def bad(url: str, path: str, **body: Any) -> dict[str, Any]:
    """The error of a request that is at fault."""
    answer = post(url, path, **body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]  # type: ignore[no-any-return]


def events(url: str, path: str, **body: Any) -> list[dict[str, Any]]:
    """All of a stream."""
    answer = post(url, path, stream=True, **body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def choice(body: dict[str, Any]) -> dict[str, Any]:
    (only,) = body["choices"]
    return only  # type: ignore[no-any-return]


def said(body: dict[str, Any]) -> str:
    """What a chat's only answer says."""
    return choice(body)["message"]["content"]  # type: ignore[no-any-return]


def tokens_of(url: str, text: str) -> list[int]:
    return good(url, "/tokenize", content=text)["tokens"]  # type: ignore[no-any-return]


def sdk(url: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, http_client=http)


# --- the server


def test_it_is_healthy_and_lists_the_model_under_all_of_its_names(url: str) -> None:
    assert httpx.get(f"{url}/health", **HTTP).status_code == 200
    listed = httpx.get(f"{url}/v1/models", **HTTP).json()["data"]
    assert [model["id"] for model in listed] == [MODEL, ALIAS]
    for name in (None, MODEL, ALIAS):
        named = good(url, TEXT, model=name, prompt=PROMPT, max_tokens=1)
        assert named["model"] == (name or MODEL)


def test_a_path_without_its_version_is_not_found_and_the_error_says_where_it_is(url: str) -> None:
    for method, path in (("POST", "/chat/completions"), ("GET", "/models")):
        answer = httpx.request(method, f"{url}{path}", **HTTP)
        assert answer.status_code == 404
        assert f"There is /v1{path}: let the base URL end in /v1" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/rerank", "/v1/audio/transcriptions", "/completion", "/infill", "/props"]
)
def test_unknown_paths_are_404_with_an_error_object(url: str, path: str) -> None:
    answer = post(url, path, input="hello")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


# --- completions


def test_a_completion_counts_its_tokens_and_ends_by_its_limit(url: str) -> None:
    body = good(url, TEXT, prompt=PROMPT, max_tokens=8, ignore_eos=True, seed=1)
    assert (choice(body)["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 8)
    assert body["usage"]["prompt_tokens"] == len(tokens_of(url, PROMPT))
    assert choice(body)["text"]
    assert body["system_fingerprint"].startswith("wisp-")


def test_a_streamed_completion_is_the_whole_one(url: str) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 24, "seed": 1, "ignore_eos": True}
    whole = good(url, TEXT, **fields)
    *chunks, last = events(url, TEXT, **fields, stream_options={"include_usage": True})
    assert "".join(choice(chunk)["text"] for chunk in chunks) == choice(whole)["text"]
    assert [choice(c)["finish_reason"] for c in chunks if choice(c)["finish_reason"]] == ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 24


def test_the_sdk_completes_whole_and_streamed(url: str) -> None:
    with sdk(url) as client:
        fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "seed": 1}
        whole = client.completions.create(**fields)
        streamed = client.completions.create(**fields, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
        assert whole.system_fingerprint


def test_a_stop_that_lies_across_tokens_ends_the_stream_before_it(url: str) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = choice(good(url, TEXT, **fields))["text"]
    at = len(text) // 2
    stops = ["no text has this\n", text[at : at + 7]]
    whole = choice(good(url, TEXT, **fields, stop=stops))
    chunks = events(url, TEXT, **fields, stop=stops)
    assert (whole["text"], whole["finish_reason"]) == (text[: text.index(stops[1])], "stop")
    assert "".join(choice(chunk)["text"] for chunk in chunks) == whole["text"]


def test_a_seed_gives_one_text_cached_or_not_alone_or_in_a_crowd_and_others_give_others(url: str) -> None:
    prompt = f"{url[-5:]}: " + "a long beginning " * 10

    def text(seed: int) -> dict[str, Any]:
        return good(url, TEXT, prompt=prompt, max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)

    cold = text(42)  # its prompt is nobody's yet
    with ThreadPoolExecutor(8) as crowd:
        found = list(crowd.map(text, [42, 42, 42, 42, 0, 1, 2, 3]))
    assert {choice(body)["text"] for body in found[:4]} == {choice(cold)["text"]}
    assert len({choice(body)["text"] for body in found[3:]}) == 5
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] < cold["usage"]["prompt_tokens"] // 2
    assert text(42)["usage"]["prompt_tokens_details"]["cached_tokens"] > cold["usage"]["prompt_tokens"] // 2


def test_more_requests_than_slots_are_all_answered(url: str) -> None:
    prompts = [f"Write a very long {what}." for what in ("book", "poem", "song", "joke", "play", "letter")]

    def text(prompt: str) -> str:
        return choice(good(url, TEXT, prompt=prompt, max_tokens=16, seed=42, ignore_eos=True))["text"]  # type: ignore[no-any-return]

    with ThreadPoolExecutor(6) as crowd:
        together = list(crowd.map(text, prompts))
    assert together == [text(prompt) for prompt in prompts]
    listed = good(url, TEXT, prompt=prompts, max_tokens=16, seed=42, ignore_eos=True)["choices"]
    assert [c["index"] for c in listed] == list(range(6))
    assert listed[0]["text"] == together[0]


def test_prompts_are_text_or_token_ids_or_lists_of_both(url: str) -> None:
    ids = tokens_of(url, PROMPT)
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    alone = choice(good(url, TEXT, prompt=ids, **fields))["text"]
    for prompts in ([ids, ids], [ids, PROMPT], [PROMPT, ids]):
        found = good(url, TEXT, prompt=prompts, **fields)["choices"]
        assert [c["text"] for c in found] == [alone, alone]
    assert bad(url, TEXT, prompt=[1, 2, PROMPT, 3], **fields)["param"] == "prompt"  # llama.cpp joins these


def test_a_prompt_that_does_not_fit_is_refused_and_one_that_just_does_is_answered(url: str) -> None:
    for fields in ({}, {"stream": True}):
        assert bad(url, TEXT, prompt=LONG, **fields)["code"] == "context_length_exceeded"
    context = httpx.get(f"{url}/v1/models/{MODEL}", **HTTP).json()["max_model_len"]
    ids = (tokens_of(url, PROMPT) * context)[: context - 3]  # less room than a draft is long
    body = good(url, TEXT, prompt=ids, max_tokens=64, temperature=0, ignore_eos=True)
    assert (choice(body)["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 3)


def test_a_limit_beyond_the_context_means_what_is_left(url: str) -> None:
    context = httpx.get(f"{url}/v1/models/{MODEL}", **HTTP).json()["max_model_len"]
    ids = (tokens_of(url, PROMPT) * context)[: context - 40]
    for limit in (64, 1 << 20):
        body = good(url, TEXT, prompt=ids, max_tokens=limit, ignore_eos=True, seed=3)
        assert body["usage"]["completion_tokens"] == 40
    *_, last = events(url, TEXT, prompt=ids, max_tokens=256, ignore_eos=True, seed=3)
    assert choice(last)["finish_reason"] == "length"


def test_completions_tell_log_probabilities_whole_and_streamed(url: str) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "logprobs": 5}
    whole = choice(good(url, TEXT, **fields))["logprobs"]
    assert len(whole["tokens"]) == len(whole["token_logprobs"]) == 5
    assert all(value <= 0 for value in whole["token_logprobs"])
    assert all(len(top) == 5 for top in whole["top_logprobs"])
    parts = [part for c in events(url, TEXT, **fields) if (part := choice(c)["logprobs"])]
    assert [t for part in parts for t in part["tokens"]] == whole["tokens"]
    assert [t for part in parts for t in part["top_logprobs"]] == whole["top_logprobs"]


def test_a_bias_of_minus_100_keeps_tokens_out(url: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 32, "temperature": 0, "ignore_eos": True}
    free = good(url, TEXT, prompt=PROMPT, logprobs=0, **fields)
    words = sorted(set(choice(free)["logprobs"]["tokens"]))[:6]
    bias = {str(t): -100 for word in words for t in tokens_of(url, word)}
    found = choice(good(url, TEXT, prompt=PROMPT, logprobs=0, logit_bias=bias, **fields))
    assert found["text"]
    assert not {str(t) for t in tokens_of(url, found["text"])} & bias.keys()
    chat = good(url, CHAT, messages=ASKED, logit_bias=bias, **fields)
    assert said(chat)
    assert not {str(t) for t in tokens_of(url, said(chat))} & bias.keys()
    for other in ({" the ": -100}, [[17, -100]]):  # llama.cpp's own ways to say it
        assert bad(url, TEXT, prompt=PROMPT, logit_bias=other, **fields)["param"].startswith("logit_bias")


def test_a_client_that_hangs_up_frees_its_slot(process: Process) -> None:
    with Stream(process.url, PROMPT, max_tokens=400, ignore_eos=True) as stream:
        stream.until(lambda answer: bool(answer.text))
    eventually(lambda: process.metrics()["wisp:num_requests_running"] == 0)


def test_an_end_is_ignored_where_that_is_asked_for(url: str) -> None:
    """An end that is forced upon the answer would end it at once."""
    ends = tokens_of(url, "<|im_end|>")
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "allowed_token_ids": ends}
    ended = good(url, TEXT, **fields)
    assert (choice(ended)["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", 1)
    ignored = good(url, TEXT, **fields, ignore_eos=True)
    assert (choice(ignored)["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 4)


# --- chat


@pytest.mark.parametrize(
    "content",
    [
        "What is the best book",
        [{"type": "text", "text": "What is"}, {"type": "text", "text": "the best book"}],
    ],
)
def test_a_chat_is_answered(url: str, content: Any) -> None:
    messages = [ASKED[0], {"role": "user", "content": content}]
    body = good(url, CHAT, model=None, messages=messages, max_tokens=8, ignore_eos=True)
    assert (body["object"], choice(body)["message"]["role"]) == ("chat.completion", "assistant")
    assert body["id"].startswith("chatcmpl-")
    assert (choice(body)["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 8)
    assert body["usage"]["prompt_tokens"] == good(url, "/tokenize", messages=messages)["count"]
    assert said(body)


def test_a_streamed_chat_is_the_whole_one(url: str) -> None:
    fields: dict[str, Any] = {"messages": ASKED, "max_tokens": 24, "seed": 9, "ignore_eos": True}
    whole = good(url, CHAT, **fields)
    first, *chunks, end, usage = events(url, CHAT, **fields, stream_options={"include_usage": True})
    assert choice(first)["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice(chunk)["delta"]["content"] for chunk in chunks) == said(whole)
    assert not any("role" in choice(chunk)["delta"] or choice(chunk)["finish_reason"] for chunk in chunks)
    assert (choice(end)["delta"], choice(end)["finish_reason"]) == ({}, "length")
    assert len({chunk["id"] for chunk in (first, *chunks, end)}) == 1
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 24)


def test_the_sdk_gets_log_probabilities_that_spell_the_answer(url: str) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": ASKED,
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 10,
        "extra_body": {"ignore_eos": True},
    }
    with sdk(url) as client:
        whole = client.chat.completions.create(**fields).choices[0]
        streamed = [c.choices[0] for c in client.chat.completions.create(**fields, stream=True)]
    entries = whole.logprobs.content
    assert "".join(entry.token for entry in entries) == whole.message.content
    assert all(entry.logprob <= 0 and entry.bytes and len(entry.top_logprobs) == 10 for entry in entries)
    assert [e for c in streamed if c.logprobs for e in c.logprobs.content] == entries


def test_a_chat_that_does_not_fit_is_refused_whole_and_streamed(url: str) -> None:
    for fields in ({}, {"stream": True}):
        refused = bad(url, CHAT, messages=ASKED * 100, **fields)
        assert (refused["code"], refused["param"]) == ("context_length_exceeded", "messages")
        assert "512 tokens" in refused["message"]


def test_a_chat_may_have_several_answers(url: str) -> None:
    body = good(url, CHAT, messages=ASKED, max_tokens=8, n=2, seed=5, ignore_eos=True)
    assert [(c["index"], c["message"]["role"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "assistant", "length"),
        (1, "assistant", "length"),
    ]
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "string",
        [],
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "system", "content": 123}],
        [{"content": "hello"}],
        [{"role": "system", "content": "test"}, {}],
    ],
    ids=str,
)
def test_malformed_messages_are_refused(url: str, messages: Any) -> None:
    assert bad(url, CHAT, messages=messages)["param"].startswith("messages")


def test_an_answer_that_is_begun_goes_on_where_that_is_asked_for(url: str) -> None:
    for begun in ("Whill", [{"type": "text", "text": "Whill"}]):
        messages = [*ASKED, {"role": "assistant", "content": begun}]
        prompt = good(url, "/apply-template", messages=messages, continue_final_message=True)["prompt"]
        assert prompt.endswith("<|im_start|>assistant\nWhill")
        used = good(url, CHAT, messages=messages, continue_final_message=True, max_tokens=4)["usage"]
        assert used["prompt_tokens"] == len(tokens_of(url, prompt))


def test_a_template_is_shown_with_or_without_a_beginning_of_the_answer(url: str) -> None:
    shown = good(url, "/apply-template", messages=ASKED)["prompt"]
    book = "<|im_start|>system\nBook<|im_end|>\n<|im_start|>user\nWhat is the best book<|im_end|>\n"
    assert shown == f"{book}<|im_start|>assistant\n"
    assert good(url, "/apply-template", messages=ASKED, add_generation_prompt=False)["prompt"] == book


# --- structured output


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object", "schema": {"const": "42"}}}, '"42"'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "fooo"}}}},
            '"fooo"',
        ),
        ({"json_schema": {"const": "42"}}, '"42"'),
        ({"grammar": 'root ::= "a"{5,5}'}, "aaaaa"),
    ],
    ids=str,
)
def test_text_is_what_a_schema_or_a_grammar_says(url: str, fields: dict[str, Any], expected: str) -> None:
    for path, prompt in ((CHAT, {"messages": ASKED}), (TEXT, {"prompt": PROMPT})):
        body = choice(good(url, path, **prompt, max_tokens=64, **fields))
        assert (body.get("text") or body["message"]["content"], body["finish_reason"]) == (expected, "stop")


def test_json_is_json(url: str) -> None:
    array = {"type": "array", "items": {"type": "integer", "minimum": -99, "maximum": 99}, "maxItems": 4}
    for format_ in ({"type": "json_object"}, {"type": "json_object", "schema": array}):
        body = good(url, CHAT, messages=ASKED, max_tokens=200, seed=4, response_format=format_)
        assert said(body)[0] == ("[" if "schema" in format_ else "{")
        if choice(body)["finish_reason"] == "stop":
            json.loads(said(body))


@pytest.mark.parametrize(
    "format_",
    [
        {"type": "sound"},
        {"type": "json_object", "schema": 123},
        {"type": "json_object", "schema": {"type": 123}},
        {"type": "json_object", "schema": {"type": "hiccup"}},
    ],
    ids=str,
)
def test_malformed_response_formats_are_refused(url: str, format_: Any) -> None:
    assert bad(url, CHAT, messages=ASKED, response_format=format_)["param"].startswith("response_format")


# --- tools


@pytest.mark.parametrize(
    "fields", [{"tools": []}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": None}], ids=str
)
def test_without_tools_there_are_no_calls(url: str, fields: dict[str, Any]) -> None:
    body = good(url, CHAT, messages=ASKED, max_tokens=24, **fields)
    assert "tool_calls" not in choice(body)["message"]


def test_a_required_call_is_made_whole_and_streamed(url: str) -> None:
    fields = {"messages": ASKED, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    found = choice(good(url, CHAT, **fields, max_tokens=200))
    (call,) = found["message"]["tool_calls"]
    assert (found["message"]["content"], found["finish_reason"]) == (None, "tool_calls")
    assert call["function"]["name"] == "test"
    assert json.loads(call["function"]["arguments"]) == {"success": True}
    parts = [
        c
        for e in events(url, CHAT, **fields, max_tokens=200)
        for c in choice(e)["delta"].get("tool_calls", ())
    ]
    assert parts[0]["function"]["name"] == "test"
    assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]


def test_a_result_of_a_tool_is_answered_even_after_arguments_that_are_no_json(url: str) -> None:
    for arguments in ('{"success": true}', "{"):  # models write such; llama.cpp refuses it
        call = {"id": "call_1", "type": "function", "function": {"name": "test", "arguments": arguments}}
        messages = [
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "name": "test", "tool_call_id": "call_1", "content": "0.556"},
        ]
        body = good(url, CHAT, messages=messages, tools=[TOOL], max_tokens=8, ignore_eos=True)
        assert choice(body)["message"]["content"]


# --- tokens


def test_text_becomes_tokens_and_text_again(url: str) -> None:
    text = "What is the capital of France ?"
    ids = tokens_of(url, text)
    assert len(ids) > 5
    assert good(url, "/detokenize", tokens=ids)["content"] == text


def test_tokens_come_with_their_pieces(url: str) -> None:
    """A piece that is not UTF-8 by itself is told in bytes."""
    text = "A test with unicode 媽 and emoji 🤗"
    found = good(url, "/tokenize", content=text, with_pieces=True)["tokens"]
    assert [token["id"] for token in found] == tokens_of(url, text)
    pieces = [token["piece"] for token in found]
    assert all(pieces)
    assert any(isinstance(piece, list) for piece in pieces)
    assert b"".join(p.encode() if isinstance(p, str) else bytes(p) for p in pieces).decode() == text


# --- responses


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ({"type": "json_schema", "name": "test", "schema": {"const": "fooo"}}, '"fooo"'),
        ({"type": "json_object"}, "{"),
        ({"type": "text"}, ""),
    ],
    ids=str,
)
def test_a_response_has_the_format_that_was_asked_for(url: str, format_: Any, expected: str) -> None:
    text = {"format": format_}
    body = good(url, RESPONSES, input="Write an example", max_output_tokens=32, text=text)
    (item,) = body["output"]
    assert item["content"][0]["text"].startswith(expected)


def test_a_response_format_without_its_schema_is_refused(url: str) -> None:
    text = {"format": {"type": "json_schema", "name": "test"}}
    assert bad(url, RESPONSES, input="Hi", text=text)["param"] == "text.format.schema"


def test_the_sdk_reads_responses_whole_and_streamed(url: str) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "input": ASKED,
        "max_output_tokens": 8,
        "temperature": 0.8,
        "extra_body": {"seed": 3, "ignore_eos": True},
    }
    with sdk(url) as client:
        whole = client.responses.create(**fields)
        stream = list(client.responses.create(**fields, stream=True))
    assert whole.id.startswith("resp_")
    assert whole.output[0].id.startswith("msg_")
    created, last = stream[0], stream[-1]
    assert (created.type, created.response.id) == ("response.created", last.response.id)
    items = {e.item_id if hasattr(e, "item_id") else e.item.id for e in stream[2:-1]}
    assert items == {last.response.output[0].id}
    assert all(item.startswith("msg_") for item in items)
    deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
    assert "".join(deltas) == last.response.output_text == whole.output_text


# --- Anthropic's messages


def asked(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": 24, "messages": [{"role": "user", "content": "Say hello"}], "seed": 2, **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "You are a helpful assistant."},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"top_k": 40},
        {"metadata": {"user_id": "u"}},
        {"thinking": {"type": "enabled", "budget_tokens": 50}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("What is", "it?")]}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi there!"},
                {"role": "user", "content": "How are you?"},
            ]
        },
    ],
    ids=str,
)
def test_a_message_is_answered(url: str, fields: dict[str, Any]) -> None:
    body = good(url, MESSAGES, **asked(**fields))
    assert (body["type"], body["role"], body["content"][0]["type"]) == ("message", "assistant", "text")
    assert body["stop_reason"] in ("end_turn", "max_tokens")
    usage = body["usage"]
    assert usage.keys() == {"input_tokens", "cache_read_input_tokens", "output_tokens"}
    counted = good(
        url, f"{MESSAGES}/count_tokens", **{k: v for k, v in asked(**fields).items() if k != "max_tokens"}
    )
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert usage["output_tokens"] > 0
    assert "choices" not in body


@pytest.mark.parametrize(
    "result",
    [
        [{"type": "tool_result", "tool_use_id": "t1", "content": "Sunny, 25°C"}],
        [
            {"type": "text", "text": "Here it is:"},
            {"type": "tool_result", "tool_use_id": "t1", "content": "Sunny"},
        ],
        [{"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": "City not found"}],
    ],
    ids=["result", "with text", "error"],
)
def test_a_message_with_a_result_of_a_tool_is_answered(url: str, result: Any) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "test", "input": {"success": True}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": result},
    ]
    body = good(url, MESSAGES, **asked(messages=messages, tools=[ANTHROPIC_TOOL]))
    assert body["content"][0]["type"] == "text"


def test_a_message_uses_a_tool(url: str) -> None:
    fields = asked(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=200)
    body = good(url, MESSAGES, **fields)
    assert body["stop_reason"] == "tool_use"
    block = body["content"][-1]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "test", {"success": True})
    told = events(url, MESSAGES, **fields)
    starts = [e for e in told if e["type"] == "content_block_start"]
    stops = [e["index"] for e in told if e["type"] == "content_block_stop"]
    assert [e["index"] for e in starts] == stops == list(range(len(starts)))
    assert starts[-1]["content_block"]["name"] == "test"


def test_a_streamed_message_grows_block_by_block(url: str) -> None:
    body = good(url, MESSAGES, **asked())
    told = events(url, MESSAGES, **asked())
    kinds = [e["type"] for e in told]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = told[0]["message"]
    assert (start["role"], start["content"]) == ("assistant", [])
    assert start["usage"]["input_tokens"] > 0
    deltas = [e for e in told if e["type"] == "content_block_delta"]
    assert {(e["index"], e["delta"]["type"]) for e in deltas} == {(0, "text_delta")}
    assert "".join(e["delta"]["text"] for e in deltas) == body["content"][0]["text"]
    assert told[-2]["delta"]["stop_reason"] == body["stop_reason"]
    assert told[-2]["usage"] == body["usage"] | {
        k: told[-2]["usage"][k] for k in ("input_tokens", "cache_read_input_tokens")
    }


def test_a_message_ends_before_a_stop_sequence(url: str) -> None:
    text = good(url, MESSAGES, **asked(max_tokens=40))["content"][0]["text"]
    stop = text[len(text) // 2 :][:5]
    body = good(url, MESSAGES, **asked(max_tokens=40, stop_sequences=["nothing has this", stop]))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", stop)
    assert body["content"][0]["text"] == text[: text.index(stop)]


@pytest.mark.parametrize("messages", [None, []])
def test_a_message_needs_messages(url: str, messages: Any) -> None:
    assert post(url, MESSAGES, **asked(messages=messages)).status_code == 400


def test_pictures_are_refused(url: str) -> None:
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
    }
    refused = bad(url, MESSAGES, **asked(messages=[{"role": "user", "content": [picture]}]))
    assert "reads text alone" in refused["message"]
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    refused = bad(url, CHAT, messages=[{"role": "user", "content": [part]}])
    assert "reads text alone" in refused["message"]
