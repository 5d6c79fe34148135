"""Comparing systems over a suite: its cells, tuning, verdicts, and going on after a break."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from wisp.cli import app
from wisp.core.errors import ConfigError
from wisp.sim import runs
from wisp.sim.compare import command
from wisp.sim.compare.cell import QUICK, Extent, Task, digest, measure, sized
from wisp.sim.compare.command import SYSTEMS, compare, specs_of
from wisp.sim.compare.figures import METRICS, Estimate, SystemFigures
from wisp.sim.compare.results import read
from wisp.sim.compare.sampler import FEWEST, LOADS, MOST, at_load, carried, sample
from wisp.sim.compare.suite import Cell, load_suite, scenario_file, write_scenarios
from wisp.sim.compare.tuning import best, grid
from wisp.sim.compare.verdict import verdict
from wisp.sim.fluid import bound
from wisp.sim.report import Report, Spread
from wisp.sim.runs import Job, key, run
from wisp.sim.scenario import Scenario, load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system

SMALL = load_scenario("a100-qwen3-32b@1.3").at_rate(16.0).with_devices(3)
BRIEF = Extent((1, 2), 3, (9,), 2, True)
TWO = """
[[cells]]
name = "one"
scenario = "a100-qwen3-32b"
change = { devices_n = 2, output_tokens = [10, 20], slo = [{ rate = 16.0 }] }

[[cells]]
name = "two"
scenario = "a100-qwen3-32b"
change = { devices_n = 3, output_tokens = [10, 20], slo = [{ rate = 12.0 }] }
"""


@pytest.fixture(autouse=True)
def brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests, and nothing remembered from elsewhere."""
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "QUICK", BRIEF)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(TWO)
    return path


@pytest.fixture(scope="module")
def blank() -> Report:
    return run(Job(SMALL.brief(1.0, 3.0, 20.0), system("central"), 1))


def wisp(*words: str) -> Result:
    return CliRunner().invoke(app, ["sim", "compare", *words], env={"COLUMNS": "200"})


# --- the suite


def test_the_shipped_suite_covers_what_it_should() -> None:
    cells = load_suite()
    scenarios = [cell.scenario for cell in cells]
    assert len(cells) >= 40
    assert abs(sum(cell.sampled for cell in cells) - len(cells) / 2) <= 2
    rates = [slo.rate for s in scenarios for slo in s.slo]
    assert min(rates) <= 2.1
    assert max(rates) >= 24.0
    devices = [s.devices_n for s in scenarios if not s.open]
    assert min(devices) <= 5
    assert max(devices) == 500
    kits = [kit for s in scenarios for kit in s.devices]
    assert min(kit.rtt_ms for kit in kits) <= 6.0
    assert max(kit.rtt_ms for kit in kits) >= 145.0
    assert {slo.ttft_s for s in scenarios for slo in s.slo} >= {0.5, 1.0, 2.0, 3.0}
    assert {s.overlap for s in scenarios} >= {1.0, 2.0, 3.0, 5.0}
    assert {s.profile_error for s in scenarios} >= {0.5, 2.0, 3.0}
    for has in (
        lambda s: s.arrivals_per_s and s.arrivals_cv == 1.0,
        lambda s: s.arrivals_cv == 3.0,
        lambda s: s.arrivals,
        lambda s: s.population,
        lambda s: s.think_s and s.output_tokens[1] <= 60,
        lambda s: s.prompt_tokens[0] >= 1000,
        lambda s: len(s.slo) > 1,
        lambda s: any(
            float(k.device) < s.slo[0].rate for k in s.devices if k.device.replace(".", "").isdigit()
        ),
    ):
        assert any(has(s) for s in scenarios)


def test_a_seed_decides_what_is_sampled() -> None:
    found = [sample(3, i) for i in range(6)]
    assert found == [sample(3, i) for i in range(6)]
    assert sample(3, 4) == found[4]  # whatever was drawn before
    assert all(sample(4, i) != s for i, s in enumerate(found))


@pytest.mark.parametrize("index", range(9))
def test_a_sampled_load_is_below_at_or_above_what_central_carries(index: int) -> None:
    s = sample(5, index)
    answering = s.answer_s / (s.answer_s + s.think_s)
    at_work = s.arrivals_per_s * s.answer_s if s.open else s.devices_n * answering
    assert at_work / carried(s) == pytest.approx(LOADS[index % 3], rel=0.15)
    assert FEWEST <= (at_work if s.open else s.devices_n) <= MOST


def test_central_serves_all_at_the_pace_of_the_fastest_and_bursts_need_room() -> None:
    mixed, fast, poisson = (
        load_scenario("mixed"),
        load_scenario("mixed").at_rate(16.0),
        load_scenario("poisson"),
    )
    assert carried(mixed) == carried(fast) < bound(mixed, central=True).devices
    bursts = msgspec.structs.replace(poisson, arrivals_cv=3.0)
    assert carried(bursts) < 0.75 * carried(poisson) < 0.75 * bound(poisson, central=True).devices


def test_a_load_of_what_is_never_carried_is_none() -> None:
    assert at_load(SMALL.at_rate(500.0), 0.5) is None


def test_a_suite_names_scenarios_and_changes_and_is_found_beside_them(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(scenario_file(Cell("mine", SMALL)))
    text = 'scenarios = ["mine.toml", "mixed"]\n[[cells]]\nname = "a"\nscenario = "mine.toml"\nloads = [0.5, 1]\n'
    path = tmp_path / "suite.toml"
    path.write_text(text + "[sample]\nseed = 1\ncells = 2\n")
    cells = {cell.name: cell for cell in load_suite(path)}
    assert list(cells) == ["mine", "mixed", "a-0.5", "a-1", "sampled-1-0", "sampled-1-1"]
    assert cells["mine"].scenario == SMALL
    assert cells["a-1"].scenario.devices_n == round(bound(SMALL, central=True).devices)
    assert [cell.sampled for cell in cells.values()].count(True) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no cells"),
        ("scenarios = [", "cannot read the suite"),
        ('scenarios = ["mixed", "mixed"]', "two cells with the name mixed"),
        ('scenarios = ["nowhere"]', "unknown scenario"),
        ('[[cells]]\nname = "a"\nscenario = "mixed"\nchange = { rtt = 3 }', "'a'.*rtt"),
        ('[[cells]]\nname = "a"\nscenario = "mixed"\nchange = { arrivals_cv = 3 }', "'a'.*arrivals_per_s"),
        ('[[cells]]\nname = "a"\nscenario = "bursts"\nloads = [1]', "'a': loads are shares"),
        ('[[cells]]\nname = "a"\nscenario = "mixed"\nloads = [-1]', "'a': loads are shares"),
        ('[[cells]]\nname = "a"\nscenario = "mixed"\nload = 1', "unknown field `load`"),
        (
            '[[cells]]\nname = "a"\nscenario = "mixed"\nchange = { device_n = 3 }',
            "'a'.*did you mean devices_n",
        ),
        (
            '[[cells]]\nname = "a"\nscenario = "mixed"\nchange = { kv_tokens = 10 }',
            "'a': a prompt and its answer may be",
        ),
        (
            '[[cells]]\nname = "a"\nscenario = "mixed"\nchange = { hardware = "nosuch" }',
            "'a': hardware = \"nosuch\"",
        ),
        (
            '[[cells]]\nname = "a"\nscenario = "mixed"\nchange = { traces = "nowhere" }',
            "'a': traces = \"nowhere\": there is no such file",
        ),
    ],
)
def test_a_suite_that_cannot_be_is_refused_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_suite(path)


def test_a_path_in_a_change_is_beside_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, tokens in (("elsewhere", 5), ("suite", 7)):
        (tmp_path / folder).mkdir()
        line = json.dumps({"at_s": 1.0, "prompt_tokens": tokens})
        (tmp_path / folder / "arrivals.jsonl").write_text(line + "\n")
    path = tmp_path / "suite" / "suite.toml"
    path.write_text(
        '[[cells]]\nname = "a"\nscenario = "a100-qwen3-32b"\nchange = { arrivals = "arrivals.jsonl" }\n'
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    (cell,) = load_suite(path)
    assert '"prompt_tokens": 7' in Path(cell.scenario.arrivals).read_text()


def test_the_times_of_a_cell_are_such_that_enough_requests_arrive() -> None:
    for scenario in (SMALL, load_scenario("poisson"), sample(5, 4)):
        s = sized(scenario, 100)
        per_s = s.arrivals_per_s or s.devices_n / (s.answer_s + s.think_s)
        assert per_s * s.window_s >= 100
        assert s.drain_s >= s.answer_s
    assert sized(load_scenario("bursts"), 100) == load_scenario("bursts")


# --- tuning


def test_central_is_tuned_over_caps_and_chunks_that_can_matter() -> None:
    loaded = SMALL.with_devices(60)
    found = {(of.slots, of.step_tokens) for of in grid("central", loaded)}
    caps, sizes = ({pair[i] for pair in found} for i in (0, 1))
    assert sizes == {0, 256, 128}
    assert len(caps) == 3
    assert len(found) == 9
    assert {of.slots for of in grid("central", SMALL)} == {0}  # no cap below three devices
    assert len(grid("central", loaded, coarse=True)) == 3


def test_a_drafter_beside_the_target_is_served_as_central_is() -> None:
    found = grid("central-speculative", SMALL, system("central,slots=20,step_tokens=256"))
    assert {(of.slots, of.step_tokens) for of in found} == {(20, 256)}
    assert len({of.drafting for of in found}) == 3
    assert grid("wisp", SMALL) == [system("wisp")]


def test_the_best_has_most_attainment_then_goodput_then_the_lowest_ttft(blank: Report) -> None:
    def made(missed: float, goodput: float, ttft_ms: float) -> list[Report]:
        waited = Spread(ttft_ms, ttft_ms, ttft_ms)
        return [msgspec.structs.replace(blank, violation_rate=missed, goodput=goodput, ttft_ms=waited)]

    one, two, three = (system(f"central,slots={n}") for n in (1, 2, 3))
    assert best([(one, made(0.3, 900.0, 10.0)), (two, made(0.1, 500.0, 90.0))]) == two
    assert best([(one, made(0.1, 500.0, 10.0)), (two, made(0.105, 600.0, 90.0))]) == two
    assert best([(one, made(0.0, 500.0, 90.0)), (two, made(0.0, 505.0, 80.0))]) == two
    assert best([(o, made(0.0, 500.0, 90.0)) for o in (three, two)]) == three


# --- verdicts


def figures(**values: list[float | None]) -> SystemFigures:
    level = {"ttft_p50_ms": 100.0, "longest_stall_p50_ms": 500.0, "goodput": 400.0}
    usual: dict[str, list[float | None]] = {name: [level.get(name, 1.0)] * 3 for name in METRICS}
    usual |= values
    estimates = {
        name: Estimate.of([v for v in of if v is not None]) if None not in of else None
        for name, of in usual.items()
    }
    return SystemFigures("made up", usual, estimates)


def missed(ours: SystemFigures, central: SystemFigures, tpot_ms: float = 100.0) -> list[str]:
    return [c.metric for c in verdict(ours, central, tpot_ms).missed]


def test_equal_is_not_worse_and_a_tenth_is_allowed() -> None:
    assert missed(figures(), figures()) == []
    slower = figures(ttft_p50_ms=[109.0] * 3, longest_stall_p50_ms=[549.0] * 3, goodput=[361.0] * 3)
    assert missed(slower, figures()) == []


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("attainment", [0.97, 0.98, 0.98]),
        ("ttft_p50_ms", [112.0, 109.0, 113.0]),
        ("longest_stall_p50_ms", [560.0] * 3),
        ("goodput", [350.0, 361.0, 355.0]),
    ],
)
def test_worse_figures_are_named(metric: str, values: list[float | None]) -> None:
    assert missed(figures(**{metric: values}), figures()) == [metric]


def test_stalls_within_one_tpot_target_are_equal() -> None:
    ours, central = figures(longest_stall_p50_ms=[90.0] * 3), figures(longest_stall_p50_ms=[0.0] * 3)
    assert missed(ours, central, tpot_ms=100.0) == []
    assert missed(ours, central, tpot_ms=50.0) == ["longest_stall_p50_ms"]


def test_where_central_does_not_carry_the_load_only_attainment_counts() -> None:
    central = figures(attainment=[0.89, 0.9, 0.9])
    judged = verdict(figures(attainment=[0.9] * 3, goodput=[1.0] * 3), central, 100.0)
    assert judged.passes
    assert not judged.carried
    assert missed(figures(attainment=[0.8] * 3), central) == ["attainment"]


def test_seeds_are_paired_and_an_interval_says_whether_it_is_clear() -> None:
    central = figures(ttft_p50_ms=[100.0, 1000.0, 300.0])
    (clear,) = verdict(figures(ttft_p50_ms=[120.0, 1190.0, 360.0]), central, 100.0).missed
    assert clear.excess is not None
    assert clear.excess.mean == pytest.approx(43.333, abs=1e-3)  # of 10, 90 and 30
    assert not clear.clear
    (sure,) = verdict(figures(ttft_p50_ms=[150.0, 1150.0, 365.0]), central, 100.0).missed
    assert sure.clear
    low, mean, high = (getattr(sure.excess, name) for name in ("low", "mean", "high"))
    assert 0 < low < mean < high


def test_a_system_that_serves_nobody_is_worse_unless_central_serves_nobody() -> None:
    none = figures(ttft_p50_ms=[None] * 3)
    assert missed(none, figures()) == ["ttft_p50_ms"]
    assert missed(none, none) == []


def test_a_cell_in_which_nobody_is_served_in_time_says_nothing() -> None:
    nobody, some = figures(attainment=[0.0] * 3), figures(attainment=[0.1] * 3)
    assert verdict(nobody, nobody, 100.0).says_nothing
    assert not verdict(nobody, some, 100.0).says_nothing
    assert not verdict(some, nobody, 100.0).says_nothing


# --- the command


def test_two_cells_in_virtual_time(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = wisp(
        "--suite", str(suite), "--quick", "--systems", "wisp", "--jobs", "1", "--out", str(out), "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(out.read_text())
    assert [cell["name"] for cell in found["cells"]] == ["one", "two"]
    for cell in found["cells"]:
        assert list(cell["systems"]) == ["central", "wisp"]
        for of in cell["systems"].values():
            assert of["seeds"].keys() == of["estimates"].keys() == METRICS.keys()
            assert all(len(values) == 2 for values in of["seeds"].values())
        assert cell["requests"] >= 6
        assert cell["verdicts"]["wisp"]["carried"]
        assert [c["metric"] for c in cell["verdicts"]["wisp"]["criteria"]] == [
            "attainment",
            "ttft_p50_ms",
            "longest_stall_p50_ms",
            "goodput",
        ]


def test_a_table_for_people_and_an_exit_code_on_request(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--suite", str(suite), "--quick", "--systems", "wisp", "--jobs", "1")
    shown = wisp(*words)
    assert shown.exit_code == 0
    assert "2 of 2 cells done, 2 seeds" in shown.stdout
    assert "A quick run" in shown.stdout

    def worse(task: Task) -> object:
        found = measure(task)
        criteria = [msgspec.structs.replace(c, holds=False) for c in found.verdicts["wisp"].criteria]
        judged = msgspec.structs.replace(found.verdicts["wisp"], criteria=criteria, passes=False)
        return msgspec.structs.replace(found, verdicts={"wisp": judged})

    monkeypatch.setattr(command, "measure", worse)
    assert wisp(*words).exit_code == 0
    failing = wisp(*words, "--check")
    assert failing.exit_code == 1
    assert "0 of 2 cells pass:" in failing.stdout
    assert "  one: wisp: TTFT" in failing.stdout


def test_a_cell_that_says_nothing_is_no_pass(tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(
        TWO + "[[cells]]\n" + TWO.split("[[cells]]")[1].replace("one", "hopeless").replace("16.0", "500.0")
    )
    shown = wisp("--suite", str(path), "--quick", "--systems", "wisp", "--jobs", "1").stdout
    assert "2 of 2 cells pass" in shown
    assert "nothing is compared: hopeless" in shown


def test_a_check_without_wisp_checks_nothing_and_is_refused(suite: Path) -> None:
    result = wisp("--suite", str(suite), "--quick", "--systems", "sled", "--check")
    assert isinstance(result.exception, ConfigError)
    assert "--check is about wisp" in str(result.exception)


def test_figures_of_other_cells_and_systems_are_not_overwritten(suite: Path, tmp_path: Path) -> None:
    out, cells = tmp_path / "out.json", load_suite(suite)
    compare(cells, ("central", "wisp"), quick=True, out=out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"not compared now \(one\)"):
        compare(cells[1:], ("central", "wisp"), quick=True, out=out)
    with pytest.raises(ConfigError, match=r"not compared now \(wisp\)"):
        compare(cells, ("central", "sled"), quick=True, out=out)
    assert out.read_bytes() == before


def test_an_error_of_a_cell_names_it(suite: Path) -> None:
    late = msgspec.structs.replace(load_suite(suite)[0].scenario, population=((1e6, 1),))
    with pytest.raises(ConfigError, match=r"the cell 'late': no request arrived"):
        measure(Task(Cell("late", late), ("central",), BRIEF))


def test_the_place_of_a_file_does_not_matter_and_its_contents_do(tmp_path: Path) -> None:
    keys = []
    for folder, tokens in (("a", 5), ("b", 5), ("c", 6)):
        path = tmp_path / folder / "arrivals.jsonl"
        path.parent.mkdir()
        path.write_text(json.dumps({"at_s": 1.0, "prompt_tokens": tokens}))
        scenario = msgspec.structs.replace(SMALL, arrivals=str(path))
        keys.append(key(Job(scenario, system("wisp"), 1)))
    assert keys[0] == keys[1] != keys[2]


def test_a_run_that_was_killed_goes_on_with_the_next_cell(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cells, done = tmp_path / "out.json", load_suite(suite), list[str]()

    def dies(task: Task) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(task.cell.name)
        return measure(task)

    monkeypatch.setattr(command, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(cells, ("central", "wisp"), quick=True, out=out)
    left = read(out)
    assert left is not None
    assert [cell.name for cell in left.cells] == done

    def counted(task: Task) -> object:
        done.append(task.cell.name)
        return measure(task)

    monkeypatch.setattr(command, "measure", counted)
    found = compare(cells, ("central", "wisp"), quick=True, out=out)
    assert sorted(done) == ["one", "two"]
    assert left.cells[0] in found.cells
    compare(cells, ("central", "wisp"), quick=True, out=out)
    assert len(done) == 2
    compare(cells, ("central", "wisp", "paper"), quick=True, out=out)
    assert len(done) == 4


def test_a_cell_is_done_again_when_something_it_depends_on_has_changed(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = load_suite(suite)[0]
    task = Task(cell, ("central", "wisp"), QUICK)
    other = Cell(cell.name, cell.scenario.with_devices(4))
    changed = [
        msgspec.structs.replace(task, cell=other),
        msgspec.structs.replace(task, systems=("central",)),
        msgspec.structs.replace(task, extent=BRIEF),
    ]
    before = digest(task)
    assert before == digest(task)
    assert len({before, *map(digest, changed)}) == 4
    monkeypatch.setattr(runs, "source_hash", lambda: "another build")
    assert digest(task) != before


def test_a_file_of_something_else_is_not_overwritten(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    result = wisp("--suite", str(suite), "--quick", "--out", str(out))
    assert isinstance(result.exception, ConfigError)
    assert "no file of this command" in str(result.exception)
    assert out.read_text() == '{"mine": 1}'


def test_a_quick_run_does_not_replace_the_figures_of_a_full_one(suite: Path, tmp_path: Path) -> None:
    out, cells = tmp_path / "out.json", load_suite(suite)
    compare(cells, ("central",), quick=True, out=out)
    with pytest.raises(ConfigError, match="of a quick run: give another --out"):
        compare(cells, ("central",), quick=False, out=out)


def test_every_cell_can_be_had_as_a_scenario_file(suite: Path, tmp_path: Path) -> None:
    assert wisp("--suite", str(suite), "--scenario-files", str(tmp_path / "cells")).exit_code == 0
    for cell in load_suite(suite):
        assert load_scenario(str(tmp_path / "cells" / f"{cell.name}.toml")) == cell.scenario


def test_a_file_has_any_title_and_no_two_cells_have_the_same_file(tmp_path: Path) -> None:
    scenario = msgspec.structs.replace(SMALL, title='caf\xe9 "\U0001f680" \\ \x7f')
    write_scenarios([Cell("a b", scenario)], tmp_path)
    assert load_scenario(str(tmp_path / "a-b.toml")) == scenario
    with pytest.raises(ConfigError, match="a b, A-b would have files of the same name"):
        write_scenarios([Cell("a b", scenario), Cell("A-b", scenario)], tmp_path)


@pytest.mark.parametrize("index", range(3))
def test_a_sampled_scenario_as_a_file_is_the_same(index: int, tmp_path: Path) -> None:
    path, scenario = tmp_path / "s.toml", sample(2, index)
    path.write_text(scenario_file(Cell("s", scenario)))
    assert load_scenario(str(path)) == scenario


def test_systems_by_comma_with_their_changes() -> None:
    assert specs_of("wisp,ahead=no,slots=9,paper") == ("central", "wisp,ahead=no,slots=9", "paper")
    assert specs_of("ours") == ("central", "wisp")
    assert specs_of(" wisp, paper,") == ("central", "wisp", "paper")
    assert len(specs_of(SYSTEMS)) == 6
    with pytest.raises(ConfigError, match="tuned in each cell"):
        specs_of("central,slots=3")
    with pytest.raises(ConfigError, match="unknown system"):
        specs_of("foo")


def test_systems_see_the_same_requests_from_the_same_kinds_of_devices() -> None:
    two: Scenario = msgspec.structs.replace(
        sample(5, 4), devices=load_scenario("mixed").devices, arrivals_per_s=4.0, think_s=0.0, retries=0
    ).brief(1.0, 4.0, 10.0)
    asked = []
    for spec in ("central", "wisp", "central-speculative"):
        simulation = Simulation(two, system(spec), 1)
        simulation.run()
        asked.append([(r.arrived, r.seed, r.slo, simulation.kits[r.device]) for r in simulation.window()])
    assert asked[0] == asked[1] == asked[2]
    assert len({kit for *_, kit in asked[0]}) > 1
