"""Events and actions of a verifier: plain structs, so that a run can be recorded and replayed.

Event logs store them by tag and position, and `Limits` by field name: those names stay as they are.
"""

from __future__ import annotations

import msgspec

from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.admission import KeyLimits


class Limits(msgspec.Struct, frozen=True, rename={"slo_admission": "forecast"}):
    """Limits of this verifier. Tokens, except where a unit is given.

    park_s:        how long a session outlives its connection
    idle_s:        after this silence of its edge a session may lose its KV to another
    slo_admission: refuse sessions whose SLO could not be met
    digest:        of the engine (see `messages.Welcome`); "" if there is only one
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
    slo_admission: bool = False
    digest: str = ""


# --- events


class Received(msgspec.Struct, frozen=True, array_like=True, tag="from_edge"):
    """A message arrived over `connection`, which belongs to the API key `key`."""

    connection: int
    key: str
    message: Open | Draft | Cancel


class EdgeLost(msgspec.Struct, frozen=True, array_like=True, tag="edge_lost"):
    """The connection was closed or lost."""

    connection: int


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag="step_done"):
    """The step ended. `error`: it failed as a whole, and all slots are empty."""

    results: list[SliceResult]
    engine_ms: float
    error: str = ""


class Tick(msgspec.Struct, frozen=True, array_like=True, tag="tick"):
    """Time has passed, or a step may be possible."""


class KeyLimitsChanged(msgspec.Struct, frozen=True, array_like=True, tag="key_limits"):
    """From now on the limits of API keys are these, and no others."""

    limits: dict[str, KeyLimits]


InEvent = Received | EdgeLost | StepDone | Tick | KeyLimitsChanged


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
    """A session ended without a message to its edge. `why`: "abort" (cancelled) or "expired" (the edge was lost)."""

    session: str
    why: str


Action = Send | Run | WakeAt | Ended
