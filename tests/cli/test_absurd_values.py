"""Whatever the command line, the configuration or the surroundings say: a message that helps, and never a traceback."""

from __future__ import annotations

import functools
import io
import os
import socket
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from wisp import cli
from wisp.api import process
from wisp.cli.config import configure
from wisp.core.errors import ConfigError
from wisp.edge import link
from wisp.engines.build import served_name

Wisp = Callable[..., tuple[int, str]]


def numbers(command: Callable[..., Any]) -> list[str]:
    """The options of a command that are numbers."""
    hints = typing.get_type_hints(command)
    return [
        f"--{n.replace('_', '-')}"
        for n, hint in hints.items()
        if hint in (int, float, int | None, float | None)
    ]


OPTIONS = [
    (info.name or info.callback.__name__.replace("_", "-"), option)
    for info in cli.app.registered_commands
    if info.callback is not None
    for option in numbers(info.callback)
]


@pytest.fixture
def wisp(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Wisp:
    """Runs a command to its end, or to where it would serve. Gives its status and what it said."""

    async def serve(server: object, sockets: object = None) -> None:
        raise ConfigError("it would serve")

    monkeypatch.setattr(process._Server, "serve", serve)
    defaults = link.VerifierLink.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "give_up_s", 0.0)  # for `wisp generate`
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WISP_OFFLINE", "1")
    (tmp_path / "cache").mkdir()
    (tmp_path / "p.jsonl").write_text('{"id": "a", "domain": "chat", "split": "train", "text": "Hi"}\n')
    (tmp_path / "keys.toml").write_text('[keys.a]\nsecret = "a"\n')
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(typer.main, "get_command", GET_COMMAND)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["paper", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        seen = capfd.readouterr()
        assert "Traceback" not in seen.out + seen.err
        return ended.value.code, seen.out + seen.err

    return run


GET_COMMAND = functools.cache(typer.main.get_command)  # a tenth of a second for each
SERVE = ("serve", "--engine", "null", "--target", "null", "--port", "0")
TARGET = ("serve", "--port", "0", "--target")
EDGE = ("edge", "--draft", "none", "--port", "0")
GENERATE = ("generate", "Hi", "--server", "http://127.0.0.1:9")
NOWHERE = "/no/such/file"
CASES = [
    (("serve",), "--target"),
    (("serve", "--target", ""), "model"),
    ((*TARGET, NOWHERE), "no file"),
    ((*TARGET, "/"), "/ is a folder"),
    ((*TARGET, "cache"), "cache is a folder"),
    ((*TARGET, "a100-qwen3-32b"), "--engine emulated"),
    ((*TARGET, "tiny-targte"), "or tiny-draft? The catalogue"),
    ((*SERVE, "--threads", "100000"), "--threads"),
    ((*EDGE, "--threads", "100000"), "--threads"),
    ((*GENERATE, "--threads", "100000"), "--threads"),
    ((*SERVE, "--slots", "1e18"), "--slots"),
    ((*SERVE, "--batching", ""), "batching"),
    ((*SERVE, "--cost", NOWHERE), NOWHERE),
    ((*SERVE, "--cost", "/"), "/"),
    ((*SERVE, "--api-keys", "/"), "API keys"),
    ((*SERVE, "--slo-classes", "/"), "SLO classes"),
    ((*SERVE, "--tls-cert", NOWHERE, "--tls-key", NOWHERE), "TLS"),
    ((*SERVE, "--host", "192.0.2.1", "--api-keys", "keys.toml"), "mend --host"),
    ((*SERVE, "--allowed-hosts", "http://x"), "--allowed-hosts"),
    ((*SERVE, "--http-keep-alive-s", "0"), "--http-keep-alive-s"),
    ((*SERVE, "--host", "::", "--replicas", "2"), "API key"),
    ((*EDGE, "--drafting", ""), "drafting"),
    ((*EDGE, "--predictor", "/"), "predictor"),
    ((*EDGE, "--server", "ftp://x"), "address"),
    ((*EDGE, "--energy", "nan"), "--energy"),
    ((*GENERATE, "--seed", "9" * 30), "--seed"),
    ((*GENERATE, "--top-k", "9" * 30), "--top-k"),
    ((*GENERATE, "--max-tokens", "9" * 30), "--max-tokens"),
    (GENERATE, "no verifier at"),
    (("replicas", "list", "--server", "http://127.0.0.1:9"), "cannot reach"),
    (("pull", "no-such-model"), "no model"),
    (("train", "--seed", "-1"), "--seed"),
    (("train", "--traces", NOWHERE), NOWHERE),
    (("train", "--out", "/"), "cannot write /: it is a folder"),
    (("check-faults", "--out", "/"), "cannot write /: it is a folder"),
    (("check-faults", "--resume", "/dev/null/x"), "cannot write /dev/null/x"),
    (("replay", "--traces", NOWHERE), NOWHERE),
    (("simulate", NOWHERE), NOWHERE),
    (("simulate", "/"), "/"),
    (("simulate", "mixed", "--plot", "picture.gguf"), "png"),
    (("simulate", "mixed", "--chrome-trace", "/dev/null/x"), "/dev/null/x"),
    (("capacity", "mixed", "--jobs", "9" * 20), "--jobs"),
    (("plan", "--hardware", "", "--devices", "1", "--device", "1", "--rate", "1"), "hardware"),
    (("profile", "--draft", "tiny-draft", "--out", "x.json"), "--out"),
    (("profile", "--target", "tiny-target", "--out", "/"), "cannot write /: it is a folder"),
    (("profile", "--target", "tiny-target", "--out", "/dev/null/x"), "cannot write /dev/null/x"),
    (("trace", "--target", "", "--draft", "", "--prompts", "p.jsonl", "--out", "p.jsonl"), "it is a file"),
    (("sim", "compare", "--scenario-files", "p.jsonl"), "cannot write into p.jsonl: it is a file"),
    (("no-such-command",), "no-such-command"),
    (("--config", NOWHERE, "serve"), NOWHERE),
    (("--config", "/", "serve"), "/"),
]


@pytest.mark.parametrize(("arguments", "advice"), CASES, ids=[" ".join(c[0])[:60] for c in CASES])
def test_absurd_values_end_with_status_2_and_advice(
    wisp: Wisp, arguments: tuple[str, ...], advice: str
) -> None:
    status, said = wisp(*arguments)
    assert status == 2
    assert advice in said


@pytest.mark.parametrize(
    "command", [("serve", "--target", "qwen2.5-coder-1.5b"), ("edge",)], ids=lambda c: c[0]
)
def test_a_port_that_is_taken_is_said_before_a_model_is_fetched_or_a_verifier_waited_for(
    wisp: Wisp, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    def slow(*args: object, **named: object) -> None:
        raise AssertionError("the port first")

    monkeypatch.setattr("wisp.engines.build.fetch_target", slow)
    monkeypatch.setattr("wisp.edge.finding.find_drafter", slow)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, said = wisp(*command, "--port", str(taken.getsockname()[1]))
    assert status == 2
    assert "it is taken; choose another with --port" in said


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=[" ".join(o) for o in OPTIONS])
def test_an_option_that_wants_a_number_is_given_none(wisp: Wisp, command: str, option: str) -> None:
    for value in ("", "seven", "1e", "[1]"):
        status, said = wisp(command, option, value)
        assert status == 2
        assert option in said


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("[serve", "cannot read"),
        ("[serve]\nthreads = 'many'", "--threads"),
        ("[serve]\nport = [1]", "--port"),
        ("[serve]\nsuch = 1", "has no such"),
        ("serve = 1", "not a command"),
        ("[replicas]\nserver = 1", "tables are named replicas.drain"),
        ("[serve]\napi_keys = 1", "--api-keys"),
        ("[serve]\nslo_classes = 5", "[serve] --slo-classes takes a string or tables, not 5"),
        ("[serve]\nslo_classes = []", "--slo-classes takes a string or tables, not a list"),
        ("[edge]\ndraft = ['a', 'b']", "[edge] --draft takes a string, not a list"),
        ("[edge]\nserver = {url = 'x'}", "--server takes a string, not a table"),
        ("[edge]\nserved_model_name = [['a']]", "--served-model-name takes a string, not a list"),
        ("[serve]\nport = true", "--port takes an integer, not true"),
        ("[serve]\nport = 1.5", "--port takes an integer, not 1.5"),
        ("[serve]\ndrain_s = false", "--drain-s takes a number, not false"),
        ("[serve]\noffline = 1", "--offline takes true or false, not 1"),
        ("[serve]\nhost = 2026-01-01", "--host takes a string, not 2026-01-01"),
        ("[sim.run]\nplot = 5", "[sim.run] --plot takes a string, not 5"),
    ],
)
def test_a_configuration_of_the_wrong_types_is_explained(
    wisp: Wisp, tmp_path: Path, text: str, advice: str
) -> None:
    path = tmp_path / "wisp.toml"
    path.write_text(text)
    status, said = wisp("--config", str(path), *SERVE[:5])
    assert status == 2
    assert advice in said


def test_lists_in_a_configuration_are_what_a_comma_separates(tmp_path: Path) -> None:
    path = tmp_path / "wisp.toml"
    path.write_text(
        "[edge]\nserved-model-name = ['fast', 'gpt-4o']\ncors_origins = []\ntensor_split = [3, 1.5]\nahead = false\n"
        "[edge.slo_classes.fast]\ntpot_ms = 60\n[sim.compare]\nscenarios = ['mixed']\n[serve]\ngpu_layers = 3\n"
    )
    group = GET_COMMAND(cli.app)
    context = typer.Context(group)
    configure(context, path)
    found = context.default_map
    assert found is not None
    assert found["edge"] == {
        "served_model_name": "fast,gpt-4o", "cors_origins": "", "tensor_split": "3,1.5", "ahead": False,
        "slo_classes": {"fast": {"tpot_ms": 60}},
    }  # fmt: skip
    assert found["sim"] == {"compare": {"scenarios": ["mixed"]}}
    assert found["serve"] == {"gpu_layers": 3}


def test_a_file_whose_name_is_no_utf8_is_served_under_a_name_that_is(wisp: Wisp, tmp_path: Path) -> None:
    name = os.fsdecode(b"mod\xe9l.gguf")
    assert served_name(str(tmp_path / name)).encode() == b"mod?l"
    status, said = wisp(*TARGET, str(tmp_path / name))
    assert status == 2
    assert "no" in said


def test_a_model_that_may_not_be_read_is_not_called_no_model(
    wisp: Wisp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(os, "access", lambda file, mode: file != path)  # root may read anything
    status, said = wisp(*TARGET, str(path))
    assert status == 2
    assert "may not be read" in said


def test_a_terminal_without_the_characters_of_the_answer_is_shown_others(
    wisp: Wisp, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("wisp.check.catalogue.list_models", lambda *, as_json: print("é"))
    wisp("pull")
    sys.stdout.flush()
    assert written.getvalue() == b"?\n"


def test_closed_streams_lead_nowhere(wisp: Wisp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert wisp("generate", "-", *GENERATE[2:])[0] == 2
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_text_that_is_no_utf8_is_said_before_anything_is_asked(
    wisp: Wisp, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    rest = GENERATE[2:]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding=encoding))
    assert "standard input is no UTF-8" in wisp("generate", "-", *rest)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("café".encode()), encoding=encoding))
    assert "no verifier at" in wisp("generate", "-", *rest)[1]
    assert "the prompt is no UTF-8" in wisp("generate", os.fsdecode(b"caf\xe9"), *rest)[1]
    assert "--system is no UTF-8" in wisp(*GENERATE, "--system", os.fsdecode(b"caf\xe9"))[1]


def test_a_full_disk_is_said_in_a_line(wisp: Wisp, monkeypatch: pytest.MonkeyPatch) -> None:
    full = io.FileIO("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(full)))
    monkeypatch.setattr("wisp.check.catalogue.list_models", lambda *, as_json: print("x" * 100_000))
    status, said = wisp("pull")
    assert status == 1
    assert said.startswith("wisp: ")
    assert "No space left" in said
    full.close()
