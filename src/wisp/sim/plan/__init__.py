"""`wisp plan`: the devices that a verifier can carry, and whether WISP pays there.

    estimate: shares of the fluid bounds  ->  trials: simulations that overrule it  ->  advice: what to do, and why

Three of the five verdicts say not to use WISP.
"""

from __future__ import annotations

import math

import msgspec

from wisp.core.errors import ConfigError
from wisp.sim.plan.advice import Verdict, assumed, commands, decide, reasons
from wisp.sim.plan.estimate import TOLERANCES, Estimate, estimate
from wisp.sim.plan.trials import Trials, Watch
from wisp.sim.runs import Runs
from wisp.sim.scenario import Kit, Scenario, SloClass

NAMES = ("wisp", "central")
LONGEST_S = 300.0  # of a warm-up


class Plan(msgspec.Struct, frozen=True):
    """Advice. reasons: in plain words; assumed: settings of both ways; commands: for the advised way."""

    verdict: Verdict
    devices: int
    wisp: Estimate
    central: Estimate
    reasons: tuple[str, ...]
    assumed: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def scenario_for(
    hardware: str,
    devices: int,
    device: str,
    rtt_ms: float,
    rate: float,
    prompt: tuple[int, int] = (60, 200),
    output: tuple[int, int] = (100, 300),
    ttft_s: float = 3.0,
    acceptance: float | None = None,
    kv_tokens: int = 0,
    slots: int = 0,
) -> Scenario:
    """A plan's question, as a scenario of short runs. kv_tokens, slots: 0 for the hardware profile's. Raises
    ConfigError."""
    if devices < 1:
        raise ConfigError(f"--devices {devices}: plan for at least one")
    _positive("--rate", rate, "tokens per second")
    _positive("--ttft", ttft_s, "seconds")
    if not (math.isfinite(rtt_ms) and rtt_ms >= 0):
        raise ConfigError(f"--rtt {rtt_ms:g}: give 0 or more ms")
    if acceptance is not None and not 0 < acceptance <= 1:
        raise ConfigError(f"--acceptance {acceptance:g}: give a share, more than 0 and at most 1")
    kit = Kit(device, rtt_ms)
    _positive("--device", kit.build()[0].tokens_per_s, "drafted tokens per second, or a profile")
    return Scenario(
        title=f"{devices} devices on {hardware}",
        hardware=hardware,
        slo=(SloClass(rate, ttft_s),),
        devices=(kit,),
        prompt_tokens=prompt,
        output_tokens=output,
        devices_n=devices,
        kv_tokens=kv_tokens,
        slots=slots,
        acceptance=acceptance or 0.0,
        warmup_s=min(max(30.0, sum(output) / 2 / rate), LONGEST_S),
        window_s=30.0,
        drain_s=min(max(45.0, 1.2 * output[1] / rate), LONGEST_S),
    )


def _positive(option: str, value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{option} {value:g}: give a number of {what}, more than 0")


def plan(
    scenario: Scenario,
    *,
    tolerance: float = 0.1,
    simulate: bool = False,
    runs: Runs | None = None,
    watch: Watch = lambda what, done, of: None,
) -> Plan:
    """Advice for a scenario of one class and one kind of device. Raises ConfigError."""
    if not TOLERANCES[0] <= tolerance <= 0.5:
        raise ConfigError(f"--tolerance {tolerance:g}: give a share between {TOLERANCES[0]:g} and 0.5")
    n = scenario.devices_n
    found = {name: estimate(name, scenario, tolerance) for name in NAMES}
    if simulate and any(e.limit not in ("context", "ttft") for e in found.values()):
        found = Trials(scenario, tolerance, runs or Runs(), watch).overrule(found)
    wisp, central = found["wisp"], found["central"]
    verdict = decide(n, wisp, central)
    return Plan(
        verdict,
        n,
        wisp,
        central,
        tuple(reasons(scenario, verdict, wisp, central)),
        assumed(scenario),
        commands(scenario, verdict, wisp, central),
    )
