"""A real edge that writes down what its drafter saw and did, and a real verifier for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import httpx
import msgspec

from wisp.api.backend import Generation
from wisp.children import Child, Children, free_ports
from wisp.core.draft.drafter import Action, Drafter
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.signals import Signal
from wisp.core.protocol.messages import Draft, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Committed
from wisp.edge import backend
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.base import DraftEngine


@dataclass(frozen=True)
class Connected:
    """`Drafter.connected` was called."""

    now_ms: float
    max_draft: int


@dataclass(frozen=True)
class Asked:
    """`Drafter.wants_token` was called, and said `wants`."""

    now_ms: float
    wants: bool


@dataclass(frozen=True)
class Proposed:
    """`Drafter.proposed` was called."""

    now_ms: float
    token: int | None
    took_ms: float
    signal: Signal


@dataclass(frozen=True)
class Heard:
    """`Drafter.verdict` was called."""

    now_ms: float
    verdict: Verdict
    arrived_ms: float


Event = Connected | Asked | Proposed | Heard


class Told(msgspec.Struct, frozen=True):
    """One verdict as its user saw it."""

    base: int
    drafted: int
    accepted: int


@dataclass
class Story:
    """One generation: events in, messages out, and what was committed."""

    events: list[Event] = field(default_factory=list)
    messages: list[Open | Draft] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rounds: list[Told] = field(default_factory=list)
    finish: str = ""
    time_ms: float = 0.0  # from the first commitment to the last
    timed_tokens: int = 0  # committed in this time

    def took(self, actions: list[Action]) -> None:
        """Note what the drafter did."""
        for action in actions:
            if isinstance(action, Open | Draft):
                self.messages.append(action)
            elif isinstance(action, Committed):
                self.rounds.append(Told(len(self.tokens), action.drafted, action.accepted))
                self.tokens += action.tokens
                self.finish = action.finish

    @property
    def drafts(self) -> list[tuple[int, int, list[int], bool]]:
        """Every message to the verifier: round, base, tokens, and whether it is to decode by itself."""
        return [
            (m.round, len(m.committed), m.draft, m.serve)
            if isinstance(m, Open)
            else (m.round, m.base, m.tokens, m.serve)
            for m in self.messages
        ]


class _NotingDrafter(Drafter):
    """The edge's own, which also writes its story."""

    story: Story

    def wants_token(self, now_ms: float) -> bool:
        wants = super().wants_token(now_ms)
        self.story.events.append(Asked(now_ms, wants))
        return wants

    def connected(self, now_ms: float, max_draft: int, digest: str = "") -> list[Action]:
        self.story.events.append(Connected(now_ms, max_draft))
        return self._noted(super().connected(now_ms, max_draft, digest))

    def proposed(
        self,
        now_ms: float,
        token: int | None,
        signal: Signal,
        took_ms: float = 0.0,
        then: Sequence[int] = (),
    ) -> list[Action]:
        self.story.events.append(Proposed(now_ms, token, took_ms, signal))
        return self._noted(super().proposed(now_ms, token, signal, took_ms, then))

    def verdict(self, now_ms: float, verdict: Verdict, arrived_ms: float | None = None) -> list[Action]:
        self.story.events.append(Heard(now_ms, verdict, now_ms if arrived_ms is None else arrived_ms))
        return self._noted(super().verdict(now_ms, verdict, arrived_ms))

    def _noted(self, actions: list[Action]) -> list[Action]:
        self.story.took(actions)
        return actions


class Edge:
    """A real edge of this process, with a connection to `server`. `draft` stays the caller's."""

    def __init__(self, server: str, draft: DraftEngine, policies: Policies, ahead: Ahead | None) -> None:
        self._link = VerifierLink(server)
        self._backend = EdgeBackend(self._link, TokenizerCache(server), _Lent(draft), policies, ahead)

    async def __aenter__(self) -> Edge:
        self._link.start()
        await self._link.connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._link.close()
        self._backend.close()

    async def generate(self, prompt: list[int], sampling: Sampling, max_tokens: int) -> Story:
        """One generation, to its end."""
        story = Story()
        noting = type("Noting", (_NotingDrafter,), {"story": story})
        first_at = 0.0
        with patch.object(backend, "Drafter", noting):
            async for item in self._backend.generate(Generation(prompt, sampling, max_tokens)):
                if not first_at:
                    first_at = time.monotonic()
                else:
                    story.timed_tokens += len(item.tokens)
        story.time_ms = (time.monotonic() - first_at) * 1e3
        return story


class _Lent:
    """A draft engine that outlives the edge."""

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self.name = engine.name
        self.propose = engine.propose
        self.forget = engine.forget

    def close(self) -> None:
        return None


@contextlib.contextmanager
def verifier(target: str = "tiny-target") -> Iterator[Child]:
    """`wisp serve` in exact mode, as a child process, until the context is left."""
    (port,) = free_ports(1)
    words = ["-m", "wisp.cli", "serve", "--target", target, "--mode", "exact", "--threads", "1"]
    words += ["--slots", "4", "--context", "1024", "--port", str(port)]
    with Children() as children, httpx.Client(trust_env=False, verify=False) as client:
        child = children.start("verifier", words, port)
        child.wait_healthy(client)
        yield child
