"""The target's model and tokenizer, asked for while its verifier comes and goes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from wisp.core.draft.policies import Policies
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.protocol.messages import VERSION, Welcome
from wisp.edge import backend as module
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.engines.base import Tokenizer
from wisp.engines.null import ByteTokenizer

BYTES = ByteTokenizer()


def welcome() -> Welcome:
    return Welcome(VERSION, "m", BYTES.fingerprint, 257, [256], 512, 8)


class LostLink(VerifierLink):
    """A verifier that dies and comes back when the test says so."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.welcome = welcome()

    async def connected(self) -> Welcome:
        while self.welcome is None:
            await asyncio.sleep(0)
        return self.welcome


class Failing:
    """Tokenizers that cannot be had at first. `then` is called at each attempt that fails with `error`."""

    def __init__(self, fails: int, then: Callable[[], None], error: RequestError | None = None) -> None:
        self.fails = fails
        self.then = then
        self.error = error or UnavailableError("all connection attempts failed")

    async def get(self, fingerprint: str) -> Tokenizer:
        if self.fails:
            self.fails -= 1
            self.then()
            raise self.error
        return BYTES


def test_a_request_waits_for_a_verifier_that_dies_before_it_gave_its_tokenizer() -> None:
    async def scenario() -> None:
        link = LostLink()

        def die() -> None:
            link.welcome = None
            asyncio.get_running_loop().call_soon(lambda: setattr(link, "welcome", welcome()))

        edge = EdgeBackend(link, Failing(3, die), None, Policies("fixed:1"))
        target = await edge.target()
        assert (target.model, target.tokenizer) == ("m", BYTES)
        edge.close()

    asyncio.run(scenario())


def test_a_replica_that_dies_first_does_not_fail_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTICE_S", 600.0)  # however slow the machine is
    monkeypatch.setattr(module, "AGAIN_S", 0.0)

    async def scenario() -> None:
        edge = EdgeBackend(LostLink(), Failing(2, lambda: None), None, Policies("fixed:1"))
        assert (await edge.target()).tokenizer is BYTES  # from another one, behind the same router
        edge.close()

    asyncio.run(scenario())


def test_a_tokenizer_that_is_not_to_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTICE_S", 0.0)
    monkeypatch.setattr(module, "AGAIN_S", 0.0)

    async def scenario() -> None:
        edge = EdgeBackend(LostLink(), Failing(1000, lambda: None), None, Policies("fixed:1"))
        with pytest.raises(RequestError, match="all connection attempts failed"):
            await edge.target()
        edge.close()

    asyncio.run(scenario())


def test_a_tokenizer_that_will_not_do_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTICE_S", 600.0)
    attempts: list[None] = []

    async def scenario() -> None:
        tokenizers = Failing(1000, lambda: attempts.append(None), RequestError(502, "it is damaged"))
        edge = EdgeBackend(LostLink(), tokenizers, None, Policies("fixed:1"))
        with pytest.raises(RequestError, match="it is damaged"):
            await edge.target()
        edge.close()

    asyncio.run(scenario())
    assert len(attempts) == 1
