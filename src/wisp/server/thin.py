"""Thin clients: OpenAI requests without an edge. The server decodes them by itself, in the same batches.

Each is a session in server mode on a connection within the process. So batching, KV, limits per key and metrics are the
same as for an edge.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from wisp.api.backend import Committed, Generation, Target, check_sessions
from wisp.api.errors import refusal_error, shutting_down
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Fixed
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Reopen
from wisp.core.errors import UnavailableError
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.verify.admission import Refusal
from wisp.server.host import VerifierHost

_CERTAIN = Signal(confidence=1.0, certain=True)


class ThinBackend:
    """`api.backend.Backend` on a verifier in this process."""

    def __init__(self, host: VerifierHost) -> None:
        self.host = host
        limits = host.limits
        self._target = Target(host.model, host.tokenizer, limits.slot_tokens, limits.digest, host.grammars)

    @property
    def context(self) -> int:
        return self._target.context

    async def target(self) -> Target:
        return self._target

    def admit(self, key: str) -> None:
        try:
            self.host.admit(key)
        except Refusal as refusal:
            raise refusal_error(refusal) from None

    @contextmanager
    def together(self, generations: Sequence[Generation]) -> Iterator[list[Generation]]:
        """Around all work on one request: see `api.backend.together`."""
        check_sessions(generations, self.host.verifier.admission.limits.get(generations[0].key))
        yield list(generations)

    async def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        host = self.host
        if host.draining:
            raise shutting_down()
        inbox: asyncio.Queue[Verdict | Refused] = asyncio.Queue()
        connection = host.attach(generation.key, inbox.put_nowait)
        forced = _forced(generation)
        policy = Fixed(host.limits.max_draft) if forced else None
        drafter = Drafter(secrets.token_hex(16), generation, policy, host.limits.eos)
        max_draft, digest = host.limits.max_draft, host.limits.digest
        try:
            actions = drafter.connected(0.0, max_draft, digest)
            while True:
                for action in actions:
                    if isinstance(action, Open | Draft):
                        host.receive(connection, action)
                    elif isinstance(action, Reopen):
                        await asyncio.sleep(action.after_s)
                        for again in drafter.connected(0.0, max_draft, digest):
                            assert isinstance(again, Open)
                            host.receive(connection, again)
                    elif isinstance(action, Committed):
                        yield action
                        if action.finish:
                            return
                if forced and drafter.wants_token(0.0):
                    at = drafter.position
                    then = forced[at + 1 : at + max_draft]
                    actions = drafter.proposed(0.0, forced[at], _CERTAIN, then=then)
                    continue
                message = await inbox.get()
                if host.failed is not None:  # no step will run any more
                    raise UnavailableError("this server has failed, and ends", retry_after=2.0)
                actions = (
                    drafter.refused(message)
                    if isinstance(message, Refused)
                    else drafter.verdict(0.0, message)
                )
        finally:
            host.receive(connection, Cancel(drafter.session))
            host.detach(connection)


def _forced(generation: Generation) -> list[int]:
    """The text of a session that may say only one, as one that scores a prompt: it is drafted, for nothing."""
    constraints = generation.sampling.constraints
    grammar = constraints.grammar if constraints is not None else None
    if grammar is None or grammar.kind != "tokens" or grammar.after:
        return []
    return msgspec.json.decode(grammar.source, type=list[int])
