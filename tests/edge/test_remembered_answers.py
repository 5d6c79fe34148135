"""An edge drafts from its earlier answers, where it is told to keep them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from test_redirects import TOKENS, TRUTH, FakeVerifier, NoTokenizers, answer
from waiting import run
from wisp.api.backend import Generation
from wisp.core.draft.policies import Policies
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.messages import Welcome
from wisp.core.protocol.sampling import Sampling
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.engines.base import Proposal, Tokenizer
from wisp.engines.null import ByteTokenizer


class Speechless:
    """A drafter that has nothing to propose."""

    name = "speechless"

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        return None

    def forget(self, session: str) -> None:
        pass

    def close(self) -> None:
        pass


class AnyVocabulary(VerifierLink):
    """To a verifier whose vocabulary changes when the test says so."""

    vocabulary = "first"

    async def connected(self) -> Welcome:
        return msgspec.structs.replace(await super().connected(), fingerprint=self.vocabulary)


class Tokenizers:
    async def get(self, fingerprint: str) -> Tokenizer:
        return ByteTokenizer()


async def proposed(edge: EdgeBackend, salt: str = "") -> int | None:
    at = TOKENS - 1
    found = await edge.propose(f"{salt}/another", [1, 2, 3, *TRUTH[:at]], at, Sampling())
    return None if found is None else found.token


@pytest.mark.parametrize("history_tokens", [0, 1000])
def test_the_next_answer_is_drafted_from_the_last(history_tokens: int) -> None:
    async def scenario() -> None:
        verifier = FakeVerifier()
        async with verifier.listening() as url:
            link = VerifierLink(url)
            edge = EdgeBackend(
                link, NoTokenizers(), Speechless(), Policies("fixed:2"), history_tokens=history_tokens
            )
            link.start()
            try:
                assert await proposed(edge) is None
                assert await answer(edge) == TRUTH
                assert await proposed(edge) == (TRUTH[-1] if history_tokens else None)
                assert await proposed(edge, "salt") is None
                edge.customers_changed([""], [])
                assert await proposed(edge) is None
                assert await answer(edge) == TRUTH
                assert await proposed(edge) is None, "its last sessions may still be under way"
                edge.customers_changed([], [""])
                assert await answer(edge) == TRUTH
                assert await proposed(edge) == (TRUTH[-1] if history_tokens else None)
            finally:
                await link.close()
                edge.close()

    run(scenario())


@pytest.mark.parametrize("under_way", [False, True])
def test_what_was_said_in_another_vocabulary_is_forgotten(under_way: bool) -> None:
    """A verifier of another model has taken the place of the first. Ids that it does not have, it would refuse."""

    async def scenario() -> None:
        verifier = FakeVerifier()
        async with verifier.listening() as url:
            link = AnyVocabulary(url)
            edge = EdgeBackend(link, Tokenizers(), Speechless(), Policies("fixed:2"), history_tokens=1000)
            link.start()
            try:
                await edge.target()
                generation = edge.generate(Generation([1, 2, 3], Sampling(seed=7), TOKENS))
                said = list((await anext(generation)).tokens)
                if not under_way:
                    said += [token async for item in generation for token in item.tokens]
                    assert await proposed(edge) == TRUTH[-1]
                link.vocabulary = "another"
                await edge.target()
                said += [token async for item in generation for token in item.tokens]
                assert said == TRUTH
                assert await proposed(edge) is None
                assert await answer(edge) == TRUTH
                assert await proposed(edge) == TRUTH[-1]
            finally:
                await link.close()
                edge.close()

    run(scenario())
