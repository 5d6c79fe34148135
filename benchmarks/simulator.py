"""`make bench-simulator`: CPU time of simulated runs, and what a token costs with ten devices and with thousands.

Three questions, all at 8 tokens/s on the main comparison's scenario: how long ten minutes of a hundred devices take;
what a committed token costs from ten devices to two thousand, on a verifier that is enlarged with them so that it
carries them; and what it costs on one that is not, where most of what is simulated is requests that are refused.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.outputs import toml_lines, writable
from wisp.sim.scenario import Scenario, load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

SCENARIO, RATE = "a100-qwen3-32b@1.3", 8.0
SYSTEMS = ("wisp", "paper", "central")
DEVICES = (10, 100, 500, 2000)
CARRIED = 100  # devices that the verifier carries with ease
BRIEF_S = 40.0
QUESTIONS = ("long", "carried", "beyond")
CAPTION = "carried: by a verifier that grows with the devices; beyond: the capacity of one that does not"


class Speed(msgspec.Struct, frozen=True):
    """Of one run. cpu_s: of one core; us_a_token: CPU time per committed token; size: of the verifier, in that of the
    scenario's."""

    system: str
    devices: int
    size: int
    simulated_s: float
    cpu_s: float
    tokens: int
    us_a_token: float
    refusals: int


def enlarged(scenario: Scenario, size: int, folder: Path) -> Scenario:
    """With a verifier that does everything so many times as fast, and holds as many times as much."""
    if size == 1:
        return scenario
    p = scenario.profile
    larger = msgspec.structs.replace(
        p,
        bandwidth=p.bandwidth * size,
        tflops=p.tflops * size,
        sequence_ms=p.sequence_ms / size,
        kv_tokens=p.kv_tokens * size,
        slots=p.slots * size,
        step_tokens=p.step_tokens * size,
    )
    path = folder / f"times-{size}.toml"
    path.write_text("\n".join(toml_lines(msgspec.to_builtins(larger))), "utf-8")
    return msgspec.structs.replace(scenario, hardware=str(path), kv_tokens=0, slots=0)


def measure(scenario: Scenario, name: str, devices: int, seconds: float, size: int = 1) -> Speed:
    """One run of so many simulated seconds."""
    warmup_s = min(20.0, seconds / 2)
    with tempfile.TemporaryDirectory() as folder:
        brief = (
            enlarged(scenario, size, Path(folder))
            .with_devices(devices)
            .brief(warmup_s, seconds - warmup_s, 0.0)
        )
        simulation = Simulation(brief, system(name), 1)
    gc.collect()  # what the run before has left is not this one's
    start = time.process_time()
    simulation.run()
    cpu_s, tokens = time.process_time() - start, simulation.verifier.counts.tokens
    refusals = sum(r.refusals for r in simulation.requests)
    return Speed(
        name,
        devices,
        size,
        seconds,
        round(cpu_s, 2),
        tokens,
        round(cpu_s / max(tokens, 1) * 1e6, 1),
        refusals,
    )


def speeds(minutes: float, most: int) -> Iterator[tuple[str, Speed]]:
    """All, with the question that each answers."""
    scenario = load_scenario(SCENARIO).at_rate(RATE)
    seconds = min(BRIEF_S, 60.0 * minutes)
    for name in SYSTEMS:
        yield "long", measure(scenario, name, min(CARRIED, most), 60.0 * minutes)
    for n in DEVICES:
        if n <= most:
            yield "carried", measure(scenario, "wisp", n, seconds, max(1, n // CARRIED))
    for n in DEVICES:
        if CARRIED < n <= most:
            yield "beyond", measure(scenario, "wisp", n, seconds)


def run_bench_simulator(minutes: float, most: int, out: Path | None, *, as_json: bool) -> None:
    """Measure, print, and write the figures. Raises ConfigError."""
    if out is not None:
        writable(out)
    found: dict[str, list[Speed]] = {name: [] for name in QUESTIONS}
    with Console(stderr=True).status("simulating"):
        for name, speed in speeds(minutes, most):
            found[name].append(speed)
    data = json.dumps(msgspec.to_builtins(found), indent=1)
    if out is not None:
        out.write_text(data + "\n")
    if as_json:
        print(data)
    else:
        Console().print(_shown(found))


def _shown(found: dict[str, list[Speed]]) -> Table:
    table = Table(title=f"CPU time of simulations, {SCENARIO} at {RATE:g} tokens/s", caption=CAPTION)
    columns: tuple[tuple[str, Callable[[Speed], str]], ...] = (
        ("system", lambda s: s.system),
        ("devices", lambda s: f"{s.devices:,}"),
        ("seconds", lambda s: f"{s.simulated_s:g}"),
        ("CPU s", lambda s: f"{s.cpu_s:.1f}"),
        ("tokens", lambda s: f"{s.tokens:,}"),
        ("µs a token", lambda s: f"{s.us_a_token:.1f}"),
        ("refusals", lambda s: f"{s.refusals:,}"),
    )
    table.add_column("")
    for title, _ in columns:
        table.add_column(title, justify="right")
    for name in QUESTIONS:
        for i, speed in enumerate(found[name]):
            table.add_row("" if i else name, *(show(speed) for _, show in columns))
        table.add_section()
    return table
