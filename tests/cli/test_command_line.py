"""`wisp` as a whole: its groups of commands, tables and variables for them, and the names of earlier releases."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from wisp.cli import app
from wisp.cli.device import usual_history
from wisp.cli.help import PANEL_OF, PANELS, SERVERS
from wisp.core.errors import ConfigError
from wisp.core.verify.batching import batching_policy
from wisp.engines.both import NgramThenModel
from wisp.engines.ngram import NgramDraft
from wisp.router import command as router
from wisp.sim import commands, fleet
from wisp.sim.compare import command as compared
from wisp.sim.systems import system

SMALL = """
title = "small"
hardware = "a100-qwen3-32b"
devices_n = 3
warmup_s = 1.0
window_s = 2.0
seeds = [1]
[[slo]]
rate = 8.0
"""
NOW_OURS = "`wisp` is now the system of this project"


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def wisp(*words: str, **variables: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", **variables})


def seed_and_system(result: Result) -> tuple[int, str]:
    """Of a simulated run that was printed as JSON, and nothing else."""
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    return found["seed"], found["system"]


# --- groups


def test_help_lists_the_commands_in_groups_and_no_old_name() -> None:
    shown = wisp("--help").stdout
    groups: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if title := re.match(r"╭─ (\w+) ─", line):
            groups[title[1]] = []
        elif command := re.match(r"│ ([a-z][a-z-]+) ", line):
            groups[list(groups)[-1]].append(command[1])
    assert groups == {
        "Options": [],
        "Serve": ["serve", "edge", "replicas"],
        "Try": ["demo", "generate", "pull", "doctor"],
        "Measure": ["plan", "profile", "trace", "train"],
        "Check": ["check-lossless", "check-faults"],
        "Research": ["sim"],
    }


def test_no_help_mentions_an_old_name() -> None:
    for words in (["serve"], *(["sim", of] for of in ("run", "fleet", "capacity", "compare", "replay"))):
        shown = wisp(*words, "--help")
        assert shown.exit_code == 0
        assert not re.search(r"laxity|\bours\b|forecast|\bfront\b|--out .*page", shown.stdout), words


def test_a_server_has_its_options_in_panels_and_help_says_the_rule_for_variables_once() -> None:
    shown = wisp("serve", "--help").stdout
    panels = re.findall(r"╭─ ([\w ]+?) ─", shown)
    assert set(panels) == {"Options", *PANELS}
    assert "[env var" not in shown
    assert "WISP_SERVE_TARGET for --target" in shown
    for words in (["sim", "run"], ["replicas", "drain"], ["check-lossless"]):
        assert f"WISP_{'_'.join(words).upper().replace('-', '_')}_" in wisp(*words, "--help").stdout


def test_every_option_in_a_panel_is_one_of_a_servers() -> None:
    known: Any = get_command(app)
    options = {p.name for name in SERVERS for p in known.commands[name].params}
    assert PANEL_OF.keys() <= options


def test_a_version_in_the_environment_is_not_asked_for() -> None:
    result = wisp("pull", "--json", WISP_VERSION="0.2.0", WISP_SHOW_COMPLETION="bash")
    assert result.exit_code == 0
    assert "models" in json.loads(result.stdout)


# --- names of earlier releases


def test_only_an_edge_without_a_model_keeps_earlier_answers_by_default() -> None:
    assert usual_history(NgramDraft().name) > 0
    for name in ("qwen3-0.6b", NgramThenModel(NgramDraft(), NgramDraft()).name, "none"):
        assert usual_history(name) == 0


def test_log_json_is_a_format_now() -> None:
    for words in (["serve", "--target", "tiny-target"], ["edge"]):
        result = wisp(*words, "--log-json", "--log-level", "loud")
        assert "`--log-json` is now called `--log-format json`" in result.stderr
        assert "unknown log level 'loud'" in str(result.exception)
        assert "--log-json" not in wisp(words[0], "--help").stdout


@pytest.mark.parametrize("old", ["simulate", "capacity", "fleet", "replay"])
def test_an_old_command_has_the_options_of_the_new_one(old: str) -> None:
    known: Any = get_command(app)
    new = known.commands["sim"].commands[{"simulate": "run"}.get(old, old)]
    assert known.commands[old].hidden
    options, same = ([(p.name, p.opts, p.default) for p in c.params] for c in (known.commands[old], new))
    assert options == same
    assert ("json", ["--json"], False) in options


def test_an_old_command_does_the_same_and_says_what_it_is_called_now(small: str) -> None:
    old, new = wisp("simulate", small, "--json"), wisp("sim", "run", small, "--json")
    assert seed_and_system(old) == (1, "wisp")
    assert old.stdout == new.stdout
    assert "`wisp simulate` is now called `wisp sim run`" in old.stderr
    assert "note" not in new.stderr


@pytest.mark.parametrize(
    ("given", "name", "notes"),
    [
        ("ours", "wisp", ["`ours` is now called `wisp`"]),
        ("wisp", "wisp", [NOW_OURS]),
        ("ours,batching=laxity:keep", "wisp,batching=wisp:keep", ["`ours` is", "`laxity` is"]),
        ("paper", "paper", []),
        ("central,batching=wisp", "central,batching=wisp", [NOW_OURS]),
    ],
)
def test_a_system_that_was_called_otherwise_is_noted_on_stderr(
    small: str, given: str, name: str, notes: list[str]
) -> None:
    for result in (
        wisp("sim", "run", small, "--policy", given, "--json"),
        wisp("sim", "run", small, "--json", WISP_SIM_RUN_SYSTEM=given),
    ):
        assert seed_and_system(result) == (1, name)
        assert result.stderr.count("note") == len(notes)
        for note in notes:
            assert note in result.stderr


def test_policies_to_compare_are_noted_once_each(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(scenario: object, of: Any, *more: object) -> None:
        asked.append(of.batching)
        raise ConfigError("enough")

    monkeypatch.setattr(fleet, "_one", noted)
    result = wisp("sim", "fleet", small, "--system", "wisp", "--policies", "laxity,wisp")
    assert asked == ["wisp"]
    assert result.stderr.count(NOW_OURS) == 1
    assert result.stderr.count("`laxity` is now called `wisp`") == 1


def test_a_search_takes_the_old_name(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(scenario: object, policy: str, **more: object) -> None:
        asked.append(policy)
        raise ConfigError("enough")

    monkeypatch.setattr(commands, "capacity", noted)
    result = wisp("sim", "capacity", small, "--policy", "ours", "--jobs", "1")
    assert asked == ["wisp"]
    assert "`ours` is now called `wisp`" in result.stderr


def test_systems_to_compare_take_the_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(scenarios: list[str], *, systems: str, **more: object) -> int:
        asked.append(systems)
        return 0

    monkeypatch.setattr(compared, "run_compare", noted)
    result = wisp("sim", "compare", "--systems", "ours,ahead=no,paper")
    assert asked == ["wisp,ahead=no,paper"]
    assert "`ours` is now called `wisp`" in result.stderr
    assert "note" not in wisp("sim", "compare").stderr


@pytest.mark.parametrize(
    ("words", "variables", "found", "note"),
    [
        ([], {}, ("wisp", True), ""),
        (["--no-slo-admission"], {}, ("wisp", False), ""),
        (["--no-forecast"], {}, ("wisp", False), "`--no-slo-admission`"),
        (["--forecast"], {}, ("wisp", True), "`--slo-admission`"),
        ([], {"WISP_SERVE_FORECAST": "false"}, ("wisp", False), "`--no-slo-admission`"),
        (["--batching", "laxity"], {}, ("wisp", True), "`laxity` is now called `wisp`"),
        (["--batching", "wisp"], {}, ("wisp", True), NOW_OURS),
        (["--batching", "paper"], {}, ("paper", True), ""),
    ],
)
def test_a_server_understands_the_old_names(
    words: list[str],
    variables: dict[str, str],
    found: tuple[str, bool],
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, bool]] = []

    def noted(spec: Any, *more: object) -> None:
        asked.append((spec.settings.batching, spec.settings.slo_admission))

    monkeypatch.setattr(router, "serve_replicas", noted)
    serve = ("serve", "--target", "null", "--engine", "null", "--port", "0", "--replicas", "2")
    result = wisp(*serve, *words, **variables)
    assert result.exit_code == 0, result.output
    assert asked == [found]
    assert (note in result.stderr) if note else ("note" not in result.stderr)


def test_an_event_log_and_python_may_have_the_old_names() -> None:
    assert batching_policy("laxity").name == batching_policy("wisp").name == "wisp"
    assert batching_policy("laxity:keep").preempts is False
    assert (system("ours").name, system("ours,ahead=no").name) == ("wisp", "wisp,ahead=no")
    for listed in (lambda: batching_policy("nope"), lambda: system("nope")):
        with pytest.raises(ConfigError) as refused:
            listed()
        assert not re.search("ours|laxity", str(refused.value))


def test_the_page_of_a_replay_is_refused_with_what_writes_it_now(tmp_path: Path) -> None:
    refused = wisp("replay", "--out", str(tmp_path))
    assert isinstance(refused.exception, ConfigError)
    assert "python -m benchmarks drafting --out" in str(refused.exception)


# --- tables and variables


def test_a_table_for_each_command_also_in_a_group_and_by_an_old_name(small: str, tmp_path: Path) -> None:
    config = tmp_path / "wisp.toml"
    config.write_text(
        '[simulate]\nseed = 5\n[sim.run]\nseed = 6\nsystem = "laxity"\n[replicas.list]\njson = true\n'
    )
    old = wisp("--config", str(config), "simulate", small, "--json")
    assert seed_and_system(old) == (5, "wisp")
    new = wisp("--config", str(config), "sim", "run", small, "--system", "paper", "--json")
    assert seed_and_system(new) == (6, "paper")


def test_a_variable_for_each_flag_also_in_a_group_and_by_an_old_name(small: str) -> None:
    variables = {"WISP_SIMULATE_SEED": "7", "WISP_SIM_RUN_SEED": "8"}
    assert seed_and_system(wisp("simulate", small, "--json", **variables)) == (7, "wisp")
    assert seed_and_system(wisp("sim", "run", small, "--json", **variables)) == (8, "wisp")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[sim.walk]\n", r"\[sim\.walk\] is not a command; tables are named sim\.capacity, .*sim\.run"),
        (
            "[bench-overhead]\n",
            r"\[bench-overhead\] is not a command; tables are named check-faults, check-lossless, demo",
        ),
        ("[sim.run]\nsed = 1\n", r"\[sim\.run\] has no sed; see wisp sim run --help"),
        ("[sim]\nrun = 1\n", r"\[sim\.run\] is not a command"),
        ("seed = 1\n", r"\[seed\] is not a command"),
    ],
)
def test_a_table_that_no_command_reads_is_refused(text: str, error: str, tmp_path: Path) -> None:
    config = tmp_path / "wisp.toml"
    config.write_text(text)
    refused = wisp("--config", str(config), "doctor")
    assert isinstance(refused.exception, ConfigError)
    assert re.search(error, str(refused.exception))
    assert "simulate" not in str(refused.exception)
