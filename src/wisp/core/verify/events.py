"""What happens to a verifier, and what it wants done: plain structs, so that a run can be recorded and replayed."""

from __future__ import annotations

import msgspec

from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.admission import KeyLimits


class Limits(msgspec.Struct, frozen=True):
    """What this verifier takes. Tokens, except where a unit is given.

    park_s: a session outlives its connection this long. idle_s: a session that has kept its edge's silence
    this long may lose its KV to one that has work. forecast: refuse sessions whose SLO could not be kept.
    digest: of the engine (see `messages.Welcome`); "" where there is but one.
    """

    n_vocab: int
    eos: frozenset[int]
    slots: int
    slot_tokens: int
    kv_tokens: int
    step_tokens: int
    max_draft: int = 64
    park_s: float = 60.0
    idle_s: float = 1.0
    forecast: bool = False
    digest: str = ""


# --- events


class FromEdge(msgspec.Struct, frozen=True, array_like=True, tag="from_edge"):
    """A message came over `connection`, which belongs to `key`."""

    connection: int
    key: str
    message: Open | Draft | Cancel


class EdgeLost(msgspec.Struct, frozen=True, array_like=True, tag="edge_lost"):
    """The connection is gone."""

    connection: int


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag="step_done"):
    """The step ended. `error`: it failed as a whole, and no slot holds anything any more."""

    results: list[SliceResult]
    engine_ms: float
    error: str = ""


class Tick(msgspec.Struct, frozen=True, array_like=True, tag="tick"):
    """Time has passed, or there may be something to run."""


class KeyLimitsChanged(msgspec.Struct, frozen=True, array_like=True, tag="key_limits"):
    """These are the limits of keys from now on, all of them."""

    limits: dict[str, KeyLimits]


InEvent = FromEdge | EdgeLost | StepDone | Tick | KeyLimitsChanged


# --- actions


class Send(msgspec.Struct, frozen=True, array_like=True, tag="send"):
    """Send `message` over `connection`."""

    connection: int
    message: Verdict | Refused


class Run(msgspec.Struct, frozen=True, array_like=True, tag="run"):
    """Run a step: the copies in order, then the slices."""

    copies: list[Copy]
    slices: list[Slice]


class WakeAt(msgspec.Struct, frozen=True, array_like=True, tag="wake_at"):
    """Send a Tick at this time, unless one comes earlier."""

    at: float


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """A session ended, and there is nobody to tell: `why` is "abort" (cancelled) or "expired" (its edge was gone)."""

    session: str
    why: str


Action = Send | Run | WakeAt | Ended
