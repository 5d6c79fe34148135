"""An edge's own API keys: they have limits here, and prefixes are shared only within one key.

To the verifier, all customers of an edge are the edge's one key. If they shared prefixes, the time to a first token
would tell one customer what another has asked. So each session carries a salt that stands for its customer. The salt is
made with a secret of this process, so the verifier learns no name; after a restart each prompt is read once more.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from wisp.api.backend import Backend, Committed, Generation, Target, check_room
from wisp.api.errors import refusal_error
from wisp.api.keys import Keyring
from wisp.api.sse import close
from wisp.core.verify.admission import Admission, Refusal

NO_PLACES = 1 << 40  # sessions: the verifier says when it is full


class Customers:
    """`api.backend.Backend` for the holders of `keys`, around another backend.

    A request is one request, however many answers it has; each answer is a session, from the time when the request is
    let in to its end. A key is charged for the whole prompt: the part that the verifier had cached is not known here.
    """

    def __init__(self, backend: Backend, keys: Keyring, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._keys = keys
        self._clock = clock
        self._admission = Admission(NO_PLACES, keys.limits)  # its "sessions" are requests here
        self._sessions: Counter[str] = Counter()  # open ones, by key
        self._parties: set[str] = set()  # requests that are let in
        self._secret = secrets.token_bytes(32)

    @property
    def context(self) -> int:
        return self._backend.context

    async def target(self) -> Target:
        return await self._backend.target()

    def admit(self, key: str) -> None:
        """Raises RequestError 429 if the limits of `key` leave no room for another generation."""
        try:
            self._look_for_room(key, 1)
            self._admission.ask(self._clock(), key)
        except Refusal as refusal:
            self._admission.turned_away(key)
            raise refusal_error(refusal) from None

    @contextmanager
    def together(self, generations: Sequence[Generation]) -> Iterator[list[Generation]]:
        """Around all work on one request: see `api.backend.together`."""
        key, size = generations[0].key, len(generations)
        most = self._most_sessions(key)
        check_room(generations, most, f"have {most} sessions open")
        try:
            self._look_for_room(key, size)
        except Refusal as refusal:
            self._admission.turned_away(key)
            raise refusal_error(refusal) from None
        try:
            self._admission.opened(self._clock(), key)
        except Refusal as refusal:
            raise refusal_error(refusal) from None
        party = secrets.token_hex(8)
        self._parties.add(party)
        self._sessions[key] += size
        try:
            yield [msgspec.structs.replace(generation, party=party) for generation in generations]
        finally:
            self._parties.remove(party)
            self._sessions[key] -= size
            self._admission.closed(key)

    async def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        """Stream what the other commits. Raises RequestError 429 if the key's limits are used up, unless the generation
        is of a request that has been let in."""
        with ExitStack() as own:
            if generation.party not in self._parties:
                (generation,) = own.enter_context(self.together([generation]))
            admission, key = self._admission, generation.key
            committed = self._backend.generate(msgspec.structs.replace(generation, salt=self.salt(key)))
            unread = len(generation.prompt)
            try:
                async for item in committed:
                    admission.served(self._clock(), key, unread, len(item.tokens))
                    unread = 0
                    yield item
            finally:
                await close(committed)

    def _most_sessions(self, key: str) -> int:
        """That a key may have open; 0: no limit."""
        limits = self._admission.limits.get(key)
        return limits.sessions if limits is not None else 0

    def _look_for_room(self, key: str, size: int) -> None:
        """Raises Refusal if so many more sessions of the key cannot be open now."""
        most = self._most_sessions(key)
        if most and self._sessions[key] + size > most:
            raise Refusal("rate_limit_exceeded", f"this key may have {most} sessions open", 1.0)

    def salt(self, key: str) -> str:
        """The salt of a key, for the life of this process; "" if there are no keys to tell apart."""
        if not self._keys:
            return ""
        return hashlib.blake2b(key.encode(), key=self._secret, digest_size=16).hexdigest()

    def limits_changed(self) -> tuple[list[str], list[str]]:
        """The keys are others now. Returns the salts of those that were revoked, and of those that are new."""
        before, after = self._admission.limits.keys(), self._keys.limits.keys()
        revoked, new = sorted(before - after), sorted(after - before)
        self._admission.set_limits(self._keys.limits)
        return [self.salt(key) for key in revoked], [self.salt(key) for key in new]
