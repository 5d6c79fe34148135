"""Batching policies by name. Each is a small class that plans one step at a time; `base` has the interface."""

from __future__ import annotations

from collections.abc import Callable

from wisp.core.errors import ConfigError
from wisp.core.verify.batching.base import (
    BatchingPolicy,
    Candidate,
    Grant,
    Kind,
    Plan,
    StepLimits,
    Unpriced,
)
from wisp.core.verify.batching.paper import Paper
from wisp.core.verify.batching.simple import Continuous, Fcfs
from wisp.core.verify.batching.wisp import Wisp

POLICIES: dict[str, Callable[[], BatchingPolicy]] = {
    "wisp": Wisp,
    "paper": Paper,
    "continuous": Continuous,
    "fcfs": Fcfs,
}
OLD_NAMES = {"laxity": "wisp", "laxity:keep": "wisp:keep"}  # for one release


def batching_policy(name: str) -> BatchingPolicy:
    """The policy of that name; "wisp:keep" is `wisp` without preemption. Raises ConfigError."""
    name = OLD_NAMES.get(name, name)
    if name == "wisp:keep":
        return Wisp(preempts=False)
    if name not in POLICIES:
        raise ConfigError(f"unknown batching policy {name!r}; choose one of: {', '.join(POLICIES)}")
    return POLICIES[name]()


__all__ = [
    "POLICIES",
    "BatchingPolicy",
    "Candidate",
    "Grant",
    "Kind",
    "Plan",
    "StepLimits",
    "Unpriced",
    "batching_policy",
]
