"""A real edge that writes down what its drafter saw and did, and a real verifier for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

from wisp.api.backend import Generation
from wisp.children import Child, serving
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action
from wisp.core.protocol.messages import Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Committed
from wisp.edge import backend
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.base import DraftEngine


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


@dataclass
class Story:
    """One generation: what its drafter saw, in order, and what was committed."""

    events: list[object] = field(default_factory=list)  # Proposed, Heard
    tokens: list[int] = field(default_factory=list)
    time_ms: float = 0.0  # from the first commitment to the last
    timed_tokens: int = 0  # committed in this time

    def took(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Committed):
                self.tokens += action.tokens


class NotingDrafter(Drafter):
    """The edge's own, which also writes its story."""

    story: Story

    def connected(
        self, now_ms: float, max_draft: int, digest: str = "", max_branches: int = 0
    ) -> list[Action]:
        """Without branches: a trace has no second choices, so that a replay cannot have them."""
        return super().connected(now_ms, max_draft, digest)

    def proposed(
        self,
        now_ms: float,
        token: int | None,
        signal: Signal,
        took_ms: float = 0.0,
        then: Sequence[int] = (),
        other: int | None = None,
    ) -> list[Action]:
        self.story.events.append(Proposed(now_ms, token, took_ms, signal))
        return self.noted(super().proposed(now_ms, token, signal, took_ms, then, other))

    def verdict(self, now_ms: float, verdict: Verdict, arrived_ms: float | None = None) -> list[Action]:
        self.story.events.append(Heard(now_ms, verdict, now_ms if arrived_ms is None else arrived_ms))
        return self.noted(super().verdict(now_ms, verdict, arrived_ms))

    def noted(self, actions: list[Action]) -> list[Action]:
        self.story.took(actions)
        return actions


class Edge:
    """A real edge of this process, with a connection to `server`. `draft` stays the caller's."""

    def __init__(self, server: str, draft: DraftEngine, policies: Policies, ahead: Ahead | None) -> None:
        self._link = VerifierLink(server)
        self._backend = EdgeBackend(self._link, TokenizerCache(server), draft, policies, ahead)

    async def __aenter__(self) -> Edge:
        self._link.start()
        await self._link.connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._link.close()
        self._backend.drafter = None  # or it would be closed, too
        self._backend.close()

    async def generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        max_tokens: int,
        story: Story | None = None,
        drafter: type[NotingDrafter] = NotingDrafter,
    ) -> Story:
        """One generation, to its end, told in `story`."""
        story = story or Story()
        noting = type("Noting", (drafter,), {"story": story})
        first_at = 0.0
        with patch.object(backend, "Drafter", noting):
            async for item in self._backend.generate(Generation(prompt, sampling, max_tokens)):
                if not first_at:
                    first_at = time.monotonic()
                else:
                    story.timed_tokens += len(item.tokens)
        story.time_ms = (time.monotonic() - first_at) * 1e3
        return story


def verifier(target: str = "tiny-target") -> contextlib.AbstractContextManager[Child]:
    """`wisp serve` in exact mode, as a child process, until the context is left."""
    words = ["-m", "wisp.cli", "serve", "--target", target, "--mode", "exact", "--threads", "1"]
    words += ["--slots", "4", "--context", "1024", "--history-tokens", "0", "--port"]
    return serving("verifier", lambda port, _: [*words, str(port)])
