"""Making a plan that fails shorter: events are left out as long as it fails in the same way (delta debugging).

Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input" (2002). What is left is written as JSON,
which `wisp check-faults --replay FILE` runs again; in `tests/check/faults` it is a test from then on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from wisp.check.faults.plan import Event, Plan, with_events
from wisp.check.faults.world import Found, run_plan
from wisp.core.errors import ConfigError

RUNS = 400  # at most
_PARTICULAR = re.compile(r"[0-9a-f]{12,}|-?\d+")


def alike(one: str, other: str) -> bool:
    """Are two violations of one kind? Names and numbers do not count."""
    return _kind(one) == _kind(other)


def _kind(what: str) -> str:
    return _PARTICULAR.sub("#", what.split("\n")[0])[:60]


def shrink(plan: Plan, found: Found, run: Callable[[Plan], Found | None] | None = None) -> Plan:
    """The shortest plan found that fails as `plan` does. `run` runs one (default: for real)."""
    run = run or (lambda tried: run_plan(tried).found)
    left = RUNS

    def fails(events: Sequence[Event]) -> bool:
        nonlocal left
        left -= 1
        again = run(with_events(plan, events))
        return again is not None and alike(again.what, found.what)

    events = [e for e in plan.events if e.at <= found.at]
    if not fails(events):
        events = list(plan.events)
    parts = 2
    while len(events) >= 2 and left > 0:
        size = -(-len(events) // parts)
        for start in range(0, len(events), size):
            rest = events[:start] + events[start + size :]
            if left > 0 and fails(rest):
                events, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(len(events), 2 * parts)
    return with_events(plan, events)


class Case(msgspec.Struct, frozen=True):
    """A file: a plan, and what it showed when it was written."""

    plan: Plan
    found: str = ""


def write_case(path: Path, plan: Plan, found: Found) -> None:
    """One event a line, for people."""
    text = msgspec.json.encode(Case(plan, found.what.split("\n")[0]))
    path.write_bytes(msgspec.json.format(text, indent=1) + b"\n")


def read_case(path: Path) -> Plan:
    """Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Case).plan
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as a plan of `wisp check-faults`: {error}") from None
