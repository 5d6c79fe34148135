"""The simulator: the same run under the same seed, and never a token that the script does not say."""

from __future__ import annotations

import itertools
import json
import weakref
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from wisp.cli import app
from wisp.core.errors import ConfigError, ProtocolError
from wisp.sim.report import Report, WholeRun, report
from wisp.sim.run_trace import chrome_trace
from wisp.sim.scenario import SHIPPED, Kit, Scenario, SloClass, load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import SYSTEMS, system

SMALL = load_scenario("a100-qwen3-32b").at_rate(12.0).with_devices(8).brief(3.0, 8.0, 30.0)
TINY = """
title = "tiny"
hardware = "a100-qwen3-32b"
devices_n = 3
warmup_s = 2.0
window_s = 8.0
drain_s = 40.0
[[slo]]
rate = 12.0
"""
BAD_LINE = msgspec.structs.replace(SMALL, devices=(Kit("40", 60.0, 20.0, 0.02), Kit("pi5", 10.0, share=0.5)))


def ran(scenario: Scenario, spec: str = "wisp", seed: int = 1, *, trace: bool = False) -> Simulation:
    simulation = Simulation(scenario, system(spec), seed, trace=trace)
    simulation.run()
    return simulation


def reported(scenario: Scenario, spec: str = "wisp", seed: int = 1) -> Report:
    return report(ran(scenario, spec, seed))


def whole_run(found: Report) -> WholeRun:
    assert found.verifier is not None
    return found.verifier


@pytest.mark.parametrize("spec", SYSTEMS)
def test_every_token_committed_is_the_scripts(spec: str) -> None:
    simulation = ran(BAD_LINE, spec)
    found = report(simulation)
    ended = [r for r in simulation.requests if r.ended is not None]
    assert all(r.tokens == len(simulation.shared.scripts.script(r.seed)) for r in ended if r.ok)
    assert found.mismatches == 0
    assert found.tokens_checked >= sum(r.tokens for r in ended) > 0
    assert simulation.verifier.counts.tokens >= sum(r.tokens for r in simulation.requests)


def test_a_token_that_is_not_the_scripts_fails_the_run() -> None:
    simulation = Simulation(SMALL, system("wisp"), 1)

    def spoil() -> None:
        generation = simulation.devices[3].generation
        assert generation is not None
        generation.drafter.committed[0] = -1

    simulation.env.after(5.0, spoil)
    with pytest.raises(ProtocolError, match="simulated tokens are not the target's"):
        simulation.run()
    assert report(simulation).mismatches > 0


@pytest.mark.parametrize("spec", ["wisp", "paper", "central"])
def test_a_seed_decides_everything(spec: str) -> None:
    assert reported(BAD_LINE, spec) == reported(BAD_LINE, spec)
    assert reported(BAD_LINE, spec).e2el_ms != reported(BAD_LINE, spec, seed=2).e2el_ms


def test_tokens_are_the_same_whatever_kv_is_taken_away() -> None:
    tight = msgspec.structs.replace(SMALL.with_devices(12), kv_tokens=1500)
    found = reported(tight)
    assert whole_run(found).kv_evictions > 0
    assert found.mismatches == 0


def test_devices_that_vanish_are_missed_and_the_others_go_on() -> None:
    simulation = ran(msgspec.structs.replace(SMALL, vanish=0.5))
    gone = [h for h in simulation.devices if h.gone]
    assert 0 < len(gone) < 8
    assert sum(not r.ok for r in simulation.requests) == len(gone)
    late = [r for r in simulation.requests if 5.0 < r.arrived < 11.0]
    assert all(r.ended is not None for r in late)


def test_a_population_comes_and_goes() -> None:
    changing = msgspec.structs.replace(
        SMALL, population=((0.0, 2), (4.0, 6), (8.0, 1)), warmup_s=0.0, window_s=40.0
    )
    simulation = ran(changing)
    assert {r.device for r in simulation.requests if r.arrived < 4.0} <= {0, 1}
    assert len({r.device for r in simulation.requests}) == 6
    assert len({r.device for r in simulation.requests if r.arrived > 35.0}) == 1


def test_no_more_sessions_run_at_once_than_there_are_slots() -> None:
    simulation = ran(SMALL, "central,slots=3", trace=True)
    assert simulation.shared.trace is not None
    steps = [e for e in simulation.shared.trace if e.what == "step"]
    assert max(e.sessions for e in steps) == 3


def test_users_of_each_class_are_counted_apart() -> None:
    two = msgspec.structs.replace(SMALL, slo=(SloClass(1.0, name="calm"), SloClass(1000.0, name="hopeless")))
    found = {c.name: c for c in reported(two).classes}
    assert found["calm"].attainment == 1.0
    assert found["hopeless"].attainment == 0.0
    assert found["hopeless"].goodput == 0.0


def test_alone_on_a_server_there_is_no_interference_beyond_noise() -> None:
    alone, crowd = (
        whole_run(reported(SMALL.with_devices(n), "central")).interference_ms.mean for n in (1, 30)
    )
    assert alone is not None
    assert abs(alone) < 2.0
    assert crowd is not None
    assert crowd > alone + 5.0


def test_a_chrome_trace_shows_one_step_at_a_time_and_one_draft_step_per_device() -> None:
    simulation = ran(SMALL, trace=True)
    events = json.loads(chrome_trace(simulation))["traceEvents"]
    steps = [e for e in events if e["name"] == "step"]
    assert len(steps) == simulation.verifier.counts.steps
    drafts = [e for e in events if e["name"] == "draft" and e["tid"] == 3]
    for track in (steps, drafts):
        assert len(track) > 20
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(track))


def test_untraced_runs_keep_no_events() -> None:
    assert ran(SMALL).shared.trace is None


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_scenario_runs_and_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ")
    scenario = load_scenario(path.stem)
    few = scenario.with_devices(3).brief(1.0, 25.0, 10.0)
    assert reported(few).arrived > 0


def test_a_system_with_changes_or_refused_with_what_can_be_changed() -> None:
    changed = system("wisp,ahead=no,drafting=fixed:4,slots=7")
    assert (changed.ahead, changed.drafting, changed.slots, changed.batching) == (
        False,
        "fixed:4",
        7,
        "wisp",
    )
    with pytest.raises(ConfigError, match="drafting, batching"):
        system("wisp,colour=red")
    with pytest.raises(ConfigError, match="number of sessions"):
        system("central,slots=many")
    with pytest.raises(ConfigError, match="central"):
        system("theirs")


def test_the_command_reports_under_the_names_of_benchmarks(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    trace, plot = tmp_path / "trace.json", tmp_path / "plot.png"
    options = ["--json", "--chrome-trace", str(trace), "--plot", str(plot), "--rate", "5"]
    found = CliRunner().invoke(app, ["simulate", str(path), *options])
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert data["classes"][0]["name"] == "5 tok/s"
    assert data["completed"] == data["arrived"] > 0
    for name in ("mean_ttft_ms", "median_tpot_ms", "p99_itl_ms", "p99_e2el_ms", "request_goodput"):
        assert data[name] > 0
    assert json.loads(trace.read_text())["traceEvents"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_over_are_let_go() -> None:
    alive = []
    for seed in range(4):
        simulation = Simulation(
            load_scenario("a100-qwen3-32b").with_devices(4).brief(2.0, 2.0, 0.0), system("wisp"), seed
        )
        simulation.run()
        alive.append(weakref.ref(simulation))
        del simulation
    assert sum(of() is not None for of in alive) <= 1


def test_devices_begin_over_the_time_of_an_answer() -> None:
    scenario = load_scenario("a100-qwen3-32b").at_rate(10.0)
    assert scenario.brief(100.0, 10.0, 0.0).joining_s == 20.0  # answers of 200 tokens
    assert scenario.brief(10.0, 10.0, 0.0).joining_s == 8.0
    pausing = msgspec.structs.replace(scenario.brief(100.0, 10.0, 0.0), think_s=5.0)
    assert pausing.joining_s == 25.0
