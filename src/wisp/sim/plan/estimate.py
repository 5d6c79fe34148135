"""Devices to expect from one server: a fluid bound, times the share of it that capacity searches reached.

With drafts the bound is that of a good schedule, not the ideal one. Circumstances harder than the searches' take more
off.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from wisp.core.verify.cost import Load
from wisp.sim.fluid import Bound, bound, demand_of
from wisp.sim.scenario import Scenario

TOLERANCES = (0.01, 0.1)
# Shares that capacity searches reached with these tolerances, by tokens/s: `capacity_at_1_percent` and `capacity` in
# docs/results/table.json. With drafts they are of a good schedule (`bound`, not `ideal`), centrally of the bound. Steps
# had an overlap of 1.3 in these searches. LATER is what searches with 2.2 reached, at a tolerance of 0.1
# (docs/results/overlap.json, one seed).
REACHED = {
    "wisp": {8.0: (0.969, 1.002), 12.0: (0.967, 1.053), 16.0: (0.875, 1.063), 20.0: (0.792, 1.087)},
    "central": {8.0: (0.922, 1.01), 12.0: (0.973, 1.096), 16.0: (0.774, 0.842), 20.0: (0.763, 0.813)},
}
LATER = {
    "wisp": {8.0: 1.033, 12.0: 1.026, 16.0: 1.058, 20.0: 1.137},
    "central": {8.0: 1.026, 12.0: 0.96, 16.0: 0.948, 20.0: 0.768},
}
OVERLAPS = (1.3, 2.2)
USUAL_WAIT_S, USUAL_OUTPUT = 3.0, 200.0  # TTFT target and tokens of an answer there
# Prompts come in lumps. A larger share of them in the tokens of a step than usual takes this many times the difference
# off. Chosen so that searches with longer prompts carried the expected devices.
USUAL_LUMPS = 0.4
LUMPY = {"wisp": 0.45, "central": 0.25}
PREEMPTED = 0.25  # of the possible gain by preemption, up to as many devices again: seen at 2 to 6 tokens/s
PLENTY = 10**9  # tokens of KV


class Estimate(msgspec.Struct, frozen=True):
    """For one way of serving.

    bound:     the fluid bound
    devices:   how many to expect one server to carry; tried: a simulation has found this number
    limit:     the scarce resource: time, kv, slots, context (a session is longer than a slot) or ttft (a first token
               takes longer than users wait, even on an idle server)
    simulated: violation rate at the devices asked for (None: not simulated)
    """

    bound: float
    devices: int
    limit: str
    tried: bool = False
    simulated: float | None = None

    def carries(self, n: int) -> bool:
        """Does one server carry `n` devices?"""
        return self.devices >= n

    def servers(self, n: int) -> int:
        """Servers needed for `n` devices; 0: no number of them is enough."""
        return math.ceil(n / self.devices) if self.devices else 0


def estimate(name: str, scenario: Scenario, tolerance: float) -> Estimate:
    """Of a system ("wisp" or "central"), with at most this share of requests late."""
    profile = scenario.profile
    if longest(scenario) > min(profile.slot_tokens, profile.kv_tokens):
        return Estimate(0.0, 0, "context")
    warm = kept_up(scenario)
    if idle_ttft_ms(warm) > scenario.slo[0].ttft_s * 1e3:
        return Estimate(0.0, 0, "ttft")
    limit = bound(warm, central=name == "central")
    devices = int(expected(name, warm, tolerance))
    return Estimate(round(limit.devices, 1), devices, limit.limit)


def expected(name: str, scenario: Scenario, tolerance: float = 0.1) -> float:
    """Devices to expect of a system: the share that searches reached of its bound. Larger lumps of prompts and less
    patient users than in the searches take some off."""
    central = name == "central"
    at_once = bound(scenario, central=central, preempts=False).devices
    gain = PREEMPTED * (bound(scenario, central=central).devices - at_once)
    memory = at_once + min(gain, at_once)
    unlimited = msgspec.structs.replace(scenario, kv_tokens=PLENTY, slots=PLENTY // 1000)
    in_time = bound(unlimited, central=central, ideal=central)
    at = (scenario.slo[0].rate, tolerance, scenario.profile.overlap)
    share = reached(name, *at)
    if not in_time.point.sent:  # it serves centrally, too
        share = min(share, reached("central", *at))
    left = 1.0 - _lumpiness(name, scenario, in_time)
    return share * _patience(scenario) * max(0.0, min(memory, left * in_time.devices))


def _lumpiness(name: str, scenario: Scenario, limit: Bound) -> float:
    """Share to take off because prompts are more of a step than usual."""
    point, demand = limit.point, demand_of(scenario, scenario.slo[0], scenario.devices[0])
    fed = point.committed * demand.prompt / demand.output
    return LUMPY[name] * max(0.0, fed / (fed + point.sent + 1) - USUAL_LUMPS)


def reached(name: str, rate: float, tolerance: float = 0.1, overlap: float = OVERLAPS[0]) -> float:
    """Share that a system reached, interpolated: linear in the rate and in the overlap, constant beyond those searched,
    and linear in the logarithm of the tolerance."""
    shares, later = REACHED[name], LATER[name]
    by_tolerance = [float(np.interp(rate, list(shares), [r[i] for r in shares.values()])) for i in (0, 1)]
    then = float(np.interp(rate, list(later), list(later.values())))
    more = float(np.interp(overlap, OVERLAPS, (1.0, then / by_tolerance[1])))
    return more * float(np.interp(math.log(tolerance), np.log(TOLERANCES), by_tolerance))


def _patience(scenario: Scenario) -> float:
    """A user needs nothing while waiting for a first token. Waits that are shorter, relative to answers, than in the
    searches mean fewer devices; longer ones are not counted on."""
    slo, output = scenario.slo[0], sum(scenario.output_tokens) / 2
    return min(1.0, (1 + slo.ttft_s * slo.rate / output) / (1 + USUAL_WAIT_S * slo.rate / USUAL_OUTPUT))


def kept_up(scenario: Scenario) -> Scenario:
    """With the speed of warm devices."""
    kit = scenario.devices[0]
    device, _ = kit.build()
    if device.throttle >= 1.0:
        return scenario
    slower = msgspec.structs.replace(kit, device=f"{device.tokens_per_s * device.throttle:g}")
    return msgspec.structs.replace(scenario, devices=(slower,))


def longest(scenario: Scenario) -> int:
    return scenario.prompt_tokens[1] + scenario.output_tokens[1]


def idle_ttft_ms(scenario: Scenario) -> float:
    """Time to the first token of a mean prompt on an idle server."""
    profile, prompt = scenario.profile, sum(scenario.prompt_tokens) // 2
    steps = math.ceil(prompt / profile.step_tokens)
    each = math.ceil(prompt / steps)
    loads = [Load(each, each * (i + 1) * each, i * each, 1) for i in range(steps)]
    return scenario.devices[0].rtt_ms + sum(map(profile.step_ms, loads))


def cap(scenario: Scenario) -> int:
    """Sessions that a centralised server holds at once, if fewer than there are devices, else 0."""
    most = round(bound(scenario, central=True).devices)
    return most if 1 <= most < scenario.devices_n else 0
