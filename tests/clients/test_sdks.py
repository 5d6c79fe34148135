"""OpenAI's and Anthropic's own clients."""

from __future__ import annotations

import anthropic
import openai
import pytest
from pydantic import BaseModel

from conftest import MODEL


class Person(BaseModel):
    name: str
    age: int


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = [{"role": "user", "content": "How is the weather in Paris?"}]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Who?"}], response_format=Person
    )
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)


def test_strict_tools_are_parsed(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Person)
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Who?"}], tools=[tool], tool_choice="required"
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Person(name="Ada", age=36)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_turn_with_a_tool(client: openai.OpenAI, choice: str) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=[TOOL], tool_choice=choice
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    history = [
        *ASK,
        message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=history, tools=[TOOL])
    assert answer.choices[0].message.content == "It is sunny in Paris."


def test_responses(client: openai.OpenAI) -> None:
    flat = {"type": "function", **TOOL["function"], "strict": False}
    with client.responses.stream(model=MODEL, input="How is the weather?", tools=[flat]) as stream:
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    items = [
        {"role": "user", "content": "How is the weather?"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
    ]
    assert client.responses.create(model=MODEL, input=items).output_text == "It is sunny in Paris."
    parsed = client.responses.parse(model=MODEL, input="Who?", text_format=Person)
    assert parsed.output_parsed == Person(name="Ada", age=36)


def test_anthropic(url: str) -> None:
    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
    tool = {
        "name": "get_weather",
        "description": "The weather.",
        "input_schema": TOOL["function"]["parameters"],  # type: ignore[index]
    }
    with client.messages.stream(model=MODEL, max_tokens=200, messages=ASK, tools=[tool]) as stream:
        message = stream.get_final_message()
    (block,) = message.content
    assert (block.type, block.name, block.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    history = [
        *ASK,
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "Sunny."}]},
    ]
    answer = client.messages.create(model=MODEL, max_tokens=200, messages=history, tools=[tool])
    assert answer.content[0].text == "It is sunny in Paris."
    assert client.messages.count_tokens(model=MODEL, messages=ASK).input_tokens > 10
