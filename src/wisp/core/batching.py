"""Batching policies: who takes part in the next step, and with how many tokens.

A policy is given `now`, the work that could run, and what fits into one step; it returns grants, or a time
to ask again. It keeps no clock and does no I/O, so that server and simulator drive the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import msgspec

from wisp.core.errors import ConfigError


class Kind(IntEnum):
    """What a piece of work is. PREFILL may be cut into chunks; the others are run whole."""

    PREFILL = 0
    VERIFY = 1
    DECODE = 2


class Work(msgspec.Struct, frozen=True):
    """What one session could do in the next step.

    new:     tokens to feed (for PREFILL all that is left of the prompt, and a first draft behind it)
    cached:  KV tokens already there
    n_draft: draft tokens among `new`
    since:   time at which this work became ready
    opened:  time at which the session was opened
    key:     API key whose share it counts against
    """

    session: int
    kind: Kind
    new: int
    cached: int
    n_draft: int
    since: float
    opened: float
    key: str = ""


class StepLimits(msgspec.Struct, frozen=True):
    """What fits into one step. `shares`: tokens served so far per key; the least served goes first."""

    tokens: int
    slices: int
    shares: Mapping[str, float] = {}


class Grant(msgspec.Struct, frozen=True):
    """`session` takes part with its first `tokens` new tokens (fewer than `Work.new` only for PREFILL)."""

    session: int
    tokens: int


class Plan(msgspec.Struct, frozen=True):
    """Run `grants` now; if there are none, ask again at `wake_at` (None: when something changes)."""

    grants: list[Grant] = []
    wake_at: float | None = None


class BatchingPolicy(Protocol):
    """Chooses the next step."""

    name: str

    def plan(self, now: float, work: Sequence[Work], limits: StepLimits) -> Plan: ...


class Continuous:
    """Centralised serving at its best: continuous batching with chunked prefill.

    Every session that can commit a token takes part in every step, oldest wait first; what is left of the
    step's tokens goes to prompts, in chunks, first come first served (the least served key first). Prompts
    are sure of a quarter of the step, so a full house of decoders cannot lock newcomers out.
    """

    name = "continuous"

    def plan(self, now: float, work: Sequence[Work], limits: StepLimits) -> Plan:
        going = sorted((w for w in work if w.kind is not Kind.PREFILL), key=lambda w: (w.since, w.session))
        prompts = sorted(
            (w for w in work if w.kind is Kind.PREFILL),
            key=lambda w: (limits.shares.get(w.key, 0.0), w.opened, w.session),
        )
        reserved = min(limits.tokens // 4, sum(w.new for w in prompts))
        grants: list[Grant] = []
        left = limits.tokens
        for w in going:
            if len(grants) >= limits.slices or (grants and w.new > left - reserved):
                break
            grants.append(Grant(w.session, w.new))
            left -= w.new
        for w in prompts:
            if len(grants) >= limits.slices or left <= 0:
                break
            grants.append(Grant(w.session, min(w.new, left)))
            left -= grants[-1].tokens
        return Plan(grants)


class Fcfs:
    """SLED's server: requests in order of arrival, whole, until the step is full. Nobody overtakes."""

    name = "fcfs"

    def plan(self, now: float, work: Sequence[Work], limits: StepLimits) -> Plan:
        grants: list[Grant] = []
        left = limits.tokens
        for w in sorted(work, key=lambda w: (w.since, w.session)):
            if len(grants) >= limits.slices or (grants and w.new > left):
                break
            grants.append(Grant(w.session, w.new))
            left -= w.new
        return Plan(grants)


POLICIES: dict[str, Callable[[], BatchingPolicy]] = {"continuous": Continuous, "fcfs": Fcfs}


def batching_policy(name: str) -> BatchingPolicy:
    """The policy of that name."""
    if name not in POLICIES:
        raise ConfigError(f"unknown batching policy {name!r}; choose one of: {', '.join(POLICIES)}")
    return POLICIES[name]()
