"""The unmodified `openai` SDK against a verifier and against edges of every kind: one text everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from harness import DRAFT, HTTP, MODEL, TARGET, Fleet, Process, ask
from waiting import eventually
from wisp.api.template import chat_template
from wisp.core.protocol.sampling import Sampling
from wisp.engines.llama.reference import reference_tokens
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.models import resolve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_pair")]

SECRET_WORD = "Zyqqathorn"
PROMPTS = ("Tell me a story about Belomi.", f"Write code to sort a lamp. {SECRET_WORD}!")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "seed": 11},
    "truncated": {
        "temperature": 1.3,
        "top_p": 0.8,
        "seed": 2**40,
        "extra_body": {"top_k": 20, "min_p": 0.02},
    },
}
EDGES = (DRAFT, "ngram", "none")
KINDS = ("server", *EDGES)


@pytest.fixture(scope="module")
def processes(tiny_pair: None, shared: Fleet) -> dict[str, Process]:
    """A verifier, and an edge of each kind."""
    server = shared.serve()
    edges = {kind: shared.edge(server.url, draft=kind, ready=False) for kind in EDGES}
    return {"server": server} | {kind: edge.wait_ready() for kind, edge in edges.items()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sdk(kind: str, processes: dict[str, Process]) -> Iterator[openai.OpenAI]:
    with client_of(processes[kind]) as client:
        yield client


def client_of(process: Process) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0, http_client=http)


def chat(client: openai.OpenAI, prompt: str, **parameters: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=40, **parameters)


@pytest.fixture(scope="module")
def centralised(processes: dict[str, Process]) -> dict[tuple[str, str], Any]:
    """What a thin client gets from the verifier, which decodes alone."""
    with client_of(processes["server"]) as client:
        return {
            (prompt, name): chat(client, prompt, logprobs=True, top_logprobs=2, **sampling)
            for prompt in PROMPTS
            for name, sampling in SAMPLINGS.items()
        }


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_prompt_parameters_and_seed_give_the_same_answer_everywhere(
    sdk: openai.OpenAI, centralised: dict[tuple[str, str], Any], prompt: str, name: str
) -> None:
    alone = centralised[prompt, name]
    answer = chat(sdk, prompt, logprobs=True, top_logprobs=2, **SAMPLINGS[name])
    assert answer.choices == alone.choices  # text, finish reason and every log probability
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.completion_tokens == alone.usage.completion_tokens


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_streamed_answer_is_the_same_and_ends_with_usage_and_statistics(
    kind: str, sdk: openai.OpenAI, centralised: dict[tuple[str, str], Any], name: str
) -> None:
    alone = centralised[PROMPTS[0], name]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chat(sdk, PROMPTS[0], **options, **SAMPLINGS[name])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == alone.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        alone.choices[0].finish_reason
    ]
    assert last.choices == []
    assert last.usage.completion_tokens == alone.usage.completion_tokens
    spec = last.model_extra["metrics"]["speculative_decoding"]
    assert 0 <= spec["num_accepted_draft_tokens"] <= spec["num_draft_tokens"]
    if kind == DRAFT:
        assert spec["num_accepted_draft_tokens"] > 0
        assert spec["mean_acceptance_length"] > 1
    if kind in ("server", "none"):
        assert spec["num_draft_tokens"] == 0


def test_completions_take_text_and_token_ids(sdk: openai.OpenAI, processes: dict[str, Process]) -> None:
    with client_of(processes["server"]) as thin:
        for prompt in ("Once upon a time", [40, 50, 60, 70]):
            wanted = thin.completions.create(model=MODEL, prompt=prompt, seed=3, max_tokens=12)
            answer = sdk.completions.create(model=MODEL, prompt=prompt, seed=3, max_tokens=12)
            stream = sdk.completions.create(model=MODEL, prompt=prompt, seed=3, max_tokens=12, stream=True)
            assert answer.choices[0].text == wanted.choices[0].text
            assert "".join(chunk.choices[0].text for chunk in stream) == wanted.choices[0].text


def test_a_seed_that_was_drawn_is_returned_and_gives_the_same_text_again(sdk: openai.OpenAI) -> None:
    first = chat(sdk, PROMPTS[0], temperature=1.5)
    again = chat(sdk, PROMPTS[0], temperature=1.5, seed=first.model_extra["metrics"]["seed"])
    assert again.choices == first.choices


def test_a_stop_string_ends_the_answer_before_it(
    sdk: openai.OpenAI, centralised: dict[tuple[str, str], Any]
) -> None:
    text = centralised[PROMPTS[0], "greedy"].choices[0].message.content
    stop = text[len(text) // 2 :][:6]
    answer = chat(sdk, PROMPTS[0], temperature=0, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_listed(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).id == MODEL


def test_errors_are_the_sdks_own_exceptions(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        sdk.chat.completions.create(model="gpt-99", messages=[{"role": "user", "content": "Hi"}])
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        chat(sdk, "word " * 600)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unsupported:
        chat(sdk, "Hi", extra_body={"best_of": 2})
    assert unsupported.value.param == "best_of"
    with pytest.raises(openai.BadRequestError) as streamed:
        chat(sdk, "word " * 600, stream=True)
    assert streamed.value.code == "context_length_exceeded"


def test_the_text_is_the_slow_reference_decoders(centralised: dict[tuple[str, str], Any]) -> None:
    path = resolve(TARGET)
    tokenizer = LlamaTokenizer.open(path)
    template = chat_template(tokenizer.chat_template)
    for (prompt, name), answer in centralised.items():
        messages: Any = [{"role": "user", "content": prompt}]
        text = template.render(messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
        ids = tokenizer.encode(text, add_bos=False, parse_special=True)
        given = {**SAMPLINGS[name], **SAMPLINGS[name].get("extra_body", {})}
        given.pop("extra_body", None)
        tokens = reference_tokens(path, ids, Sampling(**given), 40, tokenizer.eos)
        shown = [bytes(entry.bytes or ()) for entry in answer.choices[0].logprobs.content]
        finish = "stop" if tokens[-1] in tokenizer.eos else "length"
        assert answer.choices[0].finish_reason == finish
        assert shown == [tokenizer.piece(t) for t in tokens if t not in tokenizer.eos]
        assert answer.usage.prompt_tokens == len(ids)
    tokenizer.close()


def test_edges_and_verifier_count_alike(processes: dict[str, Process]) -> None:
    server, edge = processes["server"], processes[DRAFT]
    before = server.metrics(), edge.metrics()
    answer = ask(edge.url, PROMPTS[0], max_tokens=30)
    after = eventually(lambda: m if (m := server.metrics())["wisp:num_requests_running"] == 0 else {})
    theirs = edge.metrics()

    def verified(name: str, own: str) -> float:
        """By the verifier, without drafts of its own."""
        samples = f"wisp:spec_decode_{name}_total", f"wisp:{own}_total"
        grown, own_grown = (after[sample] - before[0][sample] for sample in samples)
        return grown - own_grown

    def sent(name: str) -> float:
        sample = f"wisp:spec_decode_{name}_total"
        return theirs[sample] - before[1][sample]

    assert verified("num_drafts", "own_draft_tokens") <= answer.spec["num_spec_steps"]
    # A longer branch may have been sent when the shorter one was being verified.
    assert 0 < verified("num_draft_tokens", "own_draft_tokens") <= sent("num_draft_tokens")
    assert verified("num_accepted_tokens", "own_draft_tokens_accepted") == sent("num_accepted_tokens")
    sample = "wisp:generation_tokens_total"
    assert after[sample] - before[0][sample] == answer.usage["completion_tokens"]
    assert theirs[sample] - before[1][sample] == answer.usage["completion_tokens"]


def logged(process: Process, word: str) -> bool:
    return word in process.log()


def test_logs_name_requests_and_never_quote_them(processes: dict[str, Process]) -> None:
    for kind, process in processes.items():
        given = f"trace-{kind}"
        body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET_WORD}], "max_tokens": 4}
        response = httpx.post(
            f"{process.url}/v1/chat/completions", json=body, headers={"x-request-id": given}, **HTTP
        )
        assert response.headers["x-request-id"] == given
        eventually(partial(logged, process, given))
        assert SECRET_WORD not in process.log()
        assert "Belomi" not in process.log()
