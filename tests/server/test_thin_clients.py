"""Clients without an edge, at a verifier and at a router: what the limits of their key can never hold is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from wisp.api.backend import Generation, together
from wisp.core.errors import RequestError
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission, KeyLimits
from wisp.core.verify.events import Limits
from wisp.router.thin import RouterBackend
from wisp.server.thin import ThinBackend


def at_a_verifier(admission: Admission) -> ThinBackend:
    host = SimpleNamespace(
        limits=Limits(10, frozenset(), 1, 64, 64, 16),
        verifier=SimpleNamespace(admission=admission),
        model="m",
        tokenizer=None,
        grammars=None,
    )
    return ThinBackend(cast(Any, host))


def at_a_router(admission: Admission) -> RouterBackend:
    return RouterBackend(cast(Any, SimpleNamespace(admission=admission)), None)


@pytest.mark.parametrize("backend_of", [at_a_verifier, at_a_router])
@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (KeyLimits(sessions=2), "have 2 sessions open, and these would be 3 answers"),
        (KeyLimits(requests_per_minute=2), "send 2 requests a minute, and these would be 3 answers"),
    ],
)
def test_answers_that_a_key_may_never_have_at_once_are_no_matter_of_waiting(
    backend_of: Any, limits: KeyLimits, says: str
) -> None:
    backend = backend_of(Admission(100, {"alice": limits}))
    one, other = (Generation([token], Sampling(), 3, key="alice") for token in (1, 2))
    for asked, param in (([one] * 3, "n"), ([one, other, one], "prompt")):
        with pytest.raises(RequestError, match=says) as caught, together(backend, asked):
            raise AssertionError
        assert (caught.value.status, caught.value.param) == (400, param)
    for asked in ([one, other], [Generation([1], Sampling(), 3, key="bob")] * 9):
        with together(backend, asked) as let_in:
            assert let_in == asked
