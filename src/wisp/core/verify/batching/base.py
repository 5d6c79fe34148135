"""The interface of a batching policy: candidates in, a plan for the next step out.

A policy sees `now`, the candidates and the limits of a step. It returns grants, or a time to ask again. It reads no
clock and does no I/O, so the server and the simulator use the same object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import msgspec

from wisp.core.verify.cost import CostModel


class Kind(IntEnum):
    """What a candidate would run. A PREFILL can be cut into chunks, a VERIFY to fewer draft tokens."""

    PREFILL = 0
    VERIFY = 1
    DECODE = 2


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """What one session could run in the next step.

    new:             tokens to feed (PREFILL: the rest of the prompt, and a first draft behind it)
    cached:          KV tokens in the slot
    n_draft:         draft tokens among `new`
    since:           time at which this became ready to run
    opened:          time at which the session was opened
    key:             API key whose share it counts against
    due:             time at which the next token must leave the verifier to meet the SLO (inf: no SLO)
    tpot_s:          TPOT target in seconds (0: none)
    expected_tokens: tokens it is expected to commit if run whole; the first token after a prompt counts
    remaining:       tokens that the session may still generate
    edge_drafting:   the edge is still drafting and has sent nothing yet; a plain decode is possible
    first:           the first token is still to come
    lag_s:           seconds behind the TPOT target at the last verdict (negative: ahead)
    slo_lost:        the SLO can no longer be met; `due` follows twice the TPOT target
    acceptance:      probability that a draft token is accepted if those before it are
    """

    session: int
    kind: Kind
    new: int
    cached: int
    n_draft: int
    since: float
    opened: float
    key: str = ""
    due: float = math.inf
    tpot_s: float = 0.0
    expected_tokens: float = 1.0
    remaining: int = 1 << 30
    edge_drafting: bool = False
    first: bool = False
    lag_s: float = 0.0
    slo_lost: bool = False
    acceptance: float = 0.8


class StepLimits(msgspec.Struct, frozen=True):
    """What fits into one step, and what it will cost.

    tokens, slices: most of each in a step
    shares:         tokens served so far per API key; the least served key goes first
    cost:           predicts the step time
    free_kv:        KV tokens available to this step; inf if every candidate fits
    answer_tokens:  tokens of an answer, smoothed; answer_s: its seconds, likewise
    """

    tokens: int
    slices: int
    shares: Mapping[str, float] = {}
    cost: CostModel = CostModel()
    free_kv: float = math.inf
    answer_tokens: float = 200.0
    answer_s: float = 10.0


class Grant(msgspec.Struct, frozen=True, gc=False):
    """`session` runs its first `tokens` new tokens. Fewer than `Candidate.new` cut a prompt or a draft."""

    session: int
    tokens: int


class Plan(msgspec.Struct, frozen=True):
    """Run `grants` now. Without grants, ask again at `wake_at` (None: at the next event)."""

    grants: list[Grant] = []
    wake_at: float | None = None


class BatchingPolicy(Protocol):
    """Chooses the next step.

    wants_drafting: also offer sessions whose edge is still drafting
    gives_up:       a session whose SLO is missed whatever happens is due at half its pace from then on
    preempts:       sessions far ahead of their TPOT target lose KV to urgent ones (`core.verify.preemption`)
    price:          what one more draft token costs other sessions, in committed tokens; 0 if the policy has none
    price_of:       the same in tokens of one session, by when its next one is due: less if it is late, more if ahead
    """

    name: str
    wants_drafting: bool
    gives_up: bool
    preempts: bool
    price: float

    def plan(self, now: float, candidates: Sequence[Candidate], limits: StepLimits) -> Plan: ...

    def price_of(self, now: float, due: float, tpot_s: float) -> float: ...


class Unpriced:
    """A policy without a price: no edge needs to care how full steps are."""

    price = 0.0

    def price_of(self, now: float, due: float, tpot_s: float) -> float:
        return 0.0
