"""Drafting policies: after each drafted token, include it or not, and go on or stop.

A policy is a small class with two methods, chosen by name from `POLICIES`. It sees plain data: the signal
of the token just proposed, and the round so far. It never sees a model, a socket or a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.core.errors import ConfigError


class Signal(msgspec.Struct, frozen=True, array_like=True):
    """Statistics of the draft distribution behind one proposed token, at temperature 1, natural log.

    confidence: probability of the proposed token
    entropy:    of the whole distribution, nats
    margin:     probability of the likeliest id minus that of the second
    spread:     standard deviation of the logits
    """

    confidence: float = 0.0
    entropy: float = 0.0
    margin: float = 0.0
    spread: float = 0.0


def signal(logits: npt.NDArray[np.float32], token: int) -> Signal:
    """The signal of `token` under `logits` (shape [vocabulary])."""
    top = int(np.argmax(logits))
    peak = logits[top]
    shifted = logits - peak
    weights = np.exp(shifted)
    z = float(weights.sum(dtype=np.float64))
    entropy = float(np.log(z) - np.dot(weights, shifted) / z)
    weights[top], best = -1.0, float(weights[top])
    second = max(float(weights.max()), 0.0)
    confidence = best / z if token == top else float(weights[token]) / z
    return Signal(confidence, entropy, (best - second) / z, float(logits.std()))


class Round(msgspec.Struct, frozen=True):
    """What a policy sees of the round in progress.

    now_ms:    time, milliseconds, any origin
    drafted:   tokens in the draft so far (before the one being decided)
    room:      tokens that may still be added (limits of protocol, context and max_tokens)
    """

    now_ms: float
    drafted: int
    room: int


class Decision(msgspec.Struct, frozen=True):
    """include: the token just proposed joins the draft. more: draft another one."""

    include: bool
    more: bool


class DraftingPolicy(Protocol):
    """Decides where a draft ends. One instance per session; may keep history."""

    def start(self, round_: Round) -> bool:
        """Draft at all this round? (False sends an empty draft: one target token.)"""
        ...

    def decide(self, round_: Round, signal: Signal) -> Decision:
        """The token whose `signal` this is has just been proposed."""
        ...

    def observe(self, drafted: int, accepted: int) -> None:
        """A verdict: `accepted` of `drafted` tokens agreed with the target."""
        ...


class Fixed:
    """SLED's policy: always k tokens."""

    def __init__(self, k: int) -> None:
        if not 1 <= k <= 64:
            raise ConfigError(f"fixed:{k}: a draft has 1 to 64 tokens, e.g. fixed:4")
        self.k = k

    def start(self, round_: Round) -> bool:
        return round_.room > 0

    def decide(self, round_: Round, signal: Signal) -> Decision:
        return Decision(include=True, more=round_.drafted + 1 < min(self.k, round_.drafted + round_.room))

    def observe(self, drafted: int, accepted: int) -> None:
        return None


POLICIES: dict[str, Callable[[str], DraftingPolicy]] = {
    "fixed": lambda argument: Fixed(int(argument or 4)),
}


def drafting_policy(spec: str) -> DraftingPolicy:
    """A fresh policy from its command-line form, e.g. "fixed:4"."""
    name, _, argument = spec.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown drafting policy {spec!r}; choose one of: {', '.join(POLICIES)}")
    try:
        return POLICIES[name](argument)
    except ValueError:
        raise ConfigError(f"drafting policy {spec!r}: {argument!r} is not a number, try {name}:4") from None
