"""Scenarios from files: what cannot be is refused with what to do, paths lead somewhere, and no data is no success."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from wisp.calibrate.traces import format as traces
from wisp.calibrate.traces.format import trace_folder
from wisp.children import Child, ChildError
from wisp.cli import app
from wisp.cli.options import SYSTEM_HELP
from wisp.core.errors import ConfigError, UnavailableError
from wisp.core.protocol.messages import Welcome
from wisp.sim import commands, fleet, runs, scenario
from wisp.sim.capacity import Search, capacity, limit_of
from wisp.sim.fluid import bound
from wisp.sim.paper import paper_capacity
from wisp.sim.report import Report, report
from wisp.sim.report_table import table
from wisp.sim.runs import SOURCES, Job, Runs, key, remembered
from wisp.sim.scenario import Kit, Scenario, SloClass, load_scenario, recorded_arrivals
from wisp.sim.simulate import Simulation
from wisp.sim.systems import PAPER_MODELS, SYSTEMS, system

ROOT = Path(__file__).parents[2]
PLAIN = """
title = "plain"
hardware = "a100-qwen3-32b"
devices_n = 1
warmup_s = 2.0
window_s = 4.0
drain_s = 40.0
"""
LONG = "a" * 300  # no file has a name of so many bytes
SLO = "[[slo]]\nrate = 8.0\n"


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def quiet() -> Scenario:
    """One device that is still at its first answer when the window has passed."""
    return Scenario(
        "quiet",
        "a100-qwen3-32b",
        (SloClass(8.0),),
        devices_n=1,
        warmup_s=2.0,
        window_s=0.05,
        drain_s=0.0,
        seeds=(7, 8),
    )


# --- values


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("slo = []", "at least one class"),
        (SLO.replace("8.0", "0"), r"slo\[0\]: rate must be more than 0, not 0"),
        (SLO + "share = 0", r"slo\[0\]: share must be more than 0"),
        (SLO + "ttft_s = nan", "ttft_s must be at least 0, not nan"),
        ("devices = []\n" + SLO, "at least one kind"),
        ("window_s = 0\n" + SLO, "window_s must be more than 0"),
        ("prompt_tokens = [200, 60]\n" + SLO, r"prompt_tokens must be the fewest .* not \[200, 60\]"),
        ("output_tokens = [0, 60]\n" + SLO, "output_tokens must be the fewest"),
        ("step_tokens = -1\n" + SLO, "step_tokens must be at least 0"),
        ("arrivals_per_s = 2\narrivals_cv = 0\n" + SLO, "arrivals_cv must be between 0.1 and 10"),
        ("arrivals_cv = 3\n" + SLO, "arrivals_cv is of arrivals_per_s"),
        ("devices_n = -3\n" + SLO, "devices_n must be at least 1, not -3"),
        ("acceptance = 1.5\n" + SLO, "acceptance must be at least 0 and at most 1, not 1.5"),
        ("population = [[0, 0]]\n" + SLO, "no device at any time"),
        ("population = [[-1, 5]]\n" + SLO, "may be negative"),
        ("seeds = []\n" + SLO, "at least one number"),
        ("population = [[0, 1000000000]]\n" + SLO, "1000000000 devices are more than 100000"),
        ("profile_error = 1e-9\n" + SLO, "between 0.01 and 100"),
        ("arrivals_per_s = 4\npopulation = [[0, 5]]\n" + SLO, "population and arrivals_per_s are two kinds"),
        ("kv_tokens = 50\n" + SLO, "may be 500 tokens long, and the verifier holds 50 of a session"),
        ("prompt_tokens = [40000, 60000]\n" + SLO, "holds 8,192 of a session"),
        (SLO + '[[devices]]\ndevice = "40"\nloss = 1.0', "loss must be at least 0 and at most 0.9"),
        (SLO + '[[devices]]\ndevice = "40"\nrtt_ms = 1e9', "at most 60000"),
        (SLO + '[[devices]]\ndevice = "1e-9"', "at least 0.01 tokens per second"),
        ("seeds = [1, 1]\n" + SLO, "differ"),
        (SLO + '[[devices]]\ndevice = "-5"', r"devices\[0\]: device: '-5': .* more than 0"),
        (SLO + '[[devices]]\ndevice = "0"', "more than 0 tokens"),
        (SLO + '[[devices]]\ndevice = "nan"', "more than 0 tokens"),
        (SLO + '[[devices]]\ndevice = "pi5+throtle"', r"\+throttle, as in pi5\+throttle"),
        (SLO + '[[devices]]\ndevice = "p15"', "did you mean pi5"),
        (
            SLO + '[[devices]]\ndevice = "40"\nrtt_ms = -50',
            r"devices\[0\]: rtt_ms must be at least 0, not -50",
        ),
        ("devces_n = 5\n" + SLO, "unknown key devces_n; did you mean devices_n.*known are title, hardware"),
        (
            SLO + "rat = 5",
            r"slo\[0\]: unknown key rat; did you mean rate\? known are rate, ttft_s, share, name",
        ),
        (SLO + '[[devices]]\ndevice = "40"\nrtt = 3', r"devices\[0\]: unknown key rtt; did you mean rtt_ms"),
        ('hardware = "a1000"\n' + SLO, 'hardware = "a1000": unknown hardware profile'),
        ('arrivals = "gone.jsonl"\n' + SLO, 'arrivals = "gone.jsonl": there is no such file'),
        ('traces = "elsewhere"\n' + SLO, 'traces = "elsewhere": there is no such file'),
        (f'hardware = "{LONG}"\n' + SLO, "unknown hardware profile"),
        (f'arrivals = "{LONG}"\n' + SLO, "there is no such file"),
        (f'traces = "{LONG}"\n' + SLO, "there is no such file"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(lines: str, says: str, tmp_path: Path) -> None:
    own = {line.partition(" =")[0] for line in lines.splitlines()}
    plain = "\n".join(line for line in PLAIN.splitlines() if line.partition(" =")[0] not in own)
    name = written(tmp_path, f"{plain}\n{lines}\n")
    with pytest.raises(ConfigError, match=says) as raised:
        load_scenario(name)
    assert str(raised.value).startswith(f"the scenario {name}: ")


def test_a_name_that_no_file_can_have_is_of_no_scenario() -> None:
    with pytest.raises(ConfigError, match="unknown scenario"):
        load_scenario(LONG)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the scenario"):
        load_scenario(written(tmp_path, "title ="))
    for deep in ("title = " + "[" * 5000, "title = " + "9" * 5000):
        with pytest.raises(ConfigError, match="cannot read the scenario"):
            load_scenario(written(tmp_path, deep))


def test_changes_are_checked_like_files() -> None:
    plain = load_scenario("a100-qwen3-32b")
    with pytest.raises(ConfigError):
        plain.with_devices(0)
    with pytest.raises(ConfigError):
        plain.at_rate(0.0)
    with pytest.raises(ConfigError):
        plain.brief(0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="rtt_ms"):
        Kit("40", -1.0)


# --- paths


def test_traces_ship_and_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside = ROOT / "data" / "traces" / "qwen2.5-coder"
    assert trace_folder(Path("data/traces")) == inside
    assert trace_folder(Path("data/other")) == Path("data/other")
    package = tmp_path / "package"
    (package / "shipped" / "pair").mkdir(parents=True)
    (package / "shipped" / "pair" / "a.npz").touch()
    monkeypatch.setattr(traces, "__file__", str(package / "format.py"))
    assert trace_folder(Path("data/traces")) == package / "shipped" / "pair"
    (tmp_path / "data" / "traces").mkdir(parents=True)
    (tmp_path / "data" / "traces" / "b.npz").touch()
    assert trace_folder(Path("data/traces")) == Path("data/traces")


def test_the_wheel_and_the_sources_have_the_traces() -> None:
    about = (ROOT / "pyproject.toml").read_text()
    assert '"data/traces" = "wisp/calibrate/traces/shipped"' in about
    assert re.search(r'sdist\]\ninclude = \[.*"data"', about)


def test_paths_are_relative_to_the_scenario_or_else_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, current = tmp_path / "beside", tmp_path / "current"
    for folder, tokens in ((beside, 11), (current, 22)):
        folder.mkdir()
        (folder / "some.jsonl").write_text(f'{{"at_s": 1.0, "prompt_tokens": {tokens}}}')
    monkeypatch.chdir(current)
    name = written(beside, f'{PLAIN}arrivals = "some.jsonl"\n{SLO}')

    def first_prompt() -> int:
        found = load_scenario(name)
        ((_, n, _),) = recorded_arrivals(Path(found.arrivals), found.slo[0])
        return n

    assert first_prompt() == 11
    (beside / "some.jsonl").unlink()
    assert first_prompt() == 22
    own = (ROOT / "src/wisp/engines/data/hardware/a100-qwen3-32b.toml").read_text()
    (beside / "own.toml").write_text(own)
    moved = load_scenario(written(beside, PLAIN.replace("a100-qwen3-32b", "own.toml") + SLO))
    assert moved.hardware == str(beside / "own.toml")
    (beside / "own.toml").write_text(own.replace("layers", "floors"))
    with pytest.raises(ConfigError, match=r'hardware = "own.toml": cannot read'):
        load_scenario(written(beside, PLAIN.replace("a100-qwen3-32b", "own.toml") + SLO))


def test_a_scenario_of_a_machine_with_another_overlap_has_a_name() -> None:
    plain, other = load_scenario("a100-qwen3-32b"), load_scenario("a100-qwen3-32b@1.3")
    assert (plain.profile.overlap, other.profile.overlap) == (2.2, 1.3)
    assert msgspec.structs.replace(other, hardware=plain.hardware) == plain
    assert load_scenario("mixed").profile.overlap == 1.3  # as its published figures were made
    assert load_scenario("mixed@4").profile.overlap == 4.0
    with pytest.raises(ConfigError, match=r"a100-qwen3-32b@x: hardware = .* after @ goes an overlap"):
        load_scenario("a100-qwen3-32b@x")


# --- open loops have no number of devices


@pytest.mark.parametrize("name", ["poisson", "recorded"])
def test_an_open_loop_has_no_capacity_and_takes_no_devices(name: str) -> None:
    with pytest.raises(ConfigError, match="come by themselves"):
        capacity(load_scenario(name), "wisp")
    with pytest.raises(ConfigError, match="leave out --devices"):
        commands.chosen(name, None, 5)
    assert commands.chosen(name, None, None).open


# --- nothing arrived


def test_where_nothing_arrived_no_rate_is_told(quiet: Scenario) -> None:
    simulation = Simulation(quiet, system("central"), 1)
    simulation.run()
    found = report(simulation)
    assert found.arrived == 0
    data = found.benchmark()
    assert (data["violation_rate"], data["attainment"], found.missed) == (None, None, 1.0)
    assert data["classes"][0]["attainment"] is None
    for name in (
        "mean_ttft_ms",
        "median_tpot_ms",
        "p99_itl_ms",
        "p99_e2el_ms",
        "violators_tpot_p99_ms",
        "acceptance",
    ):
        assert data[name] is None
    json.dumps(data, allow_nan=False)
    console = Console(record=True, width=120)
    console.print(table([found]))
    shown = console.export_text()
    assert "nothing arrived" in shown
    assert "100" not in shown.partition("nothing arrived")[0]
    assert "yes" not in shown
    console = Console(record=True, width=120)
    console.print(table([msgspec.structs.replace(found, scenario="a title longer than its table" * 2)]))
    assert console.export_text().splitlines()[0].rstrip().endswith(f"{found.duration:g} s"), "one line"


class Nothing(Runs):
    """Whatever is asked, nothing arrived."""

    def reports(self, jobs: Sequence[Job]) -> list[Report]:
        alone = remembered(msgspec.structs.replace(jobs[0], scenario=jobs[0].scenario.with_devices(1)))
        return [alone for _ in jobs]


def test_a_search_refuses_a_scenario_in_which_nothing_arrives(
    quiet: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="longer window_s"):
        capacity(quiet, "paper", seeds=(1,), runs=Nothing())
    assert Search(quiet, system("central"), (1,), Runs(), 0.1).rate(1, 1) == 1.0
    first, again = (remembered(Job(quiet, system("central"), 1)) for _ in range(2))
    assert first == again
    assert (first.arrived, first.violation_rate) == (0, None)


# --- what is remembered


def test_a_changed_file_of_arrivals_that_ships_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(scenario, "SHIPPED", shipped)
    monkeypatch.setattr(runs, "_traces_hash", lambda folder: "")
    given = msgspec.structs.replace(load_one(), arrivals="some.jsonl")
    keys = set()
    for tokens in (5, 6):
        (shipped / "some.jsonl").write_text(f'{{"at_s": 1.0, "prompt_tokens": {tokens}}}')
        keys.add(key(Job(given, system("wisp"), 1)))
    assert len(keys) == 2


def test_traces_may_be_one_file_and_are_part_of_the_key(tmp_path: Path) -> None:
    keys = set()
    for name in ("a", "b"):
        path = tmp_path / name / "same.npz"
        path.parent.mkdir()
        path.write_bytes(name.encode())
        keys.add(runs._traces_hash(str(path)))
    assert len(keys) == 2


def load_one() -> Scenario:
    return Scenario("one", "a100-qwen3-32b", (SloClass(8.0),))


def test_all_that_a_run_depends_on_is_part_of_its_key() -> None:
    """Whatever a module of a run imports of `core`, `calibrate` or `sim` is in the key itself."""
    package = ROOT / "src" / "wisp"
    keyed = {path for pattern in SOURCES for path in package.glob(pattern)}
    for pattern in SOURCES:
        assert list(package.glob(pattern)), pattern
    for path in (p for p in keyed if p.suffix == ".py"):
        for name in re.findall(
            r"^from wisp\.((?:core|calibrate|sim)\.[\w.]+) import", path.read_text(), re.MULTILINE
        ):
            imported = package / f"{name.replace('.', '/')}.py"
            assert imported in keyed or imported.with_suffix("").is_dir(), (path, name)


# --- bounds


def test_each_system_has_the_bound_of_what_it_may_do() -> None:
    slow = msgspec.structs.replace(load_scenario("a100-qwen3-32b").at_rate(16.0), devices=(Kit("20", 150.0),))
    undrafted, drafted = bound(slow, central=True), bound(slow)
    assert limit_of(system("central"), slow) == limit_of(system("central,slots=10"), slow) == undrafted
    assert limit_of(system("wisp,ahead=no"), slow) == drafted
    beside = limit_of(system("central-speculative"), slow)
    assert beside.devices > 1.1 * drafted.devices
    far = msgspec.structs.replace(slow, devices=(Kit("8", 400.0),))
    assert limit_of(system("central-speculative"), far) == beside


def test_the_papers_rows_have_one_class_and_no_changes() -> None:
    with pytest.raises(ConfigError, match="2 classes of users"):
        capacity(load_scenario("mixed"), "central-paper")
    of_one = capacity(load_scenario("mixed").at_rate(8.0), "central-paper")
    assert of_one.capacity == paper_capacity("a100-qwen3-32b", "central", 8.0)
    with pytest.raises(ConfigError, match="leave out the changes"):
        capacity(load_scenario("a100-qwen3-32b"), "sled-paper,slots=3")


def test_an_unknown_policy_is_told_all_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'foo'") as raised:
        capacity(load_scenario("a100-qwen3-32b"), "foo")
    shown = CliRunner().invoke(app, ["capacity", "--help"], env={"COLUMNS": "400"}).output
    for name in (*SYSTEMS, *PAPER_MODELS):
        assert name in str(raised.value)
        assert name in shown
    assert all(name in SYSTEM_HELP for name in SYSTEMS)


# --- commands


@pytest.mark.parametrize("option", ["--system", "--policy"])
def test_runs_are_under_the_scenarios_seed_and_a_system_is_a_policy(option: str, tmp_path: Path) -> None:
    name = written(tmp_path, PLAIN + "seeds = [7, 8]\n" + SLO)
    for more, seed in (([], 7), (["--seed", "3"], 3)):
        found = CliRunner().invoke(app, ["simulate", name, option, "central", "--json", *more])
        data = json.loads(found.stdout)
        assert (data["seed"], data["system"]) == (seed, "central")


def test_a_search_is_over_the_scenarios_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def noted(*given: object, seeds: list[int], **more: object) -> None:
        asked.append(list(seeds))
        raise ConfigError("enough")

    monkeypatch.setattr(commands, "capacity", noted)
    name = written(tmp_path, PLAIN + "seeds = [7, 8]\n" + SLO)
    for more in ([], ["--seeds", "3"]):
        CliRunner().invoke(app, ["capacity", name, "--jobs", "1", *more])
    assert asked == [[7, 8], [1, 2, 3]]


def test_a_fleet_takes_a_policy_and_the_scenarios_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def noted(scenario: object, of: object, seed: int, *more: object) -> None:
        asked.append((of.name, seed))  # type: ignore[attr-defined]
        raise ConfigError("enough")

    monkeypatch.setattr(fleet, "_one", noted)
    name = written(tmp_path, PLAIN + "seeds = [7, 8]\n" + SLO)
    CliRunner().invoke(app, ["fleet", name, "--policy", "paper"])
    assert asked == [("paper", 7)]


def test_a_switch_is_yes_or_no() -> None:
    assert system("wisp,ahead=no").ahead is False
    assert system("paper,ahead=yes").ahead is True
    with pytest.raises(ConfigError, match="give ahead=yes or ahead=no"):
        system("wisp,ahead=maybe")


def test_folders_are_made_before_the_run_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = written(tmp_path, PLAIN + SLO)
    trace = tmp_path / "new" / "folder" / "run.json"
    found = CliRunner().invoke(app, ["simulate", name, "--json", "--chrome-trace", str(trace)])
    assert found.exit_code == 0, found.output
    assert trace.is_file()
    monkeypatch.setattr(commands, "Simulation", None)  # nothing runs
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run.json", tmp_path / "new"):
        refused = CliRunner().invoke(app, ["simulate", name, "--chrome-trace", str(path)])
        assert isinstance(refused.exception, ConfigError)
        assert f"cannot write {path}" in str(refused.exception)


# --- a fleet's verifier


def test_a_broken_connection_is_told_with_the_verifiers_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alive:
        def poll(self) -> None:
            return None

    log = tmp_path / "verifier.log"
    log.write_text("why it went\n")
    child = Child("verifier", "http://127.0.0.1:9", Alive(), log)  # type: ignore[arg-type]

    class Started:
        def __enter__(self) -> Child:
            return child

        def __exit__(self, *error: object) -> None: ...

    async def broken(*given: object, **more: object) -> None:
        raise UnavailableError("the verifier closed a connection: 1011")

    monkeypatch.setattr(fleet, "verifier", lambda scenario, of: Started())
    monkeypatch.setattr(fleet, "run_live", broken)
    with pytest.raises(
        ChildError, match=r"closed a connection: 1011\. Its log \(.*verifier\.log\) ends:\n.*why it went"
    ):
        fleet._one(load_one(), system("wisp"), 1, "", lambda now, text: None)
    with pytest.raises(UnavailableError):
        fleet._one(load_one(), system("wisp"), 1, "http://127.0.0.1:9", lambda now, text: None)


def test_scripts_are_there_before_any_device_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Made:
        def __init__(self, url: str, key: str | None) -> None: ...

        async def connect(self, n: int) -> Welcome:
            done.append(f"connect {n}")
            if n > 1:
                raise UnavailableError("enough")
            return None  # type: ignore[return-value]

        async def close(self) -> None:
            done.append("close")

    monkeypatch.setattr(fleet, "Sockets", Made)
    monkeypatch.setattr(fleet, "_as_served", lambda welcome, scenario, url: scenario)
    monkeypatch.setattr(fleet, "scripts_of", lambda scenario: done.append("scripts"))
    with pytest.raises(UnavailableError):
        asyncio.run(fleet.run_live(load_one(), system("wisp"), 1, "http://127.0.0.1:9"))
    assert done == ["connect 1", "close", "scripts", "connect 50", "close"]
