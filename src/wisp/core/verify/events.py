"""Events and actions of a verifier: plain structs, so that a run can be recorded and replayed.

Event logs store them by tag and position, and `Limits` by field name: those names stay as they are.
"""

from __future__ import annotations

import msgspec

from wisp.core.protocol.messages import MAX_DRAFT, Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.admission import KeyLimits


class Limits(msgspec.Struct, frozen=True, rename={"slo_admission": "forecast"}):
    """Limits of this verifier. Tokens, except where a unit is given.

    park_s:        how long a session outlives its connection
    idle_s:        after this silence of its edge a session may lose its KV to another
    slo_admission: refuse sessions whose SLO could not be met
    digest:        of the engine (see `messages.Welcome`); "" if there is only one
    depth:         steps that the engine may have at a time (`in_flight`)
    history_tokens: of past and present texts, for drafts of its own (`own_drafts`); 0: it makes none
    """

    n_vocab: int
    eos: frozenset[int]
    slots: int
    slot_tokens: int
    kv_tokens: int
    step_tokens: int
    max_draft: int = MAX_DRAFT
    park_s: float = 60.0
    idle_s: float = 1.0
    slo_admission: bool = False
    digest: str = ""
    depth: int = 1
    history_tokens: int = 0


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
    """A step ended. `error`: it failed as a whole, and all slots are empty.

    engine_ms: what it took in the engine. host_ms: from its planning until the engine had all of it, where the host
               works on one step while another runs
    step:      its number (-1: of the oldest one)
    """

    results: list[SliceResult]
    engine_ms: float
    error: str = ""
    step: int = -1
    host_ms: float = 0.0


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
    """Run a step, after all steps before it: the copies in order, then the slices.

    step:  its number
    epoch: failed steps before it was planned. A step that was planned before the last failure builds on KV that is
           gone: it fails, too
    """

    copies: list[Copy]
    slices: list[Slice]
    step: int = 0
    epoch: int = 0


class WakeAt(msgspec.Struct, frozen=True, array_like=True, tag="wake_at"):
    """Send a Tick at this time, unless one comes earlier."""

    at: float


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """A session ended without a message to its edge. `why`: "abort" (cancelled) or "expired" (the edge was lost)."""

    session: str
    why: str


Action = Send | Run | WakeAt | Ended
