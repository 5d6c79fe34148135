"""The interface between the OpenAI surface and its generator: an edge (drafts) or a verifier (decodes alone)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import msgspec

from wisp.api.extras import Extras
from wisp.api.fields import refuse
from wisp.core.draft.task import Task
from wisp.core.protocol.step import Committed
from wisp.core.verify.admission import KeyLimits
from wisp.engines.base import Tokenizer
from wisp.engines.constraining import Compiler

__all__ = ["Backend", "Committed", "Generation", "Target", "together"]


class Generation(Task, frozen=True):
    """A task, in token ids, and whose it is. `max_tokens` is at least 1.

    `key` names the API key of the caller ("" where none is needed); `request_id` is for logs. `extras`: see there.
    party: the request whose generations a `Gate` has let in together; "" for none
    """

    request_id: str = ""
    key: str = ""
    extras: Extras = Extras()
    party: str = ""


class Target(msgspec.Struct, frozen=True):
    """The model behind a backend. `context`: most tokens of prompt + output; `digest`: see `messages.Welcome`.

    grammars: compiles those that a request asks for, off the event loop, so that it can be refused at once; None: the
    verifier does that
    """

    model: str
    tokenizer: Tokenizer
    context: int
    digest: str
    grammars: Compiler | None = None


class Backend(Protocol):
    """Generates. One per process."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and output; 0 while there is no model yet."""

    async def target(self) -> Target:
        """The model served. Waits a stated time for a verifier, then raises UnavailableError."""

    def admit(self, key: str) -> None:
        """Asked before any work on a prompt of `key`. Raises RequestError 429 where a generation would be refused at
        once for the key's limits. Counts nothing but the refusal."""

    def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        """Stream what is committed; the last item has a `finish`. Closing the iterator cancels the work.

        Raises RequestError (429, 503, ...) before the first item or between items.
        """


@runtime_checkable
class Gate(Protocol):
    """A backend whose limits hold for all generations of one request together."""

    def together(self, generations: Sequence[Generation]) -> AbstractContextManager[list[Generation]]:
        """See the function of this name."""


def together(backend: Backend, generations: Sequence[Generation]) -> AbstractContextManager[list[Generation]]:
    """Around all work on one request: its generations as they are let in, all of them or none.

    Raises RequestError 429, or 400 where the key's limits can never hold so many.
    """
    return backend.together(generations) if isinstance(backend, Gate) else nullcontext(list(generations))


def check_room(generations: Sequence[Generation], most: int, what: str) -> None:
    """Raises RequestError 400 where all answers of one request are more than a key may ever have at once.

    most: of them; 0: no limit. what: the limit in words, with its number.
    """
    size = len(generations)
    if most and size > most:
        param = "n" if size > 1 and generations[0].prompt is generations[1].prompt else "prompt"
        refuse(param, f"this key may {what}, and these would be {size} answers at once")


def check_sessions(generations: Sequence[Generation], limits: KeyLimits | None) -> None:
    """The same for a verifier, to which each answer is a session and a request."""
    if limits is not None:
        check_room(generations, limits.sessions, f"have {limits.sessions} sessions open")
        per_minute = limits.requests_per_minute
        check_room(generations, per_minute, f"send {per_minute} requests a minute")
