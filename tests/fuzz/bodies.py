"""What comes over HTTP: bodies of requests, and headers."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

from api_fakes import MODEL, ByteTokenizer
from fuzz.base import FuzzTarget, Reader, must
from wisp.api.anthropic_request import parse_anthropic
from wisp.api.backend import Target
from wisp.api.body import parsed
from wisp.api.errors import error_body
from wisp.api.keys import Keyring
from wisp.api.prepare import prepare
from wisp.api.requests import parse_chat, parse_completion
from wisp.api.responses_request import parse_response
from wisp.api.slo import parse_slo
from wisp.api.tokens import apply_template, detokenize, tokenize
from wisp.core.errors import RequestError
from wisp.core.protocol.messages import Open, decode_edge_message, encode
from wisp.core.protocol.slo import Slo

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
]  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a+$"}}, "required": ["a"]}
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "max_tokens": 16, "n": 2}
CONSTRAINED = {
    "logit_bias": {"65": -1.5, "66": 2},
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.1,
    "bad_words": ["no"],
    "allowed_token_ids": [65, 66, 67],
    "stop_token_ids": [67],
    "min_tokens": 2,
    "ignore_eos": True,
}
USER = [{"role": "user", "content": "Hi"}]
BODIES: Mapping[str, list[dict[str, Any]]] = {
    "chat": [
        {
            "model": MODEL,
            "messages": USER,
            **SAMPLED,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
        {
            "messages": MESSAGES,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        {
            "messages": USER,
            **CONSTRAINED,
            "logprobs": True,
            "top_logprobs": 5,
            "stop": ["a", "b"],
            "wisp": {"rounds": True},
        },
        {
            "messages": USER,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        },
        {
            "messages": USER,
            "structured_outputs": {"choice": ["a", "b"]},
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "messages": [*USER, {"role": "assistant", "content": "So"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "reasoning_effort": "low",
        },
    ],
    "completion": [
        {"model": MODEL, "prompt": "Once", **SAMPLED, "echo": True, "logprobs": 3},
        {"prompt": ["a", "b"], **CONSTRAINED, "guided_regex": "a+"},
        {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 4, "stop": "x", "guided_json": SCHEMA},
        {"prompt": "a", "suffix": "b", "prompt_logprobs": 2},
    ],
    "response": [
        {"input": "Hi", "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5},
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "2"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
            "reasoning": {"effort": "low"},
        },
    ],
    "anthropic": [
        {
            "max_tokens": 9,
            "system": "Be brief.",
            "messages": USER,
            "stop_sequences": ["x"],
            "thinking": {"type": "enabled", "budget_tokens": 9},
        },
        {
            "max_tokens": 9,
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c",
                            "content": [{"type": "text", "text": "2"}],
                        }
                    ],
                },
            ],
            "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
            "tool_choice": {"type": "tool", "name": "f"},
        },
    ],
    "tokens": [
        {"prompt": "Hi", "add_special_tokens": True, "return_token_strs": True},
        {"content": "Hi", "add_special": True, "with_pieces": True},
        {"messages": MESSAGES, "tools": [TOOL]},
        {"tokens": [65, 66]},
    ],
}
HEADERS = {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "20"}


def unasked() -> None:
    """Nobody has left."""


def now(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, on a loop only where it has to wait."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise LookupError


def with_headers(reader: Callable[..., Any], body: dict[str, Any]) -> Any:
    return reader(body, HEADERS)


def bodies(_: Path) -> Reader:
    """A body through all that reads bodies, until one has made a prompt of it."""
    target = Target(MODEL, ByteTokenizer(), 200, "d")
    count = 0

    def parse(data: bytes, with_: Callable[[dict[str, Any]], Any]) -> Any:
        try:
            return now(parsed(data, with_))
        except LookupError:  # a long one, which a thread reads
            return asyncio.run(parsed(data, with_))

    def attempt(what: Callable[..., Any], *args: Any) -> Any:
        """None where it is refused."""
        try:
            return what(*args)
        except RequestError as error:
            must(400 <= error.status < 500, f"status {error.status}: {error}")
            msgspec.json.encode(error_body(error))

    def read(data: bytes) -> None:
        nonlocal count
        count += 1
        for reader in (parse_chat, parse_completion, parse_response, parse_anthropic):
            ask = attempt(parse, data, functools.partial(with_headers, reader))
            if ask is None:
                continue
            must(ask.sampling.problem() is None, f"sampling was taken that is out of range: {ask.sampling}")
            if count % 4 == 0:
                prepared = attempt(prepare, ask, target)
                if prepared is not None:
                    check_prepared(prepared, target)
        for work in (tokenize, detokenize, apply_template):
            answer = attempt(parse, data, functools.partial(work, target=target, check=unasked))
            msgspec.json.encode(answer)

    return read


def check_prepared(prepared: Any, target: Target) -> None:
    for generation in prepared.generations:
        size = len(generation.prompt)
        must(size > 0 and size + generation.max_tokens <= target.context, "a prompt does not fit its context")
        must(
            0 <= min(generation.prompt) <= max(generation.prompt) < target.tokenizer.n_vocab, "an id is none"
        )
        open_ = Open("session1", 0, generation.prompt, generation.sampling, generation.max_tokens)
        must(decode_edge_message(encode(open_)) is not None, "a request does not survive the wire")


def headers(_: Path) -> Reader:
    ring = Keyring(None, "secret,another", "router's")

    def read(data: bytes) -> None:
        text = data.decode("latin-1")
        for name in ("x-slo-ttft-ms", "x-slo-class"):
            try:
                slo = parse_slo({name: text}, {"patient": Slo(1.0, 1.0)})
                must(slo is None or 0 <= slo.ttft_ms <= 1e9, "a target that is none")
            except RequestError:
                pass
        try:
            who = ring.authorize(text)
        except RequestError as error:
            must("secret" not in str(error), "a key is in an error")
        else:
            _, _, said = text.partition(" ")
            known = said.strip() in ("secret", "another") or text.partition("/")[0] in (
                "router's",
                "Bearer router's",
            )
            must(known, f"{text!r} was let in as {who!r}")

    return read


HTTP = (
    FuzzTarget(
        "bodies",
        lambda: [body for bodies_ in BODIES.values() for body in bodies_],
        msgspec.json.encode,
        bodies,
        (),
        count=1_000_000,
        quick=1_500,
    ),
    FuzzTarget(
        "headers",
        lambda: ["Bearer secret", "Bearer router's/alice", "500", "patient", "bearer another"],
        lambda value: str(value).encode("utf-8", "replace"),
        headers,
        (),
        count=1_000_000,
        quick=4_000,
    ),
)
