"""An edge drafts from its earlier answers, where it is told to keep them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from test_redirects import TOKENS, TRUTH, FakeVerifier, NoTokenizers, answer
from waiting import run
from wisp.core.draft.policies import Policies
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.engines.base import Proposal


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
