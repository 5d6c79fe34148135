"""How tests wait: for events, with one deadline that only what never comes can miss."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

PATIENCE_S = 180.0  # for anything that comes within seconds on a quiet machine
LOOK_S = 0.02  # between two looks

T = TypeVar("T")


def eventually(look: Callable[[], T | None], timeout_s: float = PATIENCE_S) -> T:
    """Poll until `look` returns something true. What it last returned is in the error."""
    deadline = time.monotonic() + timeout_s
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s; last seen: {seen!r}"
        time.sleep(LOOK_S)
    return seen


async def until(look: Callable[[], object]) -> None:
    """`eventually`, on an event loop; without a deadline of its own, see `run`."""
    while not look():
        await asyncio.sleep(LOOK_S / 2)


def run(scenario: Awaitable[T]) -> T:
    """A scenario on an event loop of its own, to its end."""

    async def main() -> T:
        return await asyncio.wait_for(scenario, PATIENCE_S)

    return asyncio.run(main())
