"""The edge's generations: the draft engine proposes, the verifier decides, `core.draft.drafter` says what comes next.

while not done:
    if it is the draft engine's turn:  propose a token
    else:                              wait for the verifier, or for the connection

A session begins on its home link. `core.draft.itinerary` says where it goes from there.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from msgspec.structs import replace

from wisp.api import tracing
from wisp.api.backend import Committed, Generation, Target
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.itinerary import HOME, Go, Home, Itinerary, Send, Step
from wisp.core.draft.patience import Patience
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action, Phase, Reopen
from wisp.core.errors import ProtocolError, RequestError, UnavailableError
from wisp.core.protocol.messages import Cancel, Message, Refused, Verdict, Welcome
from wisp.core.protocol.sampling import Sampling
from wisp.edge.link import FromLink, Listener, Lost, Redirects
from wisp.edge.rounds import RoundLog
from wisp.engines.base import DraftEngine, Proposal, Tokenizer
from wisp.engines.constrained_draft import ConstrainedDraft
from wisp.engines.grammar_library import available
from wisp.engines.grammars import Grammars
from wisp.engines.remembering import Remembering

log = logging.getLogger("wisp.edge")

NOTICE_S = 1.0  # for the link to notice that its verifier is gone, where the tokenizer cannot be had any more
AGAIN_S = 0.1  # between attempts to get it meanwhile


class Link(Protocol):
    """A connection to a verifier or to a router. `VerifierLink` documents its methods."""

    reconnects: int
    patience: Patience
    problem: str
    fatal: RequestError | None
    redirects: Redirects

    @property
    def welcome(self) -> Welcome | None: ...
    async def connected(self) -> Welcome: ...
    def gave_up(self) -> UnavailableError: ...
    def listen(self, session: str, listener: Listener) -> None: ...
    def unlisten(self, session: str) -> None: ...
    def send(self, message: Message) -> None: ...


class Tokenizers(Protocol):
    """Tokenizers by fingerprint. An error with `retry_after` may be over by then; others stay."""

    async def get(self, fingerprint: str) -> Tokenizer: ...


class EdgeBackend:
    """`api.backend.Backend` that drafts here and verifies there.

    `drafter` None: never draft. `policies` makes a drafting policy for each session. `ahead` None: never draft ahead.
    `history_tokens`: of past answers, which are asked before the drafter; 0: none are kept.
    """

    def __init__(
        self,
        link: Link,
        tokenizers: Tokenizers,
        drafter: DraftEngine | None,
        policies: Policies,
        ahead: Ahead | None = None,
        history_tokens: int = 0,
    ) -> None:
        self.link = link
        self.tokenizers = tokenizers
        self.history: Remembering | None = None
        if drafter is not None and history_tokens:
            drafter = self.history = Remembering(drafter, history_tokens)
        self.drafter = ConstrainedDraft(drafter) if drafter is not None else None
        self.grammars: Grammars | None = None  # of the target's vocabulary
        self.vocabulary = ""  # its fingerprint
        self.policies = policies
        self.ahead = ahead
        self.times = RoundTimes()  # of the last session; the next one starts from them
        self.sessions = 0  # live ones
        self.branches_sent = self.branches_taken = 0  # of sessions that have ended
        self.why = "" if drafter is not None else "no_drafter"  # of the last session (`edge.rounds`)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft")

    @property
    def context(self) -> int:
        """Tokens of the verifier's context; 0 without a verifier."""
        return self.link.welcome.context if self.link.welcome is not None else 0

    async def target(self) -> Target:
        """The verifier's model; waits for a verifier as long as the link allows."""
        while True:
            welcome = await self.link.connected()
            if (tokenizer := await self._tokenizer(welcome)) is not None:
                break
        if self.vocabulary != welcome.fingerprint:
            self.vocabulary = welcome.fingerprint
            if self.history is not None:  # ids of other words, or of none: a verifier would refuse these
                self._thread.submit(self.history.clear)
            self.grammars = Grammars(tokenizer) if available() else None
            if self.drafter is not None:
                self.drafter.matchers = self.grammars
        return Target(welcome.model, tokenizer, welcome.context, welcome.digest, self.grammars)

    async def _tokenizer(self, welcome: Welcome) -> Tokenizer | None:
        """The vocabulary's tokenizer; None if the verifier has gone meanwhile. Raises RequestError if it has not."""
        deadline = time.monotonic() + NOTICE_S
        while True:
            try:
                return await self.tokenizers.get(welcome.fingerprint)
            except RequestError as error:
                if self.link.welcome is not welcome:
                    return None
                if error.retry_after is None or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(AGAIN_S)

    def admit(self, key: str) -> None:
        """An edge has no limits of its own; the verifier's answer comes with the first verdict."""

    def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        """Stream the committed tokens. Closing the iterator cancels the session at the verifier."""
        return _Session(self, generation).run()

    async def warm(self, session: str, prompt: Sequence[int]) -> None:
        """Have the draft engine read a prompt."""
        await self.propose(session, prompt, 0, Sampling())

    async def propose(
        self, session: str, context: Sequence[int], position: int, sampling: Sampling
    ) -> Proposal | None:
        """Ask the draft engine, in its own thread. If it fails, this round goes without a draft."""
        assert self.drafter is not None
        call = functools.partial(self.drafter.propose, session, context, position, sampling)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except Exception:  # a broken drafter costs speed, never text
            log.exception("the drafter failed; this round goes without a draft")
            return None

    def forget(self, session: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Free the draft engine's memory of a session, after its present work. The text may help with others."""
        if self.drafter is not None:
            self._thread.submit(self.drafter.forget, session)
        if self.history is not None:
            self._thread.submit(self.history.said, session, prompt, answer)

    def customers_changed(self, revoked: Sequence[str], new: Sequence[str]) -> None:
        """Nothing that was said under the salts `revoked` may be used any more. The salts `new` may be known: a key can
        be revoked, and come back."""
        if self.history is not None:
            for salt in revoked:
                self._thread.submit(self.history.drop, salt)
            for salt in new:
                self._thread.submit(self.history.allow, salt)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self.drafter is not None:
            self.drafter.close()


class _Session:
    """One generation: carries out what its drafter and its itinerary say."""

    def __init__(self, backend: EdgeBackend, generation: Generation) -> None:
        self.backend = backend
        self.home: Link = backend.link
        self.link: Link = backend.link  # to where the session is
        self.id = secrets.token_hex(16)
        self.span = tracing.start("session", generation.trace, time.monotonic(), served=False)
        self.generation = replace(generation, trace=self.span.trace)
        self.itinerary = Itinerary(self.id, self.home.patience, lambda: random.uniform(0.5, 1.0))
        self.drafts = f"{generation.salt}/{self.id}"  # the session's name for the draft engine
        self.finished = False
        # Address, event, and time of arrival (ms)
        self.events: asyncio.Queue[tuple[str | None, FromLink, float]] = asyncio.Queue()
        self.times = backend.times.successor()
        off = "no_drafter" if backend.drafter is None else "" if generation.extras.draft else "switched_off"
        self.rounds = RoundLog(_now_ms(), self.times, off=off, span=self.span)
        self.may_draft = not off
        self.warm: asyncio.Task[object] | None = None
        self.answer: list[int] = []
        self.vocabulary = backend.vocabulary  # of prompt and answer

    async def run(self) -> AsyncIterator[Committed]:
        welcome = await self.home.connected()
        g = self.generation
        backend = self.backend
        policy = backend.policies.make(g.sampling.temperature) if self.may_draft else None
        ahead = backend.ahead if policy is not None else None
        drafter = Drafter(self.id, g, policy, frozenset(welcome.eos), ahead=ahead, times=self.times)
        self._move(HOME, self.home)
        self.backend.sessions += 1
        try:
            actions = drafter.connected(_now_ms(), welcome.max_draft, welcome.digest, welcome.max_branches)
            if policy is not None and ahead is None:  # the draft model reads the prompt while the target does
                self.warm = asyncio.create_task(self.backend.warm(self.drafts, g.prompt))
            while True:
                for action in actions:
                    if isinstance(action, Committed):
                        self.finished = bool(action.finish)
                        self.answer += action.tokens
                        yield self.rounds.told(action) if g.extras.rounds else action
                    elif isinstance(action, Reopen):
                        self._reopen(action.after_s)
                    else:
                        self.rounds.sent(_now_ms(), action)
                        self._send(self.itinerary.say(action))
                if drafter.phase is Phase.DONE:
                    return
                actions = await self._step(drafter)
        finally:
            self._end()
            backend.branches_sent += drafter.branches.sent
            backend.branches_taken += drafter.branches.taken

    async def _step(self, drafter: Drafter) -> list[Action]:
        """Wait for the next thing to happen. Returns what follows from it."""
        if self.events.empty() and drafter.wants_token(started := _now_ms()):
            proposal = await self.backend.propose(
                self.drafts, drafter.context(), drafter.position, self.generation.sampling
            )
            now = _now_ms()
            self.rounds.proposed(now - started, proposal)
            if proposal is None:
                return drafter.proposed(now, None, Signal(), now - started)
            p = proposal
            return drafter.proposed(now, p.token, p.signal, now - started, p.then, p.other)
        where, event, arrived = await self._event()
        step = self._take(where, event)
        if isinstance(step, Go):
            step = self._follow(step.address)
        if isinstance(step, Verdict):
            self.rounds.verdict(arrived, step, drafter)
            try:
                return drafter.verdict(_now_ms(), step, arrived)
            except ProtocolError as error:
                raise RequestError(502, str(error), code=error.code, type="server_error") from None
        if isinstance(step, Refused):
            return drafter.refused(step)
        if isinstance(step, Welcome):
            drafter.lost()
            return drafter.connected(_now_ms(), step.max_draft, step.digest, step.max_branches)
        if isinstance(step, Home):
            drafter.lost()
            self._move(HOME, self.home)
            if step.after_s is not None:
                self._reopen(step.after_s)
        elif isinstance(step, Send):
            drafter.moved(step.welcome.max_draft, step.welcome.max_branches)
            self._send(step.messages)
        return []

    async def _event(self) -> tuple[str | None, FromLink, float]:
        """The next event. Raises UnavailableError if there was no verifier for as long as the link has patience."""
        while True:
            timeout = None
            if self.itinerary.at is HOME and self.home.welcome is None:
                if self.home.fatal is not None:
                    raise self.home.fatal
                timeout = self.itinerary.left_s(time.monotonic())
                if not timeout:
                    raise self.home.gave_up()
            try:
                async with asyncio.timeout(timeout):
                    return await self.events.get()
            except TimeoutError:
                continue

    def _take(self, where: str | None, event: FromLink) -> Step:
        now_s = time.monotonic()
        if isinstance(event, Lost):
            return self.itinerary.lost(where, now_s, self.link.problem)
        return self.itinerary.heard(where, event, now_s)

    def _follow(self, address: str) -> Step:
        try:
            link = self.home.redirects.link(address)
        except ProtocolError as error:
            return self.itinerary.lost(address, time.monotonic(), str(error))
        self._move(address, link)
        self._reopen(0.0)
        return None

    def _move(self, address: str | None, link: Link) -> None:
        """Listen to that link from now on, and to no other."""
        self.link.unlisten(self.id)
        self.link = link
        link.listen(self.id, functools.partial(self._heard, address))

    def _heard(self, address: str | None, event: FromLink) -> None:
        self.events.put_nowait((address, event, _now_ms()))

    def _reopen(self, after_s: float) -> None:
        """After that long, take the connection for a new one, which the session is opened on."""

        def reopen() -> None:
            if self.link.welcome is not None:  # otherwise the next connection will do it
                self._heard(self.itinerary.at, self.link.welcome)

        if after_s:
            asyncio.get_running_loop().call_later(after_s, reopen)
        else:
            reopen()

    def _send(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.link.send(message)

    def _end(self) -> None:
        if not self.finished:  # left, failed or refused: the verifier can forget it
            self.link.send(Cancel(self.id))
        if self.warm is not None:
            self.warm.cancel()
        self.link.unlisten(self.id)
        said = self.answer if self.vocabulary == self.backend.vocabulary else []
        self.backend.forget(self.drafts, self.generation.prompt, said)
        self.rounds.over()
        self.span.end(time.monotonic(), {"wisp.session": self.id})
        self.backend.sessions -= 1
        self.backend.times = self.times
        if self.rounds.why != "switched_off":
            self.backend.why = self.rounds.why


def _now_ms() -> float:
    return time.monotonic() * 1e3
