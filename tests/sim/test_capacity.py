"""Searching for capacity: on made-up curves whose answer is known, and on runs that are stopped or remembered."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest
from typer.testing import CliRunner

import wisp.sim.runs
from waiting import eventually
from wisp.cli import app
from wisp.core.errors import ConfigError
from wisp.sim.capacity import Search, capacity, variants
from wisp.sim.paper import PAPER, RATES, cap, paper_capacity
from wisp.sim.report import Report
from wisp.sim.runs import Job, Runs, key, remembered, run
from wisp.sim.scenario import load_scenario
from wisp.sim.systems import system

SCENARIO = load_scenario("a100-qwen3-32b@1.3").at_rate(16.0)
SMALL = SCENARIO.with_devices(3).brief(2.0, 6.0, 30.0)
TIGHT = """
title = "tiny"
hardware = "a100-qwen3-32b"
kv_tokens = 1000
devices_n = 3
warmup_s = 2.0
window_s = 3.0
drain_s = 20.0
[[slo]]
rate = 12.0
"""
Curve = Callable[[Job], float]


@pytest.fixture(scope="module")
def blank() -> Report:
    return run(Job(SMALL, system("central"), 1))


class Made(Runs):
    """Reports whose violation rate is a given function."""

    def __init__(self, blank: Report, curve: Curve) -> None:
        super().__init__()
        self.blank = blank
        self.curve = curve
        self.done: list[Job] = []

    def reports(self, jobs: Sequence[Job]) -> list[Report]:
        self.done += jobs
        return [
            msgspec.structs.replace(
                self.blank, violation_rate=self.curve(j), system=j.system.name, seed=j.seed
            )
            for j in jobs
        ]


def step(at: int) -> Curve:
    return lambda job: 0.0 if job.scenario.devices_n <= at else 0.5


def line(job: Job) -> float:
    """Crosses 1 % at 40 and 10 % at 58; seeds differ by a percent."""
    return max(0.0, 0.01 + 0.005 * (job.scenario.devices_n - 40) + 0.01 * (job.seed - 2))


@pytest.mark.parametrize("at", [1, 2, 17, 61, 62, 200, 1000])
def test_a_step_is_found_wherever_it_is(blank: Report, at: int) -> None:
    runs = Made(blank, step(at))
    found = capacity(SCENARIO, "wisp", runs=runs, grain=0.0)
    assert (found.capacity, found.capacity_at_1_percent) == (at, at)
    assert found.low < at < found.high
    assert len(runs.done) < 90


def test_nothing_works_at_all(blank: Report) -> None:
    found = capacity(SCENARIO, "wisp", runs=Made(blank, lambda job: 0.9))
    assert (found.capacity, found.capacity_at_1_percent, found.fraction) == (0, 0, 0.0)


def test_a_slope_is_crossed_at_both_tolerances_with_an_interval_by_its_seeds(blank: Report) -> None:
    found = capacity(SCENARIO, "wisp", runs=Made(blank, line), grain=0.0)
    assert found.capacity == 58
    assert found.capacity_at_1_percent == 40
    assert found.violation_rate == pytest.approx(0.1)
    # A percent is two devices: with three seeds, and t for a few degrees of freedom, about as many each way.
    assert 54 <= found.low <= 57
    assert 59 <= found.high <= 62


def test_seeds_that_agree_give_the_least_interval(blank: Report) -> None:
    runs = Made(blank, lambda job: 0.005 * max(0.0, job.scenario.devices_n - 37.5))
    found = capacity(SCENARIO, "wisp", runs=runs, grain=0.0)
    assert (found.low, found.capacity, found.high) == (56, 57, 58)


def test_a_coarse_search_says_so_by_its_interval(blank: Report) -> None:
    found = capacity(SCENARIO, "wisp", runs=Made(blank, step(100)), grain=0.1, strict=False)
    assert found.capacity <= 100 < found.high + 1
    assert found.high - found.capacity >= 0.1 * found.capacity - 1
    assert found.capacity_at_1_percent is None


def test_few_devices_are_watched_for_longer(blank: Report) -> None:
    runs = Made(blank, step(2))
    capacity(SCENARIO, "wisp", runs=runs)
    each_s = 200 / SCENARIO.slo[0].rate
    for job in runs.done:
        s = job.scenario
        usual = SCENARIO.window_s
        assert s.window_s == pytest.approx(min(max(usual, 100 * each_s / s.devices_n), 10 * usual))


def test_a_baseline_is_given_its_best_and_the_others_one_run_each(blank: Report) -> None:
    def curve(job: Job) -> float:
        return step({"fixed:2": 33}.get(job.system.drafting, 20))(job)

    runs = Made(blank, curve)
    found = capacity(SCENARIO, "sled", runs=runs, grain=0.0)
    assert found.capacity == 33
    assert found.variant == "sled,drafting=fixed:2"
    assert sum(job.system.drafting == "fixed:8" for job in runs.done) == 1


def test_central_may_cap_what_runs_at_once() -> None:
    caps = [v.slots for v in variants("central", SCENARIO) if not v.step_tokens]
    assert caps[-1] == 0
    assert sorted(caps[:-1], reverse=True) == caps[:-1]
    assert all(20 < c < 60 for c in caps[:-1])


def test_nobody_is_refused_in_a_search_unless_that_is_asked_for() -> None:
    for policy in ("wisp", "wisp,ahead=no", "central-wisp"):
        assert [v.admission for v in variants(policy, SCENARIO)] == [False]
    assert [v.admission for v in variants("wisp,admission=yes", SCENARIO)] == [True]


def test_central_may_read_prompts_in_smaller_chunks_where_decodes_leave_room() -> None:
    def sizes(rate: float) -> set[int]:
        return {v.step_tokens for v in variants("central", SCENARIO.at_rate(rate))}

    assert sizes(16.0) == {0, 256, 128}
    assert sizes(8.0) == {0, 256}  # 137 decodes would not fit into 128


def test_a_drafter_beside_the_target_may_have_the_limits_of_central_serving() -> None:
    found = variants("central-speculative", SCENARIO)
    assert {v.slots > 0 for v in found} == {True, False}
    assert {v.step_tokens for v in found} == {0, 256, 128}
    assert len({v.drafting for v in found}) == 4


def test_no_number_of_devices_is_measured_twice(blank: Report) -> None:
    runs = Made(blank, line)
    search = Search(SCENARIO, system("wisp"), (1, 2), runs, 0.1)
    search.crossing(30, 0.1, 1)
    search.crossing(60, 0.1, 2)
    asked = [(j.scenario.devices_n, j.seed) for j in runs.done]
    assert len(asked) == len(set(asked))


# --- the paper's rows


def test_caps_follow_from_the_papers_baselines() -> None:
    assert cap("a100-qwen3-32b", "central") == pytest.approx(324, rel=0.01)
    assert cap("a100-qwen3-32b", "sled") == pytest.approx(166, rel=0.02)
    assert cap("a100-qwen3-14b", "sled") == cap("a100-qwen3-14b@1.3", "sled") == 276.38
    for name in ("central", "sled"):
        published = PAPER["a100-qwen3-32b"][name].capacity
        for rate, n in zip(RATES, published, strict=True):
            assert abs(paper_capacity("a100-qwen3-32b", name, rate) - n) <= 2
    with pytest.raises(ConfigError, match="a100-qwen3-14b"):
        cap("h200-qwen3-32b", "sled")


def test_a_paper_model_says_that_nothing_was_simulated() -> None:
    found = capacity(SCENARIO, "central-paper")
    assert found.capacity == 20
    assert found.runs == 0
    assert "no simulation" in found.about


# --- runs


def test_a_hopeless_run_is_cut_and_says_so() -> None:
    crowd = SCENARIO.at_rate(20.0).with_devices(60).brief(10.0, 60.0, 60.0)
    cut = run(Job(crowd, system("central"), 1, give_up=0.1))
    assert cut.cut
    assert cut.simulated_s < 60.0
    assert cut.violation_rate is not None
    assert cut.violation_rate > 0.15


def test_a_good_run_is_never_cut() -> None:
    calm = run(Job(SMALL, system("wisp"), 1, give_up=0.01))
    assert not calm.cut
    assert calm.violation_rate == 0.0
    assert msgspec.structs.replace(calm, cut=False) == run(Job(SMALL, system("wisp"), 1))


def test_a_run_is_done_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))
    job = Job(SMALL, system("wisp"), 1)
    first = remembered(job)
    done: list[Job] = []

    def counted(job: Job) -> Report:
        done.append(job)
        return first

    monkeypatch.setattr(wisp.sim.runs, "run", counted)
    assert remembered(job) == first
    assert (
        remembered(Job(SMALL, system("wisp,ahead=yes"), 1)).system == "wisp,ahead=yes"
    )  # the same by another name
    assert done == []
    for other in (
        Job(SMALL, system("wisp"), 2),
        Job(SMALL, system("paper"), 1),
        Job(SMALL.with_devices(4), job.system, 1),
    ):
        assert key(other) != key(job)
        remembered(other)
    assert len(done) == 3


def test_a_damaged_memory_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))
    job = Job(SMALL, system("central"), 1)
    first = remembered(job)
    (kept,) = (tmp_path / "runs").iterdir()
    kept.write_text("{")
    assert remembered(job) == first


def test_two_processes_find_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(SMALL, system("wisp"), seed) for seed in (1, 2)]
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "two"))
    with Runs(2) as runs:
        two = runs.reports(jobs)
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "one"))
    with Runs() as runs:
        assert runs.reports(jobs) == two


_KILLED = """
import operator, os, time
from wisp.sim.runs import Runs

if __name__ == "__main__":
    with Runs(2) as runs:
        print(next(iter(runs.map(operator.call, [os.getpid]))), flush=True)
        list(runs.map(time.sleep, [600.0] * 4))
"""


def test_worker_processes_end_with_the_one_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate()
    eventually(lambda: not psutil.pid_exists(worker))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))
    path = tmp_path / "tiny.toml"
    path.write_text(TIGHT)
    options = ["--policy", "paper", "--seeds", "2", "--jobs", "1", "--json"]
    found = CliRunner().invoke(app, ["capacity", str(path), *options])
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert 0 <= data["low"] < data["capacity"] < data["high"]
    assert data["bound"] > 0
    assert data["goodput"] > 0
