"""Where tokens are from, told to clients that ask, and to nobody else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fakes import MODEL, ScriptedBackend, committed, make_app
from wisp.core.protocol.step import Round

ROUND = Round(10.0, 4.0, 2.0, 1.0, 3.0, 3, 2, 3)


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


def ask(backend: ScriptedBackend, **fields: Any) -> Any:
    client = TestClient(make_app(backend), raise_server_exceptions=False)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}
    response = client.post("/v1/chat/completions", json=body)
    if not body.get("stream"):
        return response.json()
    data = [e.removeprefix("data: ") for e in response.text.split("\n\n") if e.startswith("data: {")]
    return [json.loads(d) for d in data]


def streamed(backend: ScriptedBackend, **fields: Any) -> tuple[str, list[tuple[str, str]], list[Any]]:
    """The text, its tokens with their origins, and the rounds."""
    chunks = ask(backend, stream=True, wisp={"rounds": True}, **fields)
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    told = [c["wisp"] for c in chunks if "wisp" in c]
    tokens = [(t["text"], t["from"]) for w in told for t in w["tokens"]]
    return text, tokens, [w["round"] for w in told if w["round"]]


def test_each_token_says_where_it_is_from(backend: ScriptedBackend) -> None:
    backend.script = [
        committed("a"),
        committed("bcd", drafted=3, accepted=2, from_draft=2),
        committed("efg", drafted=2, accepted=2, from_draft=2),
        committed("h", "stop"),
    ]
    text, tokens, _ = streamed(backend)
    assert text == "abcdefgh"
    assert tokens == [
        ("a", "server"),
        ("b", "draft"),
        ("c", "draft"),
        ("d", "correction"),
        ("e", "draft"),
        ("f", "draft"),
        ("g", "bonus"),
        ("h", "server"),
    ]


def test_a_character_of_several_tokens_belongs_to_the_token_that_completes_it(
    backend: ScriptedBackend,
) -> None:
    backend.script = [committed("é".encode()[:1]), committed("é".encode()[1:] + b"!", "stop")]
    text, tokens, _ = streamed(backend)
    assert text == "é!"
    assert tokens == [("", "server"), ("é", "server"), ("!", "server")]


def test_tokens_of_a_stop_string_are_not_told(backend: ScriptedBackend) -> None:
    backend.script = [committed("one EN"), committed("D two", "stop")]
    text, tokens, _ = streamed(backend, stop=["END"])
    assert text == "".join(t for t, _ in tokens) == "one "


def test_text_that_was_held_back_in_vain_is_told_later(backend: ScriptedBackend) -> None:
    backend.script = [committed("one E"), committed("gg", "stop")]
    text, tokens, _ = streamed(backend, stop=["END"])
    assert text == "".join(t for t, _ in tokens) == "one Egg"


def test_rounds_come_with_what_they_committed(backend: ScriptedBackend) -> None:
    first = committed("abc", drafted=3, accepted=2, from_draft=2)
    backend.script = [type(first)(**{f: getattr(first, f) for f in first.__struct_fields__} | {"round": ROUND}),
                      committed("", "stop")]  # fmt: skip
    _, _, rounds = streamed(backend)
    (told,) = rounds
    assert (told["draft_ms"], told["flight_ms"], told["queue_ms"], told["verify_ms"]) == (4.0, 2.0, 1.0, 3.0)
    whole = ask(backend, wisp={"rounds": True})
    assert whole["wisp"]["rounds"] == [told]
    assert "".join(t["text"] for t in whole["wisp"]["tokens"]) == "abc"


@pytest.mark.parametrize("wisp", [None, {}, {"rounds": False}])
def test_answers_without_the_field_are_unchanged(backend: ScriptedBackend, wisp: Any) -> None:
    backend.script = [committed("abc", drafted=3, accepted=2, from_draft=2), committed("", "stop")]
    fields = {} if wisp is None else {"wisp": wisp}
    assert all("wisp" not in chunk for chunk in ask(backend, stream=True, **fields))
    assert "wisp" not in ask(backend, **fields)


def test_a_request_may_ask_for_an_answer_without_drafts(backend: ScriptedBackend) -> None:
    ask(backend, wisp={"draft": False})
    ask(backend, wisp={"rounds": True})
    assert [g.extras.draft for g in backend.asked] == [False, True]
    assert [g.extras.rounds for g in backend.asked] == [False, True]


@pytest.mark.parametrize(
    ("wisp", "param"), [(3, "wisp"), ({"round": True}, "wisp.round"), ({"draft": "no"}, "wisp.draft")]
)
def test_errors_of_the_field_name_the_mistake(backend: ScriptedBackend, wisp: Any, param: str) -> None:
    error = ask(backend, wisp=wisp)["error"]
    assert error["param"] == param
    assert not backend.asked


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_other_surfaces_tell_at_the_end(backend: ScriptedBackend, path: str) -> None:
    backend.script = [committed("abc", drafted=3, accepted=2, from_draft=2), committed("d", "stop")]
    client = TestClient(make_app(backend), raise_server_exceptions=False)
    body = {"input": "Hi", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    del body["input" if path == "/v1/messages" else "messages"]
    if path == "/v1/responses":
        del body["max_tokens"]
    whole = client.post(path, json=body | {"wisp": {"rounds": True}}).json()
    assert [(t["text"], t["from"]) for t in whole["wisp"]["tokens"]] == [
        ("a", "draft"), ("b", "draft"), ("c", "correction"), ("d", "server"),
    ]  # fmt: skip
    streamed = client.post(path, json=body | {"wisp": {"rounds": True}, "stream": True}).text
    ends = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n") if '"wisp"' in line]
    (end,) = ends
    assert end.get("response", end)["wisp"] == whole["wisp"]
    assert "wisp" not in client.post(path, json=body).json()
