"""Batching policies by name. Each is a small class that plans one step at a time; see `base` for what it sees."""

from __future__ import annotations

from collections.abc import Callable

from wisp.core.batching.base import BatchingPolicy, Grant, Kind, Plan, StepLimits, Work
from wisp.core.batching.laxity import Laxity
from wisp.core.batching.paper import Wisp
from wisp.core.batching.simple import Continuous, Fcfs
from wisp.core.errors import ConfigError

POLICIES: dict[str, Callable[[], BatchingPolicy]] = {
    "laxity": Laxity,
    "wisp": Wisp,
    "continuous": Continuous,
    "fcfs": Fcfs,
}


def batching_policy(name: str) -> BatchingPolicy:
    """The policy of that name; "laxity:keep" is laxity without lending KV. Raises ConfigError."""
    if name == "laxity:keep":
        return Laxity(lends=False)
    if name not in POLICIES:
        raise ConfigError(f"unknown batching policy {name!r}; choose one of: {', '.join(POLICIES)}")
    return POLICIES[name]()


__all__ = ["POLICIES", "BatchingPolicy", "Grant", "Kind", "Plan", "StepLimits", "Work", "batching_policy"]
