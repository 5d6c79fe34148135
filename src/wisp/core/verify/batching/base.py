"""What a batching policy sees and answers: who takes part in the next step, and with how many tokens.

A policy is given `now`, the work that could run, and what fits into one step; it returns grants, or a time
to ask again. It keeps no clock and does no I/O, so that server and simulator drive the same object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import msgspec

from wisp.core.verify.cost import CostModel


class Kind(IntEnum):
    """What a piece of work is. PREFILL may be cut into chunks, VERIFY to fewer draft tokens."""

    PREFILL = 0
    VERIFY = 1
    DECODE = 2


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """What one session could do in the next step.

    new:     tokens to feed (for PREFILL all that is left of the prompt, and a first draft behind it)
    cached:  KV tokens already there
    n_draft: draft tokens among `new`
    since:   time at which this work became ready
    opened:  time at which the session was opened
    key:     API key whose share it counts against
    due:     when the next token must leave here to be in time (inf: no hurry)
    tpot_s:  seconds that its user gives each token (0: no target)
    gain:    tokens it is expected to commit, run whole; a prompt's first token counts
    usual:   tokens that a round of this session commits, smoothed
    room:    tokens that the session may still generate
    absent:  its edge is drafting and has not asked for anything; a token may be decoded all the same
    first:   its first token is still to come
    lag_s:   how far behind its pace it was when it was last answered (negative: ahead)
    late:    its SLO is lost, and `due` is that of half its pace
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
    gain: float = 1.0
    usual: float = 1.0
    room: int = 1 << 30
    absent: bool = False
    first: bool = False
    lag_s: float = 0.0
    late: bool = False


class StepLimits(msgspec.Struct, frozen=True):
    """What fits into one step, and what it will cost.

    shares: tokens served so far per key; the least served goes first
    cost:   predicts how long a step takes
    room:   KV tokens that can be had; infinite where there are enough for all work
    """

    tokens: int
    slices: int
    shares: Mapping[str, float] = {}
    cost: CostModel = CostModel()
    room: float = math.inf


class Grant(msgspec.Struct, frozen=True, gc=False):
    """`session` takes part with its first `tokens` new tokens: less than `Candidate.new` cuts a prompt, or a draft."""

    session: int
    tokens: int


class Plan(msgspec.Struct, frozen=True):
    """Run `grants` now; if there are none, ask again at `wake_at` (None: when something changes).

    left_ms: engine time of drafts and prompts left out for want of time, or owed to sessions that are hardly ahead
    lost:    sessions whose SLO cannot be kept any more, whatever is done: half their pace will do from now on
    """

    grants: list[Grant] = []
    wake_at: float | None = None
    left_ms: float = 0.0
    lost: list[int] = []


class BatchingPolicy(Protocol):
    """Chooses the next step. `wants_drafting`: does it want to know of sessions whose edge is still drafting?
    `preempts`: do sessions ahead of their pace lend their KV to others (`core.verify.preemption`)?"""

    name: str
    wants_drafting: bool
    preempts: bool

    def plan(self, now: float, work: Sequence[Candidate], limits: StepLimits) -> Plan: ...
