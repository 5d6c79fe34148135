"""Every experiment in its quick form: a page with its command, its data and a picture, and the bound in its tables."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from benchmarks.experiments import EXPERIMENTS, paper, run_experiments, table
from benchmarks.experiments.bursts import spikes
from benchmarks.pages import render
from wisp.core.errors import ConfigError
from wisp.sim import runs
from wisp.sim.capacity import Capacity
from wisp.sim.paper import PAPER, RATES
from wisp.sim.report import Report
from wisp.sim.runs import Job
from wisp.sim.scenario import load_scenario
from wisp.sim.systems import system

SIMULATED = [name for name in EXPERIMENTS if name != "reality"]


@pytest.fixture(scope="module")
def blank() -> Report:
    small = load_scenario("a100-qwen3-32b").at_rate(16.0).with_devices(2).brief(1.0, 2.0, 20.0)
    return runs.run(Job(small, system("central"), 1))


@pytest.mark.parametrize("name", SIMULATED)
def test_a_page_of_what_was_found(
    name: str, blank: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run that searches ask for is made up: a server carries 40 devices, whatever the system."""

    def made(job: Job) -> Report:
        missed = 0.0 if job.scenario.devices_n <= 40 else 0.5
        return msgspec.structs.replace(
            blank,
            violation_rate=missed,
            system=job.system.name,
            seed=job.seed,
            devices=job.scenario.devices_n,
        )

    monkeypatch.setattr(runs, "run", made)
    check_page(name, tmp_path, monkeypatch)


@pytest.mark.extended
@pytest.mark.parametrize("name", SIMULATED)
def test_a_page_comes_with_its_command_data_and_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_page(name, tmp_path, monkeypatch)


def check_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "cache"))
    run_experiments([name], quick=True, out=tmp_path, jobs=1)
    page = (tmp_path / f"{name}.md").read_text()
    assert f"`python -m benchmarks experiments {name} --quick`" in page
    assert "Time is modelled" in page
    assert "bound" in page
    assert f"({name}.png)" in page
    assert json.loads((tmp_path / f"{name}.json").read_text())["command"] in page
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.extended
def test_reality_is_run_live_on_both_engines_and_no_token_is_wrong(tmp_path: Path) -> None:
    run_experiments(["reality"], quick=True, out=tmp_path, jobs=1)
    found = json.loads((tmp_path / "reality.json").read_text())["runs"]
    assert [r["engine"] for r in found] == ["emulated", "llama.cpp"]
    for r in found:
        live, simulated = r["live"], r["simulated"]
        assert live["where"] == "live"
        assert simulated["where"] == "simulator"
        assert live["mismatches"] == simulated["mismatches"] == 0
        assert live["tokens_checked"] > 100
        assert {d["name"] for d in r["differences"]} >= {
            "goodput",
            "attainment",
            "median_tpot_ms",
            "p99_ttft_ms",
        }
    page = (tmp_path / "reality.md").read_text()
    assert "points (aim: within 5" in page
    assert "exact mode" in page


def test_an_unknown_experiment_is_refused_before_any_is_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="regimes"):
        run_experiments(["table", "colours"], quick=True, out=tmp_path, jobs=1)
    assert not list(tmp_path.iterdir())


def test_the_spikes_of_the_shipped_scenario() -> None:
    assert [n for _, _, n in spikes(load_scenario("bursts"))] == [110, 155, 215]


def test_padded_steps_take_longer() -> None:
    setup = paper.Setup("", "sled,drafting=fixed:4")
    small = load_scenario("a100-qwen3-32b").at_rate(8.0).with_devices(8).brief(2.0, 10.0, 20.0)
    reports = []
    for padded in (False, True):
        here = paper._Here(msgspec.structs.replace(setup, padded=padded))
        reports += here.reports([Job(small, system(setup.spec), 1)])
    plain, longest = (report.tpot_ms.median or 0.0 for report in reports)
    assert longest > plain > 0.0


def test_the_papers_wisp_row_is_predicted_from_its_centralised_row() -> None:
    found = table._predictions()
    for predicted, published in zip(found["paper"], PAPER[table.MAIN]["paper"].capacity, strict=True):
        assert 0.5 < predicted / published < 2.0


def test_the_whole_page_of_the_table_from_made_up_capacities() -> None:
    def made(system: str, rate: float) -> dict[str, object]:
        n = round(800 / rate) if system == "wisp" else round(400 / rate)
        found = Capacity(
            "made up", system, system, rate, 0.1, (1,), n, n - 1, n + 1, n * rate, 0.09, 130.0, n - 3, 1.2 * n, 0.83,
            1.4 * n, 0.71,
        )  # fmt: skip
        return dict(msgspec.to_builtins(found))

    data = {
        "main": [made(s, r) for r in table.MAIN_RATES for s in table.SYSTEMS],
        "paper": [
            {"target": t, **made(s, r)} for t in table.TARGETS for r in RATES for s in ("wisp", *table.THEIRS)
        ],
        "overlap": [
            {"overlap": o, **made(s, r)}
            for o in table.OVERLAPS
            for s in ("wisp", "paper", "central")
            for r in table.OVERLAP_RATES
        ],
        "predicted": table._predictions(),
    }
    head = {"command": "made up", "date": "today", "wisp": "0"}
    page = render("table", head | data, table.figures(data))
    assert "| 8 | wisp | **100** (99–101) |" in page
    assert "| a100-qwen3-32b | paper | 200 / 100 / 67 / 50 | 164 / 142 / 103 / 86 |" in page
    assert "| a100-qwen3-32b | wisp / central | 2.00 / 2.00 / 1.99 / 2.00 | 1.94 |" in page
