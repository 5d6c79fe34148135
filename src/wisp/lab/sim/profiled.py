"""What `wisp profile` finds for a hardware profile: the fit to its own times, without their noise."""

from __future__ import annotations

import functools

from wisp.core.cost import Coefficients, fit
from wisp.engines.emulated import Hardware
from wisp.lab.profiling.grid import Room, cells


@functools.lru_cache(maxsize=16)
def profiled(profile: Hardware) -> Coefficients:
    """Coefficients fitted to the profile's own times."""
    room = Room(profile.step_tokens, profile.slots, profile.kv_tokens, profile.slot_tokens)
    grid = cells(room)
    loads = [c.load for c in grid]
    return fit(loads, [profile.step_ms(load) for load in loads])
