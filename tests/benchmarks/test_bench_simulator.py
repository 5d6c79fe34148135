"""`make bench-simulator`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.simulator import enlarged, measure
from wisp.sim.scenario import load_scenario


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = ["simulator", "--minutes", "0.1", "--most", "10", "--json", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(out.read_text())
    assert [s["system"] for s in found["long"]] == ["wisp", "paper", "central"]
    assert [s["devices"] for s in found["carried"]] == [10]
    for s in (*found["long"], *found["carried"]):
        assert s["tokens"] > 100
        assert s["us_a_token"] == pytest.approx(1e6 * s["cpu_s"] / s["tokens"], rel=0.2)


def test_an_enlarged_verifier_carries_what_is_too_much_for_the_usual_one(tmp_path: Path) -> None:
    scenario = load_scenario("a100-qwen3-32b").at_rate(8.0)
    profile, larger = scenario.profile, enlarged(scenario, 3, tmp_path).profile
    assert larger.kv_tokens == 3 * profile.kv_tokens
    assert larger.slots == 3 * profile.slots
    assert larger.tflops == pytest.approx(3 * profile.tflops)
    assert (larger.about, larger.graphs, larger.noise) == (profile.about, profile.graphs, profile.noise)
    usual, enough = (measure(scenario, "wisp", 300, 12.0, size) for size in (1, 3))
    assert usual.refusals > 20
    assert enough.refusals == 0
    assert enough.tokens > 1.3 * usual.tokens
