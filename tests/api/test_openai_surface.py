"""Tools, reasoning, structured output, several answers, scores: the surface beyond plain text, request by request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fakes import BOS, EOS, IM_END, MODEL, ScriptedBackend, committed, make_app, say
from test_api_http import CHAT, TEXT, chat, error, events, text
from wisp.core.errors import GrammarError
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.step import Committed, TokenLogprob, TopLogprob
from wisp.engines.grammars import Grammars
from wisp.engines.plain import PlainTokenizer

HERMES = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
OTHER = {"type": "function", "function": {"name": "g"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.fixture
def backend() -> ScriptedBackend:
    backend = ScriptedBackend(context=4000)
    backend.tokenizer.chat_template = HERMES
    return backend


@pytest.fixture
def client(backend: ScriptedBackend) -> TestClient:
    return TestClient(make_app(backend, aliases=("alias",)), raise_server_exceptions=False)


def prompt(backend: ScriptedBackend) -> str:
    return bytes(i for i in backend.asked[-1].prompt if i < 256).decode()


def grammar(backend: ScriptedBackend) -> Grammar:
    constraints = backend.asked[-1].sampling.constraints
    assert constraints is not None
    assert constraints.grammar is not None
    return constraints.grammar


def deltas(body: str) -> list[dict[str, Any]]:
    return [c["choices"][0]["delta"] for c in events(body)[:-1]]


# --- tools


def test_a_call_is_told_as_one(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("Let me see.\n", CALL[:9], CALL[9:])
    body = client.post(CHAT, json=chat(tools=[TOOL])).json()
    choice = body["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": '{"x": 1}'})
    assert call["id"].isalnum()
    assert len(call["id"]) == 9
    assert body["usage"]["completion_tokens"] == len("Let me see.\n" + CALL) + 1


def test_a_streamed_call_comes_as_openai_sends_it(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("Hm. ", *CALL, "\n", *CALL)
    response = client.post(CHAT, json=chat(tools=[TOOL], stream=True))
    first, content, *calls, last = deltas(response.text)
    assert first == {"role": "assistant", "content": ""}
    assert (content, last) == ({"content": "Hm."}, {})
    heads, rests = [c["tool_calls"][0] for c in calls[::2]], [c["tool_calls"][0] for c in calls[1::2]]
    assert [(h["index"], h["type"], h["function"]) for h in heads] == [
        (i, "function", {"name": "f", "arguments": ""}) for i in (0, 1)
    ]
    assert rests == [{"index": i, "function": {"arguments": '{"x": 1}'}} for i in (0, 1)]
    assert events(response.text)[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_a_limit_cuts_is_content(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed(CALL[:30], "length")]
    choice = client.post(CHAT, json=chat(tools=[TOOL])).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == CALL[:30]
    assert "tool_calls" not in choice["message"]


def test_one_call_alone_ends_the_answer_at_the_same_token_in_any_groups(
    client: TestClient, backend: ScriptedBackend
) -> None:
    for pieces in ([CALL + "\n" + CALL], list(CALL + "\n" + CALL)):
        backend.script = say(*pieces)
        body = client.post(CHAT, json=chat(tools=[TOOL], parallel_tool_calls=False)).json()
        assert len(body["choices"][0]["message"]["tool_calls"]) == 1
        assert body["choices"][0]["finish_reason"] == "tool_calls"
        assert body["usage"]["completion_tokens"] == len(CALL)


def test_without_tools_the_text_is_as_it_is(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say(CALL)
    for extra in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = client.post(CHAT, json=chat(**extra)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert "tool_call" not in prompt(backend)


def test_required_and_named_calls_are_forced_by_a_grammar(
    client: TestClient, backend: ScriptedBackend
) -> None:
    backend.script = say(CALL)
    tools = [TOOL, OTHER]
    client.post(CHAT, json=chat(tools=tools, tool_choice="required"))
    found = grammar(backend)
    assert found.kind == "lark"
    assert found.after == ()
    assert "call: call0 | call1" in found.source
    assert '"<tool_call>"' in found.source
    client.post(CHAT, json=chat(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}}))
    assert "call: call0\n" in grammar(backend).source
    assert "call)*" not in grammar(backend).source
    assert '{\\"name\\": \\"g\\"' in grammar(backend).source
    assert '"f"' in prompt(backend)  # all are shown
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}}
    client.post(CHAT, json=chat(tools=tools, tool_choice=allowed))
    assert "call: call0\n" in grammar(backend).source


def test_a_strict_tool_constrains_calls_and_leaves_text_free(
    client: TestClient, backend: ScriptedBackend
) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
    client.post(CHAT, json=chat(tools=[strict]))
    assert "start: text calls?" in grammar(backend).source
    masks = Grammars(PlainTokenizer()).matcher(grammar(backend)).masks
    for answer in ("a < b", "Sure. " + CALL, "<tool" + CALL):
        assert len(masks(b"", answer.encode())) == len(answer) + 1
    assert len(masks(b"", CALL.replace("1", '"1"').encode())) <= len(CALL)
    client.post(CHAT, json=chat(tools=[TOOL]))
    assert backend.asked[-1].sampling.constraints is None


QWEN_XML = HERMES.replace("<tool_call>", "<tool_call><function=")
ALLOWED: dict[str, Any] = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}}


@pytest.mark.parametrize(
    ("template", "calls", "lead"),
    [
        (HERMES, '<tool_call>\n{"name": "NAME", "arguments": {}}\n</tool_call>', "Sure. "),
        (QWEN_XML, "<tool_call>\n<function=NAME>\n</function>\n</tool_call>", ""),
    ],
)
def test_of_some_allowed_tools_no_other_is_called_and_text_is_free(
    client: TestClient, backend: ScriptedBackend, template: str, calls: str, lead: str
) -> None:
    backend.tokenizer.chat_template = template
    assert client.post(CHAT, json=chat(tools=[TOOL, OTHER], tool_choice=ALLOWED)).status_code == 200
    assert '"f"' in prompt(backend)  # all are shown
    grammars = Grammars(PlainTokenizer())

    def may_say(answer: str) -> bool:
        return len(grammars.matcher(grammar(backend)).masks(b"", answer.encode())) > len(answer)

    assert may_say("Nothing to call: {}")
    assert may_say(lead + calls.replace("NAME", "g"))
    assert not may_say(lead + calls.replace("NAME", "f"))
    assert may_say("<function=f>") == (template is HERMES)  # the other way in which a call begins
    every = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL, OTHER]}}
    client.post(CHAT, json=chat(tools=[TOOL, OTHER], tool_choice=every))
    assert backend.asked[-1].sampling.constraints is None


def test_some_allowed_tools_are_refused_where_calls_cannot_be_held_to_them(backend: ScriptedBackend) -> None:
    client = TestClient(make_app(backend, tool_parser="harmony"))
    body = chat(tools=[TOOL, OTHER], tool_choice=ALLOWED)
    told = error(client.post(CHAT, json=body), 400)
    assert (told["param"], told["code"]) == ("tool_choice", "unsupported_parameter")
    assert "cannot be kept to some of the tools" in told["message"]


def test_an_answer_may_be_a_call_or_as_its_format_says(client: TestClient, backend: ScriptedBackend) -> None:
    client.post(CHAT, json=chat(tools=[TOOL], response_format={"type": "json_object"}))
    assert "start: answer | calls" in grammar(backend).source


@pytest.mark.parametrize("schema", [None, True, {"type": "object"}, {"x-guidance": {"lenient": True}}])
def test_beside_tools_json_has_no_more_white_space_than_alone(
    client: TestClient, backend: ScriptedBackend, schema: Any
) -> None:
    """Or a model may write blanks for ever."""
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    client.post(CHAT, json=chat(tools=[TOOL], response_format=given if schema else {"type": "json_object"}))
    answer = b'{"x": [1, true], "y": "-"}'
    masks = Grammars(PlainTokenizer()).matcher(grammar(backend)).masks(b"", answer)
    assert len(masks) == len(answer) + 1
    in_string = False
    for at, mask in enumerate(masks[:-1]):
        blanks = bytes(b for b in b" \t\r\n" if int(mask[b // 32]) >> (b % 32) & 1)
        assert blanks == (b" " if in_string or answer[at] == ord(" ") else b""), answer[:at]
        in_string ^= answer[at] == ord('"')


def test_beside_tools_a_schema_may_ask_for_white_space_but_not_for_less_than_it_says(
    client: TestClient, backend: ScriptedBackend
) -> None:
    def ask(schema: Any) -> Any:
        given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return client.post(CHAT, json=chat(tools=[TOOL], response_format=given))

    ask({"type": "object", "x-guidance": {"whitespace_flexible": True}})
    assert len(Grammars(PlainTokenizer()).matcher(grammar(backend)).masks(b"", b"{ \n\n}")) == 6
    assert error(ask(False), 400)["param"] == "response_format"
    ask({"not": {}, "x-guidance": {"lenient": True}})
    with pytest.raises(GrammarError, match='"not"'):
        Grammars(PlainTokenizer()).compile(grammar(backend))


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "any"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "h"}}}),
        ("tool_choice.function.name", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}}),
        ("tools[0].type", {"tools": [{"type": "custom"}]}),
        ("tools[1].function", {"tools": [TOOL, {"type": "function"}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
        (
            "tools[0].function.parameters",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
        ),
        ("tool_choice.allowed_tools.tools", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}),
        ("regex", {"tools": [TOOL], "regex": "a"}),
    ],
)
def test_bad_tools_are_refused_where_they_are_bad(
    client: TestClient, param: str, fields: dict[str, Any]
) -> None:
    assert error(client.post(CHAT, json=chat(**fields)), 400)["param"] == param


def test_a_history_of_calls_reaches_the_template(client: TestClient, backend: ScriptedBackend) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "42"},
    ]
    assert client.post(CHAT, json=chat(messages=messages, tools=[TOOL])).status_code == 200
    assert '"arguments": {"x": 1}' in prompt(backend)
    assert "tool\n42" in prompt(backend)


def test_a_parser_can_be_chosen(backend: ScriptedBackend) -> None:
    client = TestClient(make_app(backend, tool_parser="mistral"))
    backend.script = say('[TOOL_CALLS]f[ARGS]{"x": 1}')
    choice = client.post(CHAT, json=chat(tools=[TOOL])).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "f"


# --- reasoning, and answers that the client has begun


def test_reasoning_comes_apart_from_content(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = say("hm", "m\n</th", "ink>\n\nYes.")
    body = chat(chat_template_kwargs={"enable_thinking": True})
    answer = client.post(CHAT, json=body).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hmm", "Yes.")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("hmm\n</think>")
    parts = deltas(client.post(CHAT, json=body | {"stream": True}).text)
    assert "".join(p.get("reasoning_content", "") for p in parts) == "hmm"
    assert "".join(p.get("content", "") for p in parts) == "Yes."
    message = client.post(CHAT, json=body | {"include_reasoning": False}).json()["choices"][0]["message"]
    assert "reasoning_content" not in message


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [({"enable_thinking": True}, True), ({"reasoning_effort": "none"}, False), ({}, False)],
)
def test_thinking_is_the_templates(
    client: TestClient, backend: ScriptedBackend, fields: dict[str, Any], thinks: bool
) -> None:
    client.post(CHAT, json=chat(**fields))
    assert prompt(backend).endswith("<think>\n") == thinks


def test_a_grammar_begins_after_the_reasoning(client: TestClient, backend: ScriptedBackend) -> None:
    client.post(CHAT, json=chat(enable_thinking=True, response_format={"type": "json_object"}))
    assert grammar(backend) == Grammar("json_object", "", tuple(b"</think>"))


def test_a_call_can_be_forced_after_reasoning(client: TestClient, backend: ScriptedBackend) -> None:
    client.post(CHAT, json=chat(enable_thinking=True, tools=[TOOL], tool_choice="required"))
    found = grammar(backend)
    assert found.after == tuple(b"</think>")
    assert 'start: "\\n\\n"? calls\n' in found.source
    Grammars(PlainTokenizer()).compile(found)


def test_an_answer_that_is_begun_goes_on(client: TestClient, backend: ScriptedBackend) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One, two,<|im_end|> "}]
    assert client.post(CHAT, json=chat(messages=messages, continue_final_message=True)).status_code == 200
    assert prompt(backend) == "user\nHi\nassistant\nOne, two,<|im_end|> "
    assert backend.asked[-1].prompt.count(IM_END) == 1
    backend.script = say("b</think>c")
    messages[1]["content"] = "<think>\na"
    message = client.post(CHAT, json=chat(messages=messages, continue_final_message=True)).json()["choices"][
        0
    ]["message"]
    assert (message["reasoning_content"], message["content"]) == ("b", "c")
    for extra in ({"messages": messages[:1]}, {"add_generation_prompt": True}):
        refused = client.post(
            CHAT, json=chat(**{"messages": messages, "continue_final_message": True, **extra})
        )
        assert error(refused, 400)["param"] == "continue_final_message"


# --- constraints


def test_constraints_reach_the_sampling(client: TestClient, backend: ScriptedBackend) -> None:
    fields = {
        "logit_bias": {"65": -100, "66": 2.5}, "frequency_penalty": 0.5, "presence_penalty": -1,
        "repetition_penalty": 1.1, "bad_words": ["no", " "], "allowed_token_ids": [66, 65, 66], "stop_token_ids": [10],
    }  # fmt: skip
    client.post(TEXT, json=text(**fields))
    assert backend.asked[0].sampling.constraints == Constraints(
        logit_bias=((65, -100.0), (66, 2.5)),
        frequency_penalty=0.5,
        presence_penalty=-1.0,
        repetition_penalty=1.1,
        banned=(tuple(b"no"), tuple(b" no")),
        allowed=(65, 66),
        stop_token_ids=(10,),
    )


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
WRITTEN = Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"string"}}}')


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            WRITTEN,
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, Grammar("json_object")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, WRITTEN),
        ({"structured_outputs": {"json": SCHEMA}}, WRITTEN),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, WRITTEN),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar("choice", '["a","b"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
        ({"guided_json": SCHEMA}, WRITTEN),
        ({"guided_regex": "a"}, Grammar("regex", "a")),
        ({"guided_choice": ["a"]}, Grammar("choice", '["a"]')),
        ({"json_schema": SCHEMA}, WRITTEN),
        ({"regex": "a"}, Grammar("regex", "a")),
    ],
    ids=str,
)
def test_structured_output_is_asked_for_in_many_ways(
    client: TestClient, backend: ScriptedBackend, fields: dict[str, Any], expected: Grammar
) -> None:
    for url, body in ((CHAT, chat(**fields)), (TEXT, text(**fields))):
        assert client.post(url, json=body).status_code == 200
        assert grammar(backend) == expected


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("guided_regex", {"guided_json": SCHEMA, "guided_regex": "a"}),
        ("structured_outputs", {"structured_outputs": {"json": SCHEMA, "regex": "a"}}),
        ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "{}"}}),
        ("response_format.type", {"response_format": {}}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        (
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        ),
        ("guided_json", {"guided_json": "{oops"}),
        ("structured_outputs.choice", {"structured_outputs": {"choice": [1]}}),
        ("guided_json", {"guided_json": {"enum": ["x" * 70_000]}}),
    ],
)
def test_bad_formats_are_refused_by_name(client: TestClient, param: str, fields: dict[str, Any]) -> None:
    assert error(client.post(CHAT, json=chat(**fields)), 400)["param"] == param


# --- several answers


def test_several_answers_have_seeds_of_their_own(client: TestClient, backend: ScriptedBackend) -> None:
    body = client.post(TEXT, json=text(prompt=["a", "b"], n=2, seed=7)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [(a.prompt[-1:], a.sampling.seed) for a in backend.asked] == [
        ([ord(p)], seed) for p in "ab" for seed in (7, 8)
    ]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 4 * 6
    assert (body["metrics"]["seed"], body["metrics"]["seeds"]) == (7, [7, 8, 7, 8])


def test_streamed_answers_are_those_of_the_whole(client: TestClient, backend: ScriptedBackend) -> None:
    response = client.post(CHAT, json=chat(n=3, stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = events(response.text)
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens"] == 18
    for i in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hello"
        assert [c["finish_reason"] for c in mine][-1] == "stop"
    assert backend.running == 0


def test_when_one_answer_fails_the_others_end(client: TestClient, backend: ScriptedBackend) -> None:
    backend.script = [committed("a"), ValueError("oops")]
    assert error(client.post(CHAT, json=chat(n=3)), 500)["code"] == "internal_error"
    assert backend.running == 0


# --- what a completion says of its prompt


class Scoring(ScriptedBackend):
    """Says what its grammar forces, with a log probability of -id."""

    async def generate(self, generation: Any) -> Any:
        constraints = generation.sampling.constraints
        if constraints is None or constraints.grammar is None:
            async for item in super().generate(generation):
                yield item
            return
        self.asked.append(generation)
        assert constraints.grammar.kind == "tokens"
        ids = json.loads(constraints.grammar.source)
        assert generation.max_tokens == len(ids)
        found = [TokenLogprob(t, -0.5, [TopLogprob(EOS, -0.25)][: generation.logprobs]) for t in ids]
        yield Committed(tokens=ids, finish="length", logprobs=found)


@pytest.fixture
def scoring() -> TestClient:
    return TestClient(make_app(Scoring()), raise_server_exceptions=False)


def test_an_echo_comes_before_the_text(scoring: TestClient) -> None:
    assert scoring.post(TEXT, json=text(echo=True)).json()["choices"][0]["text"] == "HiHello"
    body = scoring.post(TEXT, json=text(echo=True, max_tokens=0, logprobs=1)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"] == {
        "tokens": ["token_id:257", "H", "i"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"token_id:256": -0.25}, {"token_id:256": -0.25}],
        "text_offset": [0, 0, 1],
    }
    assert body["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("prompt", "shown", "offsets"),
    [
        ("a<|im_end|>b", "a<|im_end|>b", [0, 0, 1, 11]),
        ("<bos>ab", "<bos>ab", [0, 5, 6]),
        ([BOS, 97, IM_END], "<bos>a<|im_end|>", [0, 5, 6]),
    ],
)
def test_an_echo_has_the_control_tokens_that_the_client_has_sent(
    scoring: TestClient, prompt: Any, shown: str, offsets: list[int]
) -> None:
    body = text(prompt=prompt, echo=True, max_tokens=0, logprobs=0)
    choice = scoring.post(TEXT, json=body).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (shown, offsets)
    assert (
        scoring.post(TEXT, json=text(prompt=prompt, echo=True)).json()["choices"][0]["text"]
        == shown + "Hello"
    )


def test_after_an_echo_an_end_has_its_log_probability(scoring: TestClient) -> None:
    """Clients that score prompts take the last of them for the token that they had to ask for."""
    backend = Scoring()
    backend.script = [committed("", "stop", top=0)]
    client = TestClient(make_app(backend))
    choice = client.post(TEXT, json=text(echo=True, logprobs=0, max_tokens=1)).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["token_id:257", "H", "i", "token_id:256"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_streamed_echoes_are_those_of_the_whole(scoring: TestClient) -> None:
    body = text(prompt=["Hi", "He"], echo=True, max_tokens=0, logprobs=0)
    whole = scoring.post(TEXT, json=body).json()["choices"]
    chunks = events(scoring.post(TEXT, json=body | {"stream": True}).text)[:-1]
    for i, choice in enumerate(whole):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [t for c in mine if c["logprobs"] for t in c["logprobs"]["tokens"]] == choice["logprobs"][
            "tokens"
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_in_the_text_of_their_own_choice(stream: bool) -> None:
    backend = Scoring()
    backend.script = [committed("ab", "length", top=0)]
    client = TestClient(make_app(backend))
    body = text(prompt=["Hi", "Hello", ""], n=2, echo=True, max_tokens=2, logprobs=0, stream=stream)
    answer = client.post(TEXT, json=body).text
    chunks = events(answer)[:-1] if stream else [json.loads(answer)]
    offsets: dict[int, list[int]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        offsets.setdefault(choice["index"], []).extend((choice["logprobs"] or {}).get("text_offset", []))
    assert offsets[0] == offsets[1] == [0, 0, 1, 2, 3]
    assert offsets[2] == offsets[3] == [0, 0, 1, 2, 3, 4, 5, 6]


def test_prompt_logprobs_are_listed_as_vllm_lists_them(scoring: TestClient) -> None:
    choice = scoring.post(TEXT, json=text(prompt_logprobs=1, max_tokens=0)).json()["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second == {
        "256": {"logprob": -0.25, "rank": 1, "decoded_token": "token_id:256"},
        "72": {"logprob": -0.5, "rank": None, "decoded_token": "H"},
    }
    assert "105" in third
    assert choice["text"] == ""


def test_the_middle_is_filled_in_where_the_model_can(client: TestClient, backend: ScriptedBackend) -> None:
    refused = error(client.post(TEXT, json=text(suffix="x")), 400)
    assert (refused["param"], refused["code"]) == ("suffix", "unsupported_parameter")


# --- names


def test_a_model_may_have_more_names_or_none(client: TestClient) -> None:
    body = chat()
    del body["model"]
    assert client.post(CHAT, json=body).json()["model"] == MODEL
    assert client.post(CHAT, json=chat(model="alias")).json()["model"] == "alias"
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [MODEL, "alias"]
    assert client.get("/v1/models/alias").json()["root"] == MODEL
    assert error(client.post(CHAT, json=chat(model="other")), 404)["code"] == "model_not_found"
    assert EOS == 256
