"""A sampler of scenarios: drawn from ranges, the same for the same seed."""

from __future__ import annotations

import random

import msgspec

from wisp.core.verify.cost import Load
from wisp.sim.fluid import bound
from wisp.sim.scenario import Kit, Scenario, SloClass

FEWEST, MOST = 5, 300  # devices
LOADS = (0.5, 0.8, 1.2)  # below, at and above what central serving carries, as shares of `carried`
CHANCE = 0.25  # spare capacity that arrivals by chance need, for each unit of their coefficient of variation
HARDWARE = ("a100-qwen3-32b", "a100-qwen3-32b", "a100-qwen3-14b", "h200-qwen3-32b", "4xa100-llama-70b")
PROMPTS = ((20, 80), (60, 200), (60, 200), (300, 900), (500, 1100), (1500, 2500))
OVERLAPS = (1.0, 1.3, 1.3, 1.3, 2.0, 3.0, 5.0)
TTFT_S = (0.5, 1.0, 2.0, 3.0)
RATES = (2.0, 25.0)  # tokens per second
RTT_MS = (5.0, 150.0)
DRAFTS_PER_S = (8.0, 150.0)
READING = 0.5  # most of the TTFT target that an idle engine may need for the longest prompt


def sample(seed: int, index: int) -> Scenario:
    """Scenario `index` of this seed. Its load is LOADS[index % 3]."""
    source, share = random.Random(f"{seed}/{index}"), LOADS[index % len(LOADS)]
    while True:
        found = at_load(_drawn(source, f"sampled {seed}/{index}"), share)
        if found is not None and FEWEST <= _devices(found) <= MOST and _feasible(found):
            return found


def at_load(scenario: Scenario, share: float) -> Scenario | None:
    """With `share` times the load that central serving carries; None if it carries nobody."""
    devices = carried(scenario) * share
    if devices < 1:
        return None
    if scenario.open:
        return msgspec.structs.replace(scenario, arrivals_per_s=round(devices / scenario.answer_s, 3))
    return scenario.with_devices(round(devices * (1 + scenario.think_s / scenario.answer_s)))


def carried(scenario: Scenario) -> float:
    """Sessions, all answering at once, that central serving carries by the fluid bound.

    It serves all alike, so at the pace of the fastest users; arrivals by chance must find spare capacity.
    """
    fastest = max(scenario.slo, key=lambda c: c.rate)
    devices = bound(msgspec.structs.replace(scenario, slo=(fastest,)), central=True).devices
    return devices / (1 + CHANCE * scenario.arrivals_cv) if scenario.open else devices


def _drawn(source: random.Random, title: str) -> Scenario:
    kind = source.choice(("closed", "closed", "closed", "poisson", "bursts"))
    brief = source.random() < 0.25
    return Scenario(
        title,
        source.choice(HARDWARE),
        _classes(source),
        _kits(source),
        overlap=source.choice(OVERLAPS),
        prompt_tokens=source.choice(PROMPTS),
        output_tokens=(20, 60) if brief else source.choice(((100, 300), (100, 300), (50, 500))),
        think_s=float(source.randint(2, 15)) if brief and kind == "closed" else 0.0,
        arrivals_per_s=0.0 if kind == "closed" else 1.0,
        arrivals_cv=3.0 if kind == "bursts" else 1.0,
        retries=0 if kind == "closed" else 2,
        profile_error=source.choice((1.0, 1.0, 1.0, 0.5, 2.0)),
    )


def _classes(source: random.Random) -> tuple[SloClass, ...]:
    n = source.choice((1, 1, 1, 2, 3))
    rates = sorted({round(_between(source, RATES), 1) for _ in range(n)})
    ttft_s = source.choice(TTFT_S)
    return tuple(SloClass(rate, ttft_s, name=f"{rate:g} tok/s") for rate in rates)


def _kits(source: random.Random) -> tuple[Kit, ...]:
    kits = []
    for _ in range(source.choice((1, 1, 2))):
        speed, rtt_ms = (round(_between(source, of), 1) for of in (DRAFTS_PER_S, RTT_MS))
        kits.append(Kit(f"{speed:g}", rtt_ms, round(rtt_ms * source.choice((0.0, 0.1, 0.4)), 1)))
    return tuple(kits)


def _between(source: random.Random, ends: tuple[float, float]) -> float:
    """Evenly on a logarithmic scale."""
    return float(ends[0] * (ends[1] / ends[0]) ** source.random())


def _devices(scenario: Scenario) -> float:
    return scenario.arrivals_per_s * scenario.answer_s if scenario.open else scenario.devices_n


def _feasible(scenario: Scenario) -> bool:
    """Could an idle engine read the longest prompt in time? Otherwise all systems would miss alike."""
    longest = scenario.prompt_tokens[1]
    ms = scenario.profile.step_ms(Load().plus(longest, 0))
    return ms <= READING * min(c.ttft_s for c in scenario.slo) * 1e3
