"""The simulator compared with reality: the same scenario, system and seed live and simulated.

Against `wisp serve` with an emulated engine, where all but the arithmetic is real (processes, sockets, threads,
time), and against `wisp serve` with the tiny target in llama.cpp, where that is real, too. For the second, the engine
is profiled (`wisp profile`) and the pair recorded (`wisp trace`) first: the simulator then knows how long steps take
and what is said, and nothing else. Devices are emulated in both, and say what was recorded.

Runs in real time, and only means something on a machine that does nothing else.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.pages import Data, table
from tools.tiny.text import story
from wisp.api.process import event_loop_factory
from wisp.children import run_beside
from wisp.core.errors import UnavailableError
from wisp.sim.compare.suite import load_suite
from wisp.sim.differences import SHOWN, Difference, differences
from wisp.sim.fleet import run_live
from wisp.sim.plots import OWN, picture
from wisp.sim.report import Report, report
from wisp.sim.runs import Runs
from wisp.sim.scenario import Kit, Scenario, SloClass
from wisp.sim.serving import verifier
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

# Of the suite, each with seconds in which some 300 requests come: good devices near by, bursts, slow devices far away.
CELLS = {"a100-16-0.8": 130.0, "bursts-cv3-0.8": 300.0, "slow-far-0.85": 120.0}
LOAD = 0.75  # of what the tiny target can carry
TINY_RATE, TINY_SLOTS, TINY_CONTEXT, TINY_TOKENS = 20.0, 32, 512, 64
ANSWERS = 48  # recorded of the tiny pair


def run(quick: bool, runs: Runs) -> Data:
    with tempfile.TemporaryDirectory() as folder:
        found = [_emulated(name, quick) for name in list(CELLS)[: 1 if quick else None]]
        found.append(_tiny(quick, Path(folder)))
    return {"load": LOAD, "runs": found}


def _emulated(name: str, quick: bool) -> dict[str, Any]:
    scenario = next(cell.scenario for cell in load_suite() if cell.name == name)
    short = scenario.with_devices(12).brief(2.0, 4.0, 15.0)
    return {"engine": "emulated", "cell": name} | _both(
        short if quick else scenario.brief(20.0, CELLS[name], 30.0)
    )


def _tiny(quick: bool, folder: Path) -> dict[str, Any]:
    cost, traces, prompts = folder / "cost.json", folder / "traces", folder / "prompts.jsonl"
    prompts.write_bytes(b"\n".join(map(msgspec.json.encode, _prompts(12 if quick else ANSWERS))))
    size = ("--slots", str(TINY_SLOTS), "--context", str(TINY_CONTEXT), "--threads", "1")
    least = ("--quick",) if quick else ()
    _wisp("profile", "--target", "tiny-target", "--cpu-time", *size, *least, "--out", str(cost))
    _wisp(
        "trace", "--target", "tiny-target", "--draft", "tiny-draft", "--prompts", str(prompts), "--mode", "exact",
        "--samplings", "greedy", "--max-tokens", str(TINY_TOKENS), "--threads", "1", "--out", str(traces),
    )  # fmt: skip
    scenario = Scenario(
        title="the tiny pair",
        hardware=str(cost),
        slo=(SloClass(TINY_RATE, ttft_s=2.0),),
        devices=(Kit("100", rtt_ms=20.0),),
        output_tokens=(1, TINY_TOKENS),
        kv_tokens=TINY_SLOTS * TINY_CONTEXT,
        slots=TINY_SLOTS,
        traces=str(traces),
        as_recorded=True,
        warmup_s=2.0 if quick else 10.0,
        window_s=4.0 if quick else 30.0,
        drain_s=15.0,
    )
    most = 8 if quick else _most(scenario.brief(5.0, 20.0, 10.0))
    return {"engine": "llama.cpp", "cell": f"the tiny pair, {LOAD:.0%}"} | _both(
        scenario.with_devices(max(1, round(LOAD * most)))
    )


def _both(scenario: Scenario) -> dict[str, Any]:
    of = system("wisp")
    with verifier(scenario, of) as child, asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        live = run_beside(runner, run_live(scenario, of, 1, child.url, child=child))
    simulated = _simulated(scenario)
    return {
        "about": _about(scenario),
        "live": live.benchmark(),
        "simulated": simulated.benchmark(),
        "differences": [msgspec.to_builtins(d) for d in differences(live, simulated)],
    }


def _about(scenario: Scenario) -> str:
    """Who asks, in a few words."""
    rates = " or ".join(f"{c.rate:g}" for c in scenario.slo)
    if scenario.arrivals_per_s:
        came = f"{scenario.arrivals_per_s:g} requests a second, CV {scenario.arrivals_cv:g},"
    else:
        came = f"{scenario.devices_n} devices"
    return f"{came} that expect {rates} tokens/s"


def _most(scenario: Scenario) -> int:
    """Devices that a simulation can carry with at most 10 % violations, to a tenth."""
    low, high = 1, 2
    while _carries(scenario, high) and high < TINY_SLOTS:
        low, high = high, 2 * high
    while high - low > max(1, low // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if _carries(scenario, middle) else (low, middle)
    return low


def _simulated(scenario: Scenario) -> Report:
    simulation = Simulation(scenario, system("wisp"), 1)
    simulation.run()
    return report(simulation)


def _carries(scenario: Scenario, n: int) -> bool:
    return _simulated(scenario.with_devices(n)).missed <= 0.1


def _prompts(n: int) -> list[dict[str, str]]:
    source = random.Random("reality")
    about = {"domain": "tiny", "split": "test_prompts"}
    return [{"id": f"tiny-{i}", "text": story(source)[:160], **about} for i in range(n)]


def _wisp(*arguments: str) -> None:
    """Run `wisp ARGUMENTS`. Raises UnavailableError."""
    done = subprocess.run(
        [sys.executable, "-m", "wisp.cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UnavailableError(f"`wisp {arguments[0]}` failed: {done.stderr.strip()[-300:]}")


# --- the page

_NAMES = {
    "goodput": "goodput, tokens/s",
    "attainment": "SLO attainment",
    "median_tpot_ms": "TPOT p50, ms",
    "p99_tpot_ms": "TPOT p99, ms",
    "median_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms",
}


def figures(data: Data) -> Data:
    """A table for each run."""
    head = ("", "live", "simulated", "difference")
    return {"differences": [table(head, map(_row, found["differences"])) for found in data["runs"]]}


def _row(data: Data) -> tuple[str, ...]:
    d = msgspec.convert(data, Difference)
    shown = [
        f"{v:.1%}" if d.name == "attainment" else f"{v:,.1f}" if v < 1e3 else f"{v:,.0f}"
        for v in (d.live, d.simulated)
    ]
    return (_NAMES[d.name], *shown, str(d))


def draw(data: Data, path: Path) -> None:
    """How far off each figure is, beside its aim."""
    n = len(data["runs"])
    with picture(path, 1, n, figsize=(5.0 * n, 3.2), squeeze=False) as axes:
        for axis, found in zip(axes[0], data["runs"], strict=True):
            shown = [d for d in found["differences"] if d["name"] not in SHOWN][::-1]
            names = [_NAMES[d["name"]].partition(",")[0] for d in shown]
            axis.barh(names, [2 * d["aim"] for d in shown], left=[-d["aim"] for d in shown], color="0.9")
            axis.plot([d["off"] for d in shown], names, "o", color=OWN)
            axis.axvline(0.0, color="black", lw=0.8)
            axis.set_title(f"{found['cell']}: live over simulated", fontsize=9)
