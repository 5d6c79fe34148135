"""Libraries for agents and structured output, unmodified."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from conftest import MODEL

os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")
ASK = "How is the weather in Paris?"
TOLD = "It is sunny in Paris."


class Person(BaseModel):
    """A person."""

    name: str = Field(description="The first name.")
    age: int


ADA = Person(name="Ada", age=36)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(url: str, method: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key="none", max_retries=0)
    assert chat.with_structured_output(Person, method=method).invoke("Who? Answer in JSON.") == ADA


def test_langchain_tools(url: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"Sunny in {city}."

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key="none", max_retries=0).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(ASK)]
    whole: Any = None
    for chunk in chat.stream(messages):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    messages += [whole, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert chat.invoke(messages).content == TOLD


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "JSON"])
def test_instructor(url: str, mode: str) -> None:
    import instructor
    import openai

    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=instructor.Mode[mode])
    found = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Who?"}], response_model=Person, max_retries=0
    )
    assert found.model_dump() == ADA.model_dump()


@pytest.mark.parametrize("mode", ["ToolOutput", "NativeOutput", "PromptedOutput"])
def test_pydantic_ai_output(url: str, mode: str) -> None:
    import pydantic_ai
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = pydantic_ai.Agent(model, output_type=getattr(pydantic_ai, mode)(Person))
    assert agent.run_sync("Who?").output == ADA


def test_pydantic_ai_tools(url: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="none")))
    asked = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "Sunny."

    assert agent.run_sync(ASK).output == TOLD
    assert asked == ["Paris"]


@pytest.mark.parametrize("surface", ["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def test_openai_agents(url: str, surface: str) -> None:
    import agents
    import openai

    asked = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "Sunny."

    agents.set_tracing_disabled(True)
    model = getattr(agents, surface)(
        model=MODEL, openai_client=openai.AsyncOpenAI(base_url=url, api_key="none")
    )
    agent = agents.Agent(name="a", model=model, tools=[get_weather])
    assert agents.Runner.run_sync(agent, ASK).final_output == TOLD
    assert asked == ["Paris"]
    typed = agents.Agent(name="b", model=model, output_type=Person)
    assert agents.Runner.run_sync(typed, "Who?").final_output == ADA


def test_smolagents(url: str) -> None:
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: The city.
        """
        return "Sunny."

    model = OpenAIServerModel(model_id=MODEL, api_base=url, api_key="none")
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0)
    assert agent.run(ASK) == TOLD


def test_llama_index(url: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=MODEL,
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=200,
    )
    assert model.as_structured_llm(Person).chat([ChatMessage(role="user", content="Who?")]).raw == ADA

    def get_weather(city: str) -> str:
        """The weather in a city."""
        return "Sunny."

    answer = model.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg=ASK)
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})


def test_llm_with_a_schema(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {MODEL}\n  api_base: {url}\n  supports_schema: true\n  supports_tools: true\n"
    )
    import llm

    model = llm.get_model("here")
    model.key = "none"
    assert Person.model_validate_json(model.prompt("Who?", schema=Person).text()) == ADA
    assert model.prompt("Hello", stream=True).text() == "Hello! How can I help you?"
