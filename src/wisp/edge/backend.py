"""The edge's generations: the draft engine proposes, the verifier decides, `core.draft.drafter` says what comes next.

while not done:
    if it is the draft engine's turn:  propose a token
    else:                              wait for the verifier, or for the connection

A session begins on its home link. If a front is there, it is redirected to a verifier and says its Open again to
that one; when that verifier is lost or shuts down, the session comes home and opens from what is committed.
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

import msgspec

from wisp.api.backend import Committed, Generation, Target
from wisp.core.draft.drafter import Action, Drafter, Phase, Reopen
from wisp.core.draft.patience import Patience
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.errors import ProtocolError, RequestError, UnavailableError
from wisp.core.protocol.messages import Cancel, Draft, Message, Open, Redirect, Refused, Verdict, Welcome
from wisp.edge.link import FromLink, Listener, Redirects
from wisp.engines.base import DraftEngine, Proposal, Tokenizer

log = logging.getLogger("wisp.edge")

ELSEWHERE = frozenset(
    {"shutting_down", "overloaded"}
)  # refusals of one verifier that say nothing of the others
MAX_LOSSES = 5  # a request that kills what serves it must not go round the whole fleet for ever
BOUNCE_S = (0.05, 2.0)  # shortest and longest wait at home, from the second trip in vain


class Link(Protocol):
    """Where sessions live: the way to a verifier or to a front (`VerifierLink` documents it)."""

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
    """Tokenizers by fingerprint."""

    async def get(self, fingerprint: str) -> Tokenizer: ...


class EdgeBackend:
    """`api.backend.Backend` that drafts here and verifies there.

    `drafter` None means: never draft. `policies` makes a drafting policy for each session; `ahead` None means:
    never draft ahead.
    """

    def __init__(
        self,
        link: Link,
        tokenizers: Tokenizers,
        drafter: DraftEngine | None,
        policies: Policies,
        ahead: Ahead | None = None,
    ) -> None:
        self.link = link
        self.tokenizers = tokenizers
        self.drafter = drafter
        self.policies = policies
        self.ahead = ahead
        self.pace = RoundTimes()  # of the last session: where the next one starts
        self.sessions = 0  # live ones
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft")

    @property
    def context(self) -> int:
        """The verifier's; 0 without one."""
        return self.link.welcome.context if self.link.welcome is not None else 0

    async def target(self) -> Target:
        """The verifier's model; waits for a verifier as long as the link allows."""
        welcome = await self.link.connected()
        tokenizer = await self.tokenizers.get(welcome.fingerprint)
        return Target(welcome.model, tokenizer, welcome.context, welcome.digest)

    def admit(self, key: str) -> None:
        """An edge has no limits of its own; the verifier's answer comes with the first verdict."""

    def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        """Stream what is committed. Closing the iterator cancels the session at the verifier."""
        return _Session(self, generation).run()

    async def propose(
        self, session: str, context: Sequence[int], position: int, g: Generation
    ) -> Proposal | None:
        """GenerationRequest the draft engine, in its own thread. If it fails, this round goes without."""
        assert self.drafter is not None
        call = functools.partial(self.drafter.propose, session, context, position, g.sampling)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except Exception:  # a broken drafter costs speed, never text
            log.exception("the drafter failed; this round goes without a draft")
            return None

    def forget(self, session: str) -> None:
        """Free what the draft engine holds for a session, behind whatever it is doing."""
        if self.drafter is not None:
            self._thread.submit(self.drafter.forget, session)

    def close(self) -> None:
        """End the draft thread and free the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self.drafter is not None:
            self.drafter.close()


class _Session:
    """One generation."""

    def __init__(self, backend: EdgeBackend, generation: Generation) -> None:
        self.backend = backend
        self.home: Link = backend.link
        self.link: Link = backend.link
        self.generation = generation
        self.id = secrets.token_hex(16)
        self.drafts = f"{generation.salt}/{self.id}"  # its name for the draft engine
        self.finished = False
        # What was heard, where, and when (ms)
        self.events: asyncio.Queue[tuple[Link, FromLink, float]] = asyncio.Queue()
        self.pace = backend.pace.successor()
        self.warm: asyncio.Task[object] | None = None
        self.opening: Open | None = None  # said to a front, and to be said again where it redirects to
        self.since: list[Draft] = []  # sent ahead of the answer to it: to be said again, too
        self.address = ""  # of `link`, where a front sent us
        self.avoid = ""
        self.trips = 0  # back home from where a front sent us, since the last verdict
        self.astray_since = 0.0  # this, and the next: by the home link's patience
        self.came_home = 0.0

    async def run(self) -> AsyncIterator[Committed]:
        welcome = await self.home.connected()
        g = self.generation
        backend = self.backend
        policy = backend.policies.make(g.sampling.temperature) if backend.drafter is not None else None
        ahead = backend.ahead if policy is not None else None
        drafter = Drafter(self.id, g, policy, frozenset(welcome.eos), ahead=ahead, pace=self.pace)
        self._move(self.home)
        self.backend.sessions += 1
        try:
            actions = drafter.connected(_now_ms(), welcome.max_draft, welcome.digest)
            if policy is not None and ahead is None:  # the draft model reads the prompt while the target does
                self.warm = asyncio.create_task(self.backend.propose(self.drafts, g.prompt, 0, g))
            while True:
                for action in actions:
                    if isinstance(action, Committed):
                        self.finished = bool(action.finish)
                        yield action
                    else:
                        self._carry_out(action)
                if drafter.phase is Phase.DONE:
                    return
                actions = await self._step(drafter)
        finally:
            self._end()

    def _heard(self, link: Link, event: FromLink) -> None:
        self.events.put_nowait((link, event, _now_ms()))

    def _move(self, link: Link) -> None:
        """Listen there from now on, and nowhere else."""
        self.link.unlisten(self.id)
        self.link = link
        link.listen(self.id, functools.partial(self._heard, link))

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Open) and self.link is self.home:
            self.opening = msgspec.structs.replace(action, avoid=self.avoid) if self.avoid else action
            self.since = []
            self.link.send(self.opening)
        elif isinstance(action, Open | Draft):
            if self.opening is not None and isinstance(action, Draft):
                self.since.append(action)
                if self.link is not self.home:
                    return  # nothing before the Open
            self.link.send(action)
        elif isinstance(action, Reopen):
            loop = asyncio.get_running_loop()
            loop.call_later(action.after_s, self._reopen)

    def _reopen(self) -> None:
        if self.link.welcome is not None:  # otherwise the next connection will do it
            self._heard(self.link, self.link.welcome)

    async def _step(self, drafter: Drafter) -> list[Action]:
        """Wait for the next thing to happen, and say what follows from it."""
        if self.events.empty() and drafter.wants_token(started := _now_ms()):
            proposal = await self.backend.propose(
                self.drafts, drafter.context(), drafter.position, self.generation
            )
            token, signal = (proposal.token, proposal.signal) if proposal else (None, Signal())
            now = _now_ms()
            return drafter.proposed(now, token, signal, now - started)
        event, arrived = await self._event()
        if isinstance(event, Verdict):
            self.trips, self.avoid, self.opening = 0, "", None
            try:
                return drafter.verdict(_now_ms(), event, arrived)
            except ProtocolError as error:
                raise RequestError(502, str(error), code=error.code, type="server_error") from None
        if isinstance(event, Redirect):
            self._follow(event, drafter)
            return []
        away = self.link is not self.home
        if isinstance(event, Refused):
            if away and event.code in ELSEWHERE:
                self._go_home(drafter, refused=event.message)
                return []
            opening = self.opening
            if opening is not None and event.code == "unknown_session" and event.round > opening.round:
                return []  # a front takes no drafts; this one will be said again where it sends us
            return drafter.refused(event)
        if away and not isinstance(event, Welcome):
            self._go_home(drafter)
            return []
        if isinstance(event, Welcome):
            drafter.require(event.digest)
        if away and self.opening is not None:  # redirected: say the same to this one
            for said in (self.opening, *self.since):
                self.link.send(said)
            self.opening = None
            return []
        drafter.lost()
        if not isinstance(event, Welcome):
            return []
        return drafter.connected(_now_ms(), event.max_draft, event.digest)

    async def _event(self) -> tuple[FromLink, float]:
        """The next event and when it came; gives up when there has been no verifier for the stated time."""
        while True:
            link = self.link
            if link.welcome is not None or link is not self.home:  # one redirected to fails by itself
                timeout = None
            else:
                if link.fatal is not None:
                    raise link.fatal
                timeout = link.patience.left_s(time.monotonic(), self.came_home)
                if not timeout:
                    raise link.gave_up()
            try:
                where, event, arrived = await asyncio.wait_for(self.events.get(), timeout)
            except TimeoutError:
                continue
            if where is link:  # otherwise it was said before the session moved
                return event, arrived

    # --- where a front is

    def _follow(self, redirect: Redirect, drafter: Drafter) -> None:
        """Open at the verifier that the front named."""
        if self.link is not self.home or self.opening is None:
            return  # an answer to an Open that was overtaken
        self.address = redirect.address
        try:
            link = self.home.redirects.link(redirect.address)
        except ProtocolError as error:
            self._go_home(drafter, refused=str(error))
            return
        self._move(link)
        self._reopen()

    def _go_home(self, drafter: Drafter, *, refused: str = "") -> None:
        """The verifier at the redirected address is gone, full, drained or out of reach: ask the front again."""
        drafter.lost()
        unheard = bool(refused) or self.opening is not None
        wait, now = 0.0, self.home.patience.beat(time.monotonic())
        self.came_home = now
        self.trips += 1
        if self.trips == 1:
            self.astray_since = now
        else:
            wait = min(BOUNCE_S[0] * 2**self.trips, BOUNCE_S[1]) * random.uniform(0.5, 1.0)
            if now > self.astray_since + self.home.patience.give_up_s and (
                unheard or self.trips > MAX_LOSSES
            ):
                raise self._went_astray(refused, unheard)
        if unheard:
            self.avoid = self.address
        self.opening = None
        self._move(self.home)
        asyncio.get_running_loop().call_later(wait, self._reopen)

    def _went_astray(self, refused: str, unheard: bool) -> RequestError:
        if unheard:
            why = refused or self.link.problem
            message = f"the router sends sessions to {self.address}, which is of no use from here ({why})"
            return UnavailableError(f"{message}; is that port open to this device?")
        message = f"{self.trips} verifiers in a row were lost over this request; it is not tried again"
        return RequestError(502, message, code="verifiers_lost", type="server_error")

    def _end(self) -> None:
        if not self.finished:  # left, failed or refused: the verifier need not keep it
            self.link.send(Cancel(self.id))
        if self.warm is not None:
            self.warm.cancel()
        self.link.unlisten(self.id)
        self.backend.forget(self.drafts)
        self.backend.sessions -= 1
        self.backend.pace = self.pace


def _now_ms() -> float:
    return time.monotonic() * 1e3
