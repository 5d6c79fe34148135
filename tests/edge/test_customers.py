"""An edge's own keys: their limits hold at the edge, and none shares prefixes with another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fakes import ScriptedBackend, committed, make_app
from wisp.api.backend import Committed, Generation, Target
from wisp.api.keys import ANONYMOUS, Keyring
from wisp.core.errors import RequestError
from wisp.core.protocol.sampling import Sampling
from wisp.edge.customers import Customers

KEYS = """
[keys.alice]
secret = "alice-secret"
requests_per_minute = 1

[keys.bob]
secret = "bob-secret"
sessions = 1

[keys.carol]
secret = "carol-secret"
tokens_per_minute = 60
"""


class Answers:
    """A backend that commits three tokens, one at a time."""

    context = 100

    def __init__(self) -> None:
        self.asked: list[Generation] = []
        self.closed = 0

    async def target(self) -> Target:
        raise NotImplementedError

    def admit(self, key: str) -> None:
        """Everybody is let in."""

    async def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        self.asked.append(generation)
        try:
            for n in range(3):
                yield Committed([n], [], 0, 0, 0, "length" if n == 2 else "")
        finally:
            self.closed += 1


class Edge:
    """Customers before a backend, at a time that is said."""

    def __init__(self, keys: Keyring) -> None:
        self.now = 0.0
        self.backend = Answers()
        self.customers = Customers(self.backend, keys, lambda: self.now)

    def begin(self, key: str, prompt: int = 10) -> AsyncIterator[Committed]:
        return self.customers.generate(Generation([1] * prompt, Sampling(), 3, key=key))

    def ask(self, key: str, prompt: int = 10) -> RequestError | None:
        """Why the answer was refused; None if it was given."""

        async def whole() -> list[int]:
            return [token async for item in self.begin(key, prompt) for token in item.tokens]

        try:
            assert asyncio.run(whole()) == [0, 1, 2]
        except RequestError as error:
            return error
        return None


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    return Keyring(path)


@pytest.fixture
def edge(keys: Keyring) -> Edge:
    return Edge(keys)


def test_one_request_a_minute_is_one_request_a_minute(edge: Edge) -> None:
    assert edge.ask("alice") is None
    for _ in range(3):
        refused = edge.ask("alice")
        assert refused is not None
        assert (refused.status, refused.code, refused.retry_after) == (429, "rate_limit_exceeded", 60.0)
        with pytest.raises(RequestError, match="1 requests a minute"):
            edge.customers.admit("alice")  # before any work is done on its prompt
    assert len(edge.backend.asked) == 1
    edge.customers.admit("bob")
    assert edge.ask("bob") is None
    edge.now = 60.0
    assert edge.ask("alice") is None


def test_a_session_that_is_left_makes_room_for_the_next(edge: Edge) -> None:
    async def scenario() -> None:
        first = edge.begin("bob")
        await anext(first)
        with pytest.raises(RequestError, match="1 sessions"):
            await anext(edge.begin("bob"))
        await first.aclose()  # type: ignore[attr-defined]
        assert edge.backend.closed == 1
        assert (await anext(edge.begin("bob"))).tokens == [0]

    asyncio.run(scenario())


def test_tokens_are_charged_prompt_and_answer(edge: Edge) -> None:
    assert edge.ask("carol", prompt=87) is None  # 90 of 60: overdrawn by 30
    refused = edge.ask("carol")
    assert refused is not None
    assert (refused.status, refused.retry_after) == (429, 31.0)
    edge.now = 31.0
    assert edge.ask("carol") is None


def test_limits_that_change_hold_at_once(edge: Edge, keys: Keyring) -> None:
    assert edge.ask("alice") is None
    assert keys.path is not None
    keys.path.write_text(KEYS.replace("requests_per_minute = 1", "requests_per_minute = 5 # more"))
    assert keys.reload()
    edge.customers.limits_changed()
    assert [edge.ask("alice") for _ in range(5)] == [None] * 5
    assert edge.ask("alice") is not None


def test_each_customer_has_a_salt_that_tells_nothing(edge: Edge, keys: Keyring) -> None:
    for key in ("bob", "carol", "bob"):
        edge.now += 60.0
        assert edge.ask(key) is None
    bob, carol, again = (generation.salt for generation in edge.backend.asked)
    assert bob == again != carol
    assert Edge(keys).customers.salt("bob") not in ("", bob)  # nor can it be found by trying names


def test_without_keys_there_is_nobody_to_tell_apart() -> None:
    edge = Edge(Keyring())
    assert [edge.ask(ANONYMOUS) for _ in range(9)] == [None] * 9
    assert {generation.salt for generation in edge.backend.asked} == {""}


def test_the_salts_of_revoked_and_of_new_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    keys = Keyring(path)
    customers = Customers(Answers(), keys)
    bob = customers.salt("bob")
    path.write_text(KEYS.replace("[keys.bob]", "[keys.bobby]"))
    assert keys.reload()
    bobby = customers.salt("bobby")
    assert customers.limits_changed() == ([bob], [bobby])
    assert customers.limits_changed() == ([], [])
    path.write_text(KEYS)
    assert keys.reload()
    assert customers.limits_changed() == ([bobby], [bob])


# --- several answers of one request

LIMITS = """
[keys.alice]
secret = "alice-secret"
{}
"""
TEXT = "/v1/completions"


class Port:
    """An edge's port, where all requests are alice's, at a time that is said."""

    def __init__(self, folder: Path, limits: str) -> None:
        path = folder / "keys.toml"
        path.write_text(LIMITS.format(limits))
        self.now = 0.0
        self.backend = ScriptedBackend()
        customers = Customers(self.backend, Keyring(path), lambda: self.now)
        app = make_app(customers, auth=True)  # type: ignore[arg-type]
        self._client = TestClient(app, headers={"authorization": "Bearer sk-secret"})

    def ask(self, n: int = 1, **fields: Any) -> tuple[int, dict[str, Any]]:
        """(status, error)"""
        body = {"prompt": "Hi", "n": n, **fields}
        response = self._client.post(TEXT, json=body)
        return response.status_code, {} if response.status_code == 200 else response.json()["error"]


def test_a_request_for_several_answers_is_one_request(tmp_path: Path) -> None:
    port = Port(tmp_path, "requests_per_minute = 2")
    assert port.ask(n=3) == (200, {})
    assert port.ask(prompt=["Hi", "Ho"], n=2) == (200, {})
    assert len(port.backend.asked) == 7
    assert port.ask()[0] == 429
    port.now = 30.0
    assert port.ask(n=5) == (200, {})


def test_answers_that_can_never_be_open_at_once_are_no_matter_of_waiting(tmp_path: Path) -> None:
    port = Port(tmp_path, "sessions = 2\nrequests_per_minute = 1")
    for fields, param in (({"n": 3}, "n"), ({"prompt": ["a", "b", "c"]}, "prompt")):
        status, error = port.ask(**fields)
        assert (status, error["param"]) == (400, param)
        assert "2 sessions open, and these would be 3 answers" in error["message"]
    assert port.backend.asked == []
    assert port.ask(n=2) == (200, {})  # nothing was charged so far


def test_answers_that_do_not_fit_beside_others_charge_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(LIMITS.format("sessions = 3\nrequests_per_minute = 2"))
    customers = Customers(Answers(), Keyring(path), lambda: 0.0)
    one = Generation([1], Sampling(), 3, key="alice")
    with customers.together([one, one]):
        for _ in range(3):
            with (
                pytest.raises(RequestError, match="3 sessions open") as caught,
                customers.together([one, one]),
            ):
                raise AssertionError
            assert caught.value.status == 429
        customers.admit("alice")  # there is room for one
        with customers.together([one]), pytest.raises(RequestError, match="3 sessions open"):
            customers.admit("alice")
    with pytest.raises(RequestError, match="2 requests a minute"), customers.together([one]):
        raise AssertionError


def test_a_prompt_that_is_scored_belongs_to_its_request(tmp_path: Path) -> None:
    port = Port(tmp_path, "sessions = 2\nrequests_per_minute = 1")
    port.backend.script = [committed("i", "length", top=1)]
    assert port.ask(n=2, echo=True, logprobs=1, max_tokens=1) == (200, {})
    assert len(port.backend.asked) == 3
