"""Plans: what they advise, and that simulations bear it out, also where the advice is not to use WISP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wisp.cli import app
from wisp.core.errors import ConfigError
from wisp.lab.sim.plan import Plan, Verdict, plan, reached, scenario_for, span

A100 = "a100-qwen3-32b"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))


def both(devices: int, device: str, rtt_ms: float, rate: float) -> tuple[Plan, Plan]:
    """By the fluid estimate alone, and with simulations."""
    scenario = scenario_for(A100, devices, device, rtt_ms, rate)
    return plan(scenario), plan(scenario, simulate=True)


def test_fast_users_on_good_devices_use_wisp() -> None:
    quick, confirmed = both(30, "100", 20.0, 20.0)
    assert quick.verdict is confirmed.verdict is Verdict.WISP
    assert confirmed.ours.simulated is not None
    assert confirmed.ours.simulated < 0.1
    assert confirmed.central.simulated is not None
    assert confirmed.central.simulated > 0.5


def test_a_few_calm_users_are_served_centrally() -> None:
    quick, confirmed = both(12, "100", 20.0, 8.0)
    assert quick.verdict is confirmed.verdict is Verdict.ENOUGH
    assert "serve centrally" in confirmed.verdict.value
    assert confirmed.central.simulated == 0.0
    assert any("nothing to gain" in reason for reason in confirmed.reasons)


def test_devices_too_slow_to_help_are_served_centrally_by_more_servers() -> None:
    quick, confirmed = both(60, "8", 60.0, 20.0)
    assert quick.verdict is confirmed.verdict is Verdict.NO_GAIN
    assert "serve centrally" in confirmed.verdict.value
    assert confirmed.ours.simulated is not None
    assert confirmed.ours.simulated > 0.5
    assert confirmed.central.simulated is not None
    assert confirmed.central.simulated > 0.5
    assert any("slower than their users read" in reason for reason in confirmed.reasons)
    assert any("4 servers" in reason for reason in confirmed.reasons)


def test_more_than_one_server_is_asked_for_where_one_is_not_enough() -> None:
    found = plan(scenario_for(A100, 150, "100", 20.0, 20.0))
    assert found.verdict is Verdict.MORE
    assert "servers with WISP" in found.reasons[-1]


def test_a_pace_that_no_step_can_keep() -> None:
    found = plan(scenario_for(A100, 10, "8", 20.0, 60.0))
    assert found.verdict is Verdict.NO_GAIN
    assert (found.ours.devices, found.central.devices) == (0, 0)
    assert "no number of such servers" in found.reasons[-1]


def test_expectations_are_what_capacity_searches_reached() -> None:
    results = json.loads((Path(__file__).parents[2] / "docs/results/capacity.json").read_text())
    searched = {(c["system"], c["rate"]): c["fraction"] for c in results if c["tolerance"] == 0.1}
    assert searched
    for (name, rate), fraction in searched.items():
        assert reached(name, rate) == pytest.approx(fraction, abs=0.03), (
            "put the new figures into plan.REACHED"
        )
    assert reached("ours", 4.0) == reached("ours", 8.0)
    assert 0.797 < reached("central", 12.0) < 0.929


def test_spans() -> None:
    assert span("60-200") == (60, 200)
    assert span("80") == (80, 80)
    for wrong in ("", "a-b", "5-2", "0-4", "-3"):
        with pytest.raises(ConfigError, match="fewest and most"):
            span(wrong)


def test_the_command() -> None:
    options = ["--hardware", A100, "--devices", "30", "--device", "100", "--rate", "20"]
    found = CliRunner().invoke(app, ["plan", *options, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["verdict"] == "use WISP"
    said = CliRunner().invoke(app, ["plan", *options, "--rate", "8"])
    assert "serve centrally" in said.stdout
