"""The edge's generations: the draft engine proposes, the verifier decides, `core.drafter` says what comes next.

while not done:
    if it is the draft engine's turn:  propose a token
    else:                              wait for the verifier, or for the connection
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from wisp.api.backend import Committed, Generation, Target
from wisp.core.drafter import Action, Drafter, Phase, Reopen, Task
from wisp.core.drafting import Ahead, Policies
from wisp.core.errors import ProtocolError, RequestError
from wisp.core.messages import Cancel, Draft, Open, Refused, Verdict, Welcome
from wisp.core.pace import Pace
from wisp.core.signals import Signal
from wisp.edge.link import FromLink, VerifierLink
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.base import DraftEngine, Proposal

log = logging.getLogger("wisp.edge")


class EdgeBackend:
    """`api.backend.Backend` that drafts here and verifies there.

    `drafter` None means: never draft. `policies` makes a drafting policy for each session; `ahead` None means:
    never draft ahead.
    """

    def __init__(
        self,
        link: VerifierLink,
        tokenizers: TokenizerCache,
        drafter: DraftEngine | None,
        policies: Policies,
        ahead: Ahead | None = None,
    ) -> None:
        self.link = link
        self.tokenizers = tokenizers
        self.drafter = drafter
        self.policies = policies
        self.ahead = ahead
        self.pace = Pace()  # of the last session: where the next one starts
        self.sessions = 0  # live ones
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft")

    async def target(self) -> Target:
        """The verifier's model; waits for a verifier as long as the link allows."""
        welcome = await self.link.connected()
        tokenizer = await self.tokenizers.get(welcome.fingerprint)
        return Target(welcome.model, tokenizer, welcome.context)

    def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        """Stream what is committed. Closing the iterator cancels the session at the verifier."""
        return _Session(self, generation).run()

    async def propose(
        self, session: str, context: Sequence[int], position: int, g: Generation
    ) -> Proposal | None:
        """Ask the draft engine, in its own thread. If it fails, this round goes without."""
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
        self.link = backend.link
        self.generation = generation
        self.id = secrets.token_hex(16)
        self.model = ""
        self.finished = False
        self.events: asyncio.Queue[tuple[FromLink, float]] = asyncio.Queue()  # with the time of arrival, ms
        self.pace = backend.pace.successor()
        self.warm: asyncio.Task[object] | None = None

    async def run(self) -> AsyncIterator[Committed]:
        welcome = await self.link.connected()
        self.model = welcome.model
        g = self.generation
        task = Task(g.prompt, g.sampling, g.max_tokens, g.ignore_eos, g.logprobs, g.slo)
        backend = self.backend
        policy = backend.policies.make(g.sampling.temperature) if backend.drafter is not None else None
        ahead = backend.ahead if policy is not None else None
        drafter = Drafter(self.id, task, policy, frozenset(welcome.eos), ahead=ahead, pace=self.pace)
        self.link.listen(self.id, self._heard)
        self.backend.sessions += 1
        try:
            actions = drafter.connected(_now_ms(), welcome.max_draft)
            if policy is not None and ahead is None:  # the draft model reads the prompt while the target does
                self.warm = asyncio.create_task(self.backend.propose(self.id, g.prompt, 0, g))
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

    def _heard(self, event: FromLink) -> None:
        self.events.put_nowait((event, _now_ms()))

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Open | Draft):
            self.link.send(action)
        elif isinstance(action, Reopen):
            loop = asyncio.get_running_loop()
            loop.call_later(action.after_s, self._reopen)

    def _reopen(self) -> None:
        if self.link.welcome is not None:  # otherwise the next connection will do it
            self._heard(self.link.welcome)

    async def _step(self, drafter: Drafter) -> list[Action]:
        """Wait for the next thing to happen, and say what follows from it."""
        if self.events.empty() and drafter.wants_token(started := _now_ms()):
            proposal = await self.backend.propose(
                self.id, drafter.context(), drafter.position, self.generation
            )
            token, signal = (proposal.token, proposal.signal) if proposal else (None, Signal())
            now = _now_ms()
            return drafter.proposed(now, token, signal, now - started)
        event, arrived = await self._event()
        if isinstance(event, Verdict):
            try:
                return drafter.verdict(_now_ms(), event, arrived)
            except ProtocolError as error:
                raise RequestError(502, str(error), code=error.code, type="server_error") from None
        if isinstance(event, Refused):
            return drafter.refused(event)
        drafter.lost()
        if not isinstance(event, Welcome):
            return []
        if event.model != self.model:
            message = f"the verifier now serves {event.model}; this answer was begun by {self.model}"
            raise RequestError(502, message, code="model_changed", type="server_error")
        return drafter.connected(_now_ms(), event.max_draft)

    async def _event(self) -> tuple[FromLink, float]:
        """The next event and when it came; gives up when there has been no verifier for the stated time."""
        while True:
            if self.link.welcome is not None:
                timeout = None
            else:
                if self.link.fatal is not None:
                    raise self.link.fatal
                timeout = self.link.lost_at + self.link.give_up_s - time.monotonic()
                if timeout <= 0:
                    raise self.link.gave_up()
            try:
                return await asyncio.wait_for(self.events.get(), timeout)
            except TimeoutError:
                continue

    def _end(self) -> None:
        if not self.finished:  # left, failed or refused: the verifier need not keep it
            self.link.send(Cancel(self.id))
        if self.warm is not None:
            self.warm.cancel()
        self.link.unlisten(self.id)
        self.backend.forget(self.id)
        self.backend.sessions -= 1
        self.backend.pace = self.pace


def _now_ms() -> float:
    return time.monotonic() * 1e3
