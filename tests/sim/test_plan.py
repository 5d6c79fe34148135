"""Plans: what they advise, and that simulations bear it out, also where the advice is not to use WISP."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from wisp.calibrate.traces.written import read_range
from wisp.cli import app
from wisp.core.errors import ConfigError
from wisp.sim.fluid import bound
from wisp.sim.plan import Plan, plan, scenario_for
from wisp.sim.plan.advice import Verdict
from wisp.sim.plan.estimate import expected, reached
from wisp.sim.report import Report
from wisp.sim.runs import Job, Runs
from wisp.sim.scenario import Scenario

A100, H200 = "a100-qwen3-32b@1.3", "h200-qwen3-32b@1.3"  # whose figures the estimates come from


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))


class Fake(Runs):
    """Runs in which each system carries so many devices and no more."""

    def __init__(self, wisp: int, central: int) -> None:
        super().__init__()
        self.most = {"wisp": wisp, "central": central}
        self.asked: list[tuple[str, int]] = []

    def map(self, do: Any, items: Sequence[Any]) -> Iterable[Any]:
        return map(self._report, items)

    def _report(self, job: Job) -> Report:
        name, n = job.system.name.partition(",")[0], job.scenario.devices_n
        self.asked.append((name, n))
        missed = 0.02 if n <= self.most[name] else 0.3
        nothing: dict[str, Any] = dict.fromkeys(Report.__struct_fields__, 0)
        return Report(**nothing | {"violation_rate": missed, "arrived": 100})


def both(devices: int, device: str, rtt_ms: float, rate: float) -> tuple[Plan, Plan]:
    """By the fluid estimate alone, and with simulations: brief ones, by which the verdict is clear all the same."""
    scenario = scenario_for(A100, devices, device, rtt_ms, rate).brief(10.0, 10.0, 20.0)
    return plan(scenario), plan(scenario, simulate=True)


def told(found: Plan) -> str:
    return "\n".join(found.reasons)


# --- what to do


def test_fast_users_on_good_devices_use_wisp() -> None:
    assert plan(scenario_for(A100, 30, "100", 20.0, 20.0)).verdict is Verdict.WISP


@pytest.mark.extended
def test_simulations_confirm_that_fast_users_on_good_devices_use_wisp() -> None:
    quick, confirmed = both(30, "100", 20.0, 20.0)
    assert quick.verdict is confirmed.verdict is Verdict.WISP
    assert confirmed.wisp.simulated is not None
    assert confirmed.wisp.simulated < 0.1
    assert confirmed.central.simulated is not None
    assert confirmed.central.simulated > 0.5
    assert 0 < confirmed.central.devices < 30
    assert confirmed.central.tried


def test_a_plan_tells_the_overlap_and_what_measurements_allow() -> None:
    before, likeliest = (plan(scenario_for(of, 30, "100", 20.0, 20.0)) for of in (A100, "a100-qwen3-32b"))
    assert "p = 2.2, the likeliest; measurements allow 1.6 to 4" in likeliest.assumed[-1]
    assert "p = 1.3, where 2.2 is likeliest; measurements allow 1.6 to 4" in before.assumed[-1]
    assert likeliest.central.devices > before.central.devices


def test_a_few_calm_users_are_served_centrally() -> None:
    found = plan(scenario_for(A100, 4, "100", 20.0, 8.0))
    assert found.verdict is Verdict.ENOUGH
    assert "nothing to gain" in told(found)


@pytest.mark.extended
def test_simulations_confirm_that_a_few_calm_users_are_served_centrally() -> None:
    quick, confirmed = both(4, "100", 20.0, 8.0)
    assert quick.verdict is confirmed.verdict is Verdict.ENOUGH
    assert "serve centrally" in confirmed.verdict.value
    assert confirmed.central.simulated == 0.0
    assert "nothing to gain" in told(confirmed)


def test_devices_too_slow_to_help_are_served_centrally_by_more_servers() -> None:
    found = plan(scenario_for(A100, 60, "8", 60.0, 20.0))
    assert found.verdict is Verdict.NO_GAIN
    assert "serve centrally" in found.verdict.value
    assert f"on {found.central.servers(60)} servers" in told(found)


def test_more_than_one_server_is_asked_for_where_one_is_not_enough() -> None:
    found = plan(scenario_for(A100, 150, "100", 20.0, 20.0))
    assert found.verdict is Verdict.MORE
    assert "servers with WISP" in found.reasons[-1]
    assert found.wisp.servers(150) < found.central.servers(150)


def test_a_pace_that_no_step_can_keep() -> None:
    found = plan(scenario_for(A100, 10, "8", 20.0, 60.0))
    assert found.verdict is Verdict.NEITHER
    assert (found.wisp.devices, found.central.devices) == (0, 0)
    assert "no number of such servers" in told(found)
    assert found.commands == ()


def test_wisp_is_not_said_to_serve_as_many_where_it_does_not() -> None:
    runs = Fake(wisp=20, central=30)
    found = plan(scenario_for(A100, 30, "100", 20.0, 8.0), simulate=True, runs=runs)
    assert found.verdict is Verdict.ENOUGH
    assert "as well" not in told(found)
    assert "WISP would not serve as many" in told(found)


# --- where simulations overrule the estimate


@pytest.mark.parametrize(
    ("wisp", "central", "verdict", "last"),
    [
        (39, 20, Verdict.WISP, ""),
        (60, 39, Verdict.ENOUGH, "as well"),
        (33, 11, Verdict.MORE, "2 servers with WISP, 4 servers without"),
        (33, 0, Verdict.MORE, "2 servers with WISP, no number of them would do without"),
        (33, 25, Verdict.NO_GAIN, "on 2 servers, as many as with WISP"),
        (9, 33, Verdict.NO_GAIN, "on 2 servers"),
        (0, 0, Verdict.NEITHER, "no number of such servers"),
    ],
)
def test_all_that_is_said_follows_from_what_was_simulated(
    wisp: int, central: int, verdict: Verdict, last: str
) -> None:
    runs = Fake(wisp, central)
    found = plan(scenario_for(A100, 39, "25", 100.0, 18.0), simulate=True, runs=runs)
    assert found.verdict is verdict
    assert last in found.reasons[-1]
    assert "1 server " not in told(found)
    for name, e, most in (("wisp", found.wisp, wisp), ("central", found.central, central)):
        assert e.carries(39) == (most >= 39)
        assert e.simulated == pytest.approx(0.02 if most >= 39 else 0.3)
        if most < 39:
            assert 0.89 * most - 1 <= e.devices <= most
            assert not e.devices or (name, e.devices) in runs.asked
    assert len(runs.asked) < 40


def test_more_than_was_estimated_may_be_found() -> None:
    estimated = plan(scenario_for(A100, 80, "100", 20.0, 16.0))
    assert estimated.wisp.devices < 80
    found = plan(scenario_for(A100, 80, "100", 20.0, 16.0), simulate=True, runs=Fake(90, 20))
    assert found.verdict is Verdict.WISP
    assert "at least 80 devices (simulated) with WISP" in told(found)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("devices", "device", "rtt_ms", "rate", "prompt"),
    [(39, "25", 100.0, 18.0, (60, 200)), (24, "60", 20.0, 14.0, (500, 1100))],
)
def test_a_simulation_carries_the_estimated_devices(
    devices: int, device: str, rtt_ms: float, rate: float, prompt: tuple[int, int]
) -> None:
    n = int(0.95 * plan(scenario_for(A100, devices, device, rtt_ms, rate, prompt)).wisp.devices)
    found = plan(scenario_for(A100, n, device, rtt_ms, rate, prompt), simulate=True)
    assert 0 < n < devices
    assert found.wisp.simulated is not None
    assert found.wisp.simulated <= 0.1


def test_progress_of_simulations_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    runs = Fake(20, 10)
    plan(
        scenario_for(A100, 30, "100", 20.0, 20.0), simulate=True, runs=runs,
        watch=lambda what, done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen[0] == (0, 4)
    assert seen[-1] == (len(runs.asked), len(runs.asked))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- the estimate


def _share(scenario: Scenario, name: str = "wisp", tolerance: float = 0.1) -> float:
    """Of its bound."""
    return expected(name, scenario, tolerance) / bound(scenario, central=name == "central").devices


def test_expectations_are_what_capacity_searches_reached() -> None:
    results = json.loads((Path(__file__).parents[2] / "docs/results/table.json").read_text())
    searched = {(c["system"], c["rate"]): c for c in results["main"] if c["system"] in ("wisp", "central")}
    assert len(searched) == 8
    for (name, rate), c in searched.items():
        usual = scenario_for(A100, 10, "100", 20.0, rate)
        for tolerance, devices in ((0.1, c["capacity"]), (0.01, c["capacity_at_1_percent"])):
            assert expected(name, usual, tolerance) == pytest.approx(devices, rel=0.05, abs=1.0), (
                "put the new figures into plan.estimate.REACHED"
            )
    assert reached("central", 16.0) < reached("central", 14.0) < reached("central", 12.0)
    assert reached("wisp", 8.0, 0.01) < reached("wisp", 8.0, 0.03) < reached("wisp", 8.0)
    assert reached("wisp", 8.0, 0.3) == reached("wisp", 8.0)


def test_expectations_with_the_likeliest_overlap_are_what_searches_reached() -> None:
    results = json.loads((Path(__file__).parents[2] / "docs/results/overlap.json").read_text())
    searched = {(c["system"], c["rate"]): c for c in results["capacities"] if c["overlap"] == 2.2}
    assert len(searched) == 8
    for (name, rate), c in searched.items():
        usual = scenario_for("a100-qwen3-32b", 10, "100", 20.0, rate)
        assert expected(name, usual) == pytest.approx(c["capacity"], rel=0.05, abs=1.0), (name, rate)


def test_less_of_the_bound_is_expected_where_it_is_harder_to_reach() -> None:
    def share(device: str = "100", rtt_ms: float = 20.0, **more: Any) -> float:
        return _share(scenario_for(A100, 10, device, rtt_ms, 16.0, **more))

    assert share(device="25", rtt_ms=100.0) < share(device="50", rtt_ms=100.0) < share()
    assert share(rtt_ms=150.0) < share()
    assert share(prompt=(500, 1100)) < share()
    assert share(ttft_s=0.5) < share() == share(ttft_s=10.0)
    assert share(output=(1000, 2000)) < share()


def test_acceptance_is_the_readers_to_state() -> None:
    def devices(acceptance: float | None) -> int:
        return plan(scenario_for(A100, 50, "100", 20.0, 16.0, acceptance=acceptance)).wisp.devices

    assert devices(0.5) < devices(0.75) < devices(0.95)


def test_a_device_that_throttles_is_planned_at_the_speed_that_it_keeps_up() -> None:
    hot, slow = (plan(scenario_for(A100, 50, d, 20.0, 16.0)) for d in ("60+throttle", "30"))
    assert hot.wisp == slow.wisp


# --- what limits it


def test_the_limit_is_called_by_its_name() -> None:
    many = plan(scenario_for(H200, 500, "100", 20.0, 8.0))
    assert many.wisp.limit == "slots"
    assert "512 by the hardware profile" in told(many)
    assert "KV" not in told(many)
    long = plan(scenario_for(A100, 100, "100", 20.0, 4.0, (1000, 3000)))
    assert long.wisp.limit == "kv"
    assert "room for KV" in told(long)


def test_sessions_longer_than_a_slot() -> None:
    found = plan(scenario_for(A100, 10, "100", 20.0, 8.0, (9000, 90_000)), simulate=True)
    assert found.verdict is Verdict.NEITHER
    assert found.wisp.limit == found.central.limit == "context"
    assert "the context is the limit" in told(found)
    assert "8,192" in told(found)


def test_a_first_token_that_cannot_be_there_in_time() -> None:
    found = plan(scenario_for(A100, 10, "100", 20.0, 8.0, ttft_s=0.05), simulate=True)
    assert found.verdict is Verdict.NEITHER
    assert found.wisp.limit == "ttft"
    assert "users wait 0.05 s" in told(found)


@pytest.mark.parametrize(
    ("device", "rtt_ms", "why"),
    [("8", 60.0, "too slowly for drafts"), ("100", 2000.0, "too long for drafts"), ("8", 2000.0, "too late")],
)
def test_why_drafts_are_left_out_is_said_once(device: str, rtt_ms: float, why: str) -> None:
    words = told(plan(scenario_for(A100, 60, device, rtt_ms, 20.0)))
    assert why in words
    assert words.count("best left out") == 1
    assert "a round has to bring several" not in words
    assert "help with some" not in words


def test_where_drafts_are_left_out_wisp_is_not_expected_to_carry_more() -> None:
    found = plan(scenario_for(A100, 60, "8", 60.0, 20.0))
    assert found.wisp.devices <= found.central.devices


def test_if_wisp_carries_more_all_the_same_it_is_not_for_its_drafts() -> None:
    found = plan(scenario_for(A100, 30, "8", 60.0, 20.0), simulate=True, runs=Fake(40, 20))
    assert found.verdict is Verdict.WISP
    assert "scheduling" in told(found)
    assert "left out" not in told(found)


def test_devices_slower_than_users_read_are_left_out() -> None:
    found = plan(scenario_for(A100, 60, "18", 20.0, 20.0))
    assert found.wisp.bound == found.central.bound
    assert "left out" in told(found)


def test_long_round_trips_need_long_drafts() -> None:
    words = told(plan(scenario_for(A100, 30, "100", 100.0, 12.0)))
    assert "a round has to bring several" in words


# --- the command


def test_ranges_name_their_option() -> None:
    assert read_range("60-200") == (60, 200)
    assert read_range("80") == (80, 80)
    for wrong in ("", "a-b", "5-2", "0-4", "-3"):
        with pytest.raises(ConfigError, match=r"--prompt .*fewest and the most"):
            read_range(wrong, "--prompt")
    with pytest.raises(ConfigError, match="--output-tokens"):
        read_range("x")


OPTIONS = {"--hardware": A100, "--devices": "30", "--device": "100", "--rate": "20"}


def command(**changed: str) -> Any:
    given = OPTIONS | {f"--{name}": value for name, value in changed.items()}
    return CliRunner().invoke(app, ["plan", *(f"{name}={value}" for name, value in given.items())])


def test_the_command() -> None:
    options = [part for pair in OPTIONS.items() for part in pair]
    found = CliRunner().invoke(app, ["plan", *options, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["verdict"] == "use WISP"
    said = command(rate="8")
    assert "serve centrally" in said.stdout
    assert "--batching continuous" in said.stdout
    assert "--draft none" in said.stdout


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rate", "inf"), ("rate", "nan"), ("rate", "0"), ("devices", "0"), ("device", "-5"), ("device", "0"),
        ("device", "inf"), ("rtt", "-1"), ("rtt", "inf"), ("ttft", "0"), ("tolerance", "0"), ("tolerance", "1"),
        ("acceptance", "0"), ("acceptance", "1.5"), ("prompt", "9-1"), ("output", "x"),
    ],
)  # fmt: skip
def test_impossible_plans_are_refused(option: str, value: str) -> None:
    found = command(**{option: value})
    assert isinstance(found.exception, ConfigError), found.output
    assert option in str(found.exception)


@pytest.mark.parametrize(("n", "policy"), [(30, "wisp"), (150, "wisp"), (10, "continuous")])
def test_the_commands_of_the_advice_exist(n: int, policy: str) -> None:
    found = plan(scenario_for(A100, n, "100", 20.0, 20.0))
    assert f"batching {policy}" in " ".join(found.assumed) or policy == "continuous"
    known = typer.main.get_command(app)
    serve, edge = (shlex.split(line, comments=True) for line in found.commands)
    assert ["--batching", policy] == serve[serve.index("--batching") :][:2]
    for line in (serve, edge):
        assert line[0] == "wisp"
        of = known.commands[line[1]]  # type: ignore[attr-defined]
        of.make_context(line[1], line[2:], resilient_parsing=False)
    assert ("# on each of" in found.commands[0]) == (n == 150)
