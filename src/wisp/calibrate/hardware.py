"""Hardware and its cost model: a fit to a hardware profile, and a hardware profile made of a fit."""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec

from wisp.calibrate.profile.grid import EngineSize, cells
from wisp.calibrate.profile.target import FORMAT, CostProfile
from wisp.core.errors import ConfigError
from wisp.core.verify.cost import Coefficients, Load, fit
from wisp.engines.build import CONTEXT, SLOTS
from wisp.engines.emulated import Hardware


@functools.lru_cache(maxsize=256)
def profiled(profile: Hardware) -> Coefficients:
    """Coefficients fitted to the profile's own times, of an engine that runs one step at a time."""
    if isinstance(profile, Measured):
        return profile.coefficients
    size = EngineSize(profile.step_tokens, profile.slots, profile.kv_tokens, profile.slot_tokens)
    grid = cells(size)
    loads = [c.load for c in grid]
    return fit(loads, [profile.step_ms(load) + profile.host_s(load.slices) * 1e3 for load in loads])


class Measured(Hardware, frozen=True):
    """An engine of which only the step times are known. The data sheet's figures mean nothing."""

    engine: str = ""
    model: str = ""
    mode: str = ""
    coefficients: Coefficients = Coefficients()

    def step_ms(self, load: Load) -> float:
        return self.coefficients.ms(load)


def measured(path: Path, slots: int = 0, kv_tokens: int = 0) -> Measured:
    """Of a cost profile, as `wisp profile --target` writes it. 0: the default of `wisp serve`. Raises ConfigError."""
    from wisp.engines.llama.target import STEP_TOKENS

    slots = slots or SLOTS["llama.cpp"]
    kv_tokens = kv_tokens or slots * CONTEXT
    try:
        found = msgspec.json.decode(path.read_bytes(), type=CostProfile)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the cost profile {path.name}: {error}") from None
    if found.format != FORMAT:
        raise ConfigError(f"{path.name} has the format {found.format!r}; this release reads {FORMAT}")
    return Measured(
        about=f"{found.model} on {found.engine}, as profiled",
        parameters=1.0,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=1,
        bandwidth=1.0,
        tflops=1.0,
        overlap=1.3,  # for `sim.plan.estimate.reached` alone, whose shares are of 1.3: steps are as measured
        kv_tokens=kv_tokens,
        slots=slots,
        slot_tokens=kv_tokens // slots,
        step_tokens=STEP_TOKENS[found.mode] if found.engine == "llama.cpp" else 2048,
        noise=found.noise,
        straggle=0.0,
        engine=found.engine,
        model=found.model,
        mode=found.mode,
        coefficients=found.coefficients,
    )
