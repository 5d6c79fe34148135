"""`make bench-depth`: what a second step in flight is worth, on an emulated H200 with an 8B model.

Simulated, with the host's time as it was measured (docs/simulator.md): sessions that the server decodes, and sessions
whose devices draft, each with one step in flight and with two.

Live, in turn: `wisp serve` with the emulated engine and the same fleet, on a device that is SLOWER times as slow as an
H200, host included, since this machine runs the clients as well. The simulator runs the same beside it.

The pace is the median time per output token; a gain is that of depth 1 over that of depth 2. Beside it: the tokens per
second that the verifier committed (simulated ones include the few that are dropped behind the end of a text).
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.children import ChildError
from wisp.outputs import toml_lines, writable
from wisp.sim.fleet import run_once
from wisp.sim.report import Report, report
from wisp.sim.scenario import Scenario, load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

SCENARIO = "h200-qwen3-8b"
SYSTEMS = {"served": "central", "drafting": "wisp"}
SESSIONS = (64, 512)
BRIEF = (3.0, 5.0, 30.0)  # seconds of a simulated run: warm-up, window, drain
LIVE_SESSIONS, SLOWER, PAIRS = 64, 40.0, 5
LIVE_PROMPT, LIVE_TOKENS = (8, 16), (20, 40)  # short ones, since each takes so long
LIVE = (8.0, 15.0, 40.0)


class Gain(msgspec.Struct, frozen=True):
    """At each depth: TPOT in milliseconds, and tokens per second."""

    system: str
    sessions: int
    tpot_ms: tuple[float, float]
    tokens_per_s: tuple[float, float]

    @property
    def gain(self) -> float:
        return self.tpot_ms[0] / self.tpot_ms[1]


class Result(msgspec.Struct):
    """pairs: live, in their order. beside: the simulator's, of the same. problems: of the machine, in live runs."""

    command: str
    date: str
    simulated: list[Gain]
    pairs: list[Gain]
    beside: Gain | None
    problems: list[str]


def slower(scenario: Scenario, factor: float, folder: Path) -> Scenario:
    """On a device that takes `factor` times as long for everything, and whose host does."""
    p = scenario.profile
    changed = msgspec.structs.replace(
        p,
        bandwidth=p.bandwidth / factor,
        tflops=p.tflops / factor,
        launch_ms=p.launch_ms * factor,
        sequence_ms=p.sequence_ms * factor,
        host_ms=p.host_ms * factor,
        host_sequence_ms=p.host_sequence_ms * factor,
    )
    path = folder / "slower.toml"
    path.write_text("\n".join(toml_lines(msgspec.to_builtins(changed))), "utf-8")
    return msgspec.structs.replace(scenario, hardware=str(path))


def simulated(scenario: Scenario, name: str) -> Report:
    """A simulated run."""
    simulation = Simulation(scenario, system(name), 1)
    simulation.run()
    return report(simulation)


def both(name: str, sessions: int, measure: Callable[[str], Report]) -> Gain:
    """`measure` at depth 1, then at depth 2."""
    one, two = (measure(f"{SYSTEMS[name]},depth={depth}") for depth in (1, 2))
    tpot = [round(found.benchmark()["median_tpot_ms"], 3) for found in (one, two)]
    rates = [round(found.engine.tokens_per_s) if found.engine else 0 for found in (one, two)]
    return Gain(name, sessions, (tpot[0], tpot[1]), (rates[0], rates[1]))


def run_bench_depth(*, live: bool, out: Path | None, as_json: bool) -> None:
    """Measure, print, and write the figures. Raises ConfigError."""
    if out is not None:
        writable(out)
    scenario = load_scenario(SCENARIO)
    today = datetime.date.today().isoformat()
    result = Result("python -m benchmarks depth", today, [], [], None, [])
    with Console(stderr=True).status("simulating") as status, tempfile.TemporaryDirectory() as folder:
        for name in SYSTEMS:
            for n in SESSIONS:
                brief = scenario.with_devices(n).brief(*BRIEF)
                result.simulated.append(both(name, n, lambda of, s=brief: simulated(s, of)))  # type: ignore[misc]
        if live:
            slow = slower(scenario, SLOWER, Path(folder)).with_devices(LIVE_SESSIONS).brief(*LIVE)
            slow = msgspec.structs.replace(slow, prompt_tokens=LIVE_PROMPT, output_tokens=LIVE_TOKENS)
            result.beside = both("served", LIVE_SESSIONS, lambda of: simulated(slow, of))
            for pair in range(PAIRS):
                status.update(f"live, pair {pair + 1} of {PAIRS}")
                result.pairs.append(
                    both("served", LIVE_SESSIONS, lambda of: _live(slow, of, result.problems))
                )
    data = msgspec.json.format(msgspec.json.encode(result), indent=1)
    if out is not None:
        out.write_bytes(data + b"\n")
    if as_json:
        print(data.decode())
    else:
        _show(result)


def _live(scenario: Scenario, name: str, problems: list[str]) -> Report:
    found = run_once(scenario, system(name), 1)
    if found.mismatches:
        raise ChildError(f"{found.mismatches} tokens of a live run were wrong: a bug of wisp")
    problems += found.machine.problems if found.machine else ()
    return found


def _show(result: Result) -> None:
    table = Table(title=f"a second step in flight, {SCENARIO}")
    for title in ("", "sessions", "TPOT ms at 1", "at 2", "gain", "tokens/s at 1", "at 2"):
        table.add_column(title, justify="left" if not title else "right")
    rows = [(f"{g.system}, simulated", g) for g in result.simulated] + [
        ("served, live", g) for g in result.pairs
    ]
    if result.beside is not None:
        rows.append(("served, simulated like live", result.beside))
    for what, g in rows:
        figures = [
            *(f"{ms:.2f}" for ms in g.tpot_ms),
            f"{g.gain:.3f}",
            *(f"{rate:,.0f}" for rate in g.tokens_per_s),
        ]
        table.add_row(what, str(g.sessions), *figures)
    console = Console()
    console.print(table)
    if result.pairs and result.beside is not None:
        middle = statistics.median(g.gain for g in result.pairs)
        console.print(f"live: median gain {middle:.3f}; the simulator says {result.beside.gain:.3f}")
    for problem in result.problems:
        console.print(f"NOT VALID: {problem}", style="bold red")
