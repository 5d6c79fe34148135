"""`wisp plan`: how many devices a verifier can carry, whether WISP is worth it there, and when it is not.

The fluid bounds of drafting and of serving centrally, times what share of them capacity searches reached (`REACHED`:
by the pace that users expect, since many short steps a second waste more of it than few long ones); with `--simulate`,
short simulations at the number of devices asked for, which overrule the estimate. The advice is one of four, and two of
them say to serve centrally.
"""

from __future__ import annotations

import json
import math
from enum import StrEnum

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from wisp.core.errors import ConfigError
from wisp.lab.sim.fluid import bound
from wisp.lab.sim.runs import Job, Runs
from wisp.lab.sim.scenario import Kit, Scenario, SloClass
from wisp.lab.sim.systems import System, system

# Share of its bound that each reached, by tokens per second: `fraction` in docs/results/capacity.json, which is
# `wisp capacity a100-qwen3-32b --policy ours|central --rate 8|16`. A test holds them against that file.
REACHED = {"ours": {8.0: 0.857, 16.0: 0.872}, "central": {8.0: 0.929, 16.0: 0.797}}
WORTH_IT = 1.1  # so many times the devices, by the bounds as well, or it is not worth a drafter on each
CONFIRM_SEEDS = (1, 2)
TOLERANCE = 0.1


class Verdict(StrEnum):
    """What to do."""

    WISP = "use WISP"
    MORE = "use WISP, on more than one verifier"
    ENOUGH = "serve centrally: one server carries all of them without drafts"
    NO_GAIN = "serve centrally: drafts gain nothing here"


class Estimate(msgspec.Struct, frozen=True):
    """Of one way of serving. simulated: violation rate at the devices asked for (None: not simulated)."""

    bound: float
    devices: int
    limit: str
    simulated: float | None = None

    def carries(self, n: int) -> bool:
        """Does it serve `n` devices?"""
        return self.devices >= n if self.simulated is None else self.simulated <= TOLERANCE


class Plan(msgspec.Struct, frozen=True):
    """Advice. `reasons`: in plain words."""

    verdict: Verdict
    devices: int
    ours: Estimate
    central: Estimate
    reasons: tuple[str, ...]


def scenario_for(
    hardware: str,
    devices: int,
    device: str,
    rtt_ms: float,
    rate: float,
    prompt: tuple[int, int] = (60, 200),
    output: tuple[int, int] = (100, 300),
    ttft_s: float = 3.0,
) -> Scenario:
    """What is planned, as a scenario of short runs."""
    return Scenario(
        title=f"{devices} devices on {hardware}",
        hardware=hardware,
        slo=(SloClass(rate, ttft_s),),
        devices=(Kit(device, rtt_ms),),
        prompt_tokens=prompt,
        output_tokens=output,
        devices_n=devices,
        warmup_s=30.0,
        window_s=30.0,
        drain_s=45.0,
    )


def plan(scenario: Scenario, *, simulate: bool = False, runs: Runs | None = None) -> Plan:
    """What to do for a scenario of one class and one kind of device. Raises ConfigError."""
    n = scenario.devices_n
    found = {}
    for name in ("ours", "central"):
        limit = bound(scenario, central=name == "central")
        share = reached(name, scenario.slo[0].rate)
        found[name] = Estimate(round(limit.devices, 1), int(limit.devices * share), limit.limit)
    if simulate:
        runs = runs or Runs()
        for name, estimate in found.items():
            simulated = _violations(scenario, _at_its_best(name, scenario), runs)
            found[name] = msgspec.structs.replace(estimate, simulated=simulated)
    ours, central = found["ours"], found["central"]
    verdict = _verdict(n, ours, central)
    return Plan(verdict, n, ours, central, tuple(_reasons(scenario, verdict, ours, central)))


def reached(name: str, rate: float) -> float:
    """Share of its bound to expect of a system: between the rates that were searched by a line, beyond them as at
    the last."""
    known = REACHED[name]
    return float(np.interp(rate, list(known), list(known.values())))


def _at_its_best(name: str, scenario: Scenario) -> System:
    """The system, the centralised one with a cap on sessions where its steps would grow too long."""
    if name == "ours":
        return system(name)
    most = round(bound(scenario, central=True).devices)
    return system(f"central,slots={most}" if 1 <= most < scenario.devices_n else "central")


def _violations(scenario: Scenario, tried: System, runs: Runs) -> float:
    reports = runs.reports([Job(scenario, tried, seed, TOLERANCE) for seed in CONFIRM_SEEDS])
    arrived = sum(r.arrived for r in reports)
    return sum(r.violation_rate * r.arrived for r in reports) / max(arrived, 1)


def _verdict(n: int, ours: Estimate, central: Estimate) -> Verdict:
    if central.carries(n):
        return Verdict.ENOUGH
    if ours.carries(n):
        return Verdict.WISP
    least = min(ours.devices / max(central.devices, 1), ours.bound / max(central.bound, 1.0))
    if least < WORTH_IT or ours.devices < 1:
        return Verdict.NO_GAIN
    return Verdict.MORE


def _reasons(scenario: Scenario, verdict: Verdict, ours: Estimate, central: Estimate) -> list[str]:
    n, rate, kit = scenario.devices_n, scenario.slo[0].rate, scenario.devices[0]
    device, _ = kit.build()
    words = [
        f"at {rate:g} tokens/s expect one verifier to carry about {ours.devices} devices with WISP and "
        f"{central.devices} without drafts; you ask for {n}"
    ]
    if ours.limit == "kv":
        words.append("room for KV is what limits it, and drafts do not make any: more memory would")
    if device.tokens_per_s < rate:
        words.append(
            f"the devices draft {device.tokens_per_s:g} tokens/s, slower than their users read ({rate:g}): "
            "drafts cannot keep up with the stream"
        )
    if kit.rtt_ms > 1e3 / rate:
        words.append(
            f"a round trip ({kit.rtt_ms:g} ms) takes longer than a token may ({1e3 / rate:.0f} ms): "
            "only long drafts pay"
        )
    if verdict is Verdict.ENOUGH:
        words.append("WISP would serve them as well, but there is nothing to gain: it is simpler without")
    elif verdict is Verdict.NO_GAIN:
        servers = _servers(n, central.devices)
        words.append(
            f"serve them centrally, on {servers}"
            if servers
            else "no number of such servers can keep this pace"
        )
    elif verdict is Verdict.MORE:
        words.append(
            f"{_servers(n, ours.devices)} with WISP, {_servers(n, central.devices) or 'none can'} without"
        )
    return words


def _servers(n: int, each: int) -> str:
    """In words; empty if one cannot carry a single device."""
    if each < 1:
        return ""
    servers = math.ceil(n / each)
    return f"{servers} server{'s' if servers > 1 else ''}"


def span(text: str) -> tuple[int, int]:
    """ "60-200" as two numbers. Raises ConfigError."""
    first, _, last = text.partition("-")
    try:
        found = int(first), int(last or first)
    except ValueError:
        found = (0, 0)
    if not 0 < found[0] <= found[1]:
        raise ConfigError(f"{text!r}: give fewest and most tokens, e.g. 60-200")
    return found


def run_plan(scenario: Scenario, *, simulate: bool, jobs: int, as_json: bool) -> None:
    """Plan and say it."""
    with Runs(jobs if simulate else 1) as runs:
        found = plan(scenario, simulate=simulate, runs=runs)
    if as_json:
        print(json.dumps(msgspec.to_builtins(found)))
        return
    out = Table(title=scenario.title)
    for name in ("", "fluid bound", "expect", "limited by", "violations, simulated"):
        out.add_column(name, justify="right" if name else "left")
    for name, e in (("with WISP", found.ours), ("centrally", found.central)):
        simulated = "-" if e.simulated is None else f"{e.simulated:.1%}"
        out.add_row(name, f"{e.bound:g}", str(e.devices), e.limit, simulated)
    console = Console()
    console.print(out)
    console.print(f"[bold]{found.verdict.value}[/bold]")
    for reason in found.reasons:
        console.print(f"- {reason}", highlight=False)
