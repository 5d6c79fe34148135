"""The doctor: what it says of this machine, and of broken ones."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from wisp.check import doctor
from wisp.check.doctor import engine, installed, machine, models, run_doctor
from wisp.check.doctor.check import Check
from wisp.engines.models import catalogue, is_cached


def test_here_everything_works(capsys: pytest.CaptureFixture[str]) -> None:
    status = run_doctor(offline=True, as_json=True)
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert {"Python", "packages", "memory", "disk", "llama.cpp", "C API", "exact mode", "model hub"} <= set(
        checks
    )
    assert all(check["status"] in ("ok", "warn", "fail") and check["finding"] for check in report["checks"])
    assert all((check["status"] == "ok") == (not check["remedy"]) for check in report["checks"])
    assert checks["llama.cpp"]["status"] == checks["packages"]["status"] == checks["Python"]["status"] == "ok"
    failed = [check for check in report["checks"] if check["status"] == "fail"]
    assert (status, report["ok"]) == ((1, False) if failed else (0, True))
    if is_cached("tiny-target") and is_cached("tiny-draft"):
        assert failed == []
        assert "bit for bit" in checks["exact mode"]["finding"]


def test_a_failure_is_shown_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Check("a", "ok", "fine"), Check("b", "fail", "broken", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda *, offline: found)
    assert run_doctor(offline=True, as_json=False) == 1
    shown = capsys.readouterr().out
    assert "-> mend it" in shown
    assert "1 failed, 0 with a warning, of 2 checks." in shown


def test_warnings_are_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *, offline: [Check("a", "warn", "hm", "look")])
    assert run_doctor(offline=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_a_library_for_another_cpu_fails_the_check_in_which_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -signal.SIGILL, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    [check] = engine.engine_checks()
    assert (check.name, check.status) == ("llama.cpp", "fail")
    assert "instructions that this CPU does not have" in check.finding


def test_an_abort_keeps_what_was_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"name": "llama.cpp", "status": "ok", "finding": "loads", "remedy": ""}\n'
    done = subprocess.CompletedProcess([], -signal.SIGABRT, stdout=line, stderr="GGML_ASSERT failed\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    first, second = engine.engine_checks()
    assert (first.name, first.status) == ("llama.cpp", "ok")
    assert (second.name, second.status) == ("C API", "fail")
    assert "SIGABRT" in second.finding
    assert "GGML_ASSERT" in second.finding


def test_spinning_threads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert machine.wait_policy().status == "warn"
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert machine.wait_policy().status == "ok"


def test_too_little_memory_is_told_for_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 10**9)
    check = machine.memory()
    assert check.status == "warn"
    assert "qwen2.5-coder" in check.finding
    assert "tiny" not in check.finding


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(machine, "_PORTS", {"wisp serve": taken.getsockname()[1]})
        assert machine.ports().status == "warn"
    assert machine.ports().status == "ok"


@pytest.mark.parametrize(
    ("name", "check", "does"),
    [
        ("llguidance", installed.grammars, "drafts without grammars"),
        ("uvloop", installed.event_loop, "asyncio's own loop"),
    ],
)
def test_optional_parts_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, name: str, check: Callable[[], Check], does: str
) -> None:
    """Neither has wheels for every platform."""
    there = importlib.metadata.version

    def version(distribution: str) -> str:
        if distribution == name:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return there(distribution)

    assert check().status == "ok"
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed.packages().status == "ok"
    assert (check().status, does in check().finding) == ("warn", True)


def test_a_grammar_library_that_is_a_placeholder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "available", lambda: False)
    assert (installed.packages().status, installed.grammars().status) == ("ok", "warn")


def test_a_full_disk_matters_only_while_models_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10, used=9, free=1)
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert machine.disk().status == "warn"
    monkeypatch.setattr(machine, "is_cached", lambda _: True)
    assert machine.disk().status == "ok"


def test_a_damaged_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = next(c for c in catalogue() if c.name == "smollm2-135m")
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))
    assert models.model_cached(card).status == "ok"  # not here: nothing wrong with that
    path = tmp_path / "models" / card.file
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    damaged = models.model_cached(card)
    assert (damaged.status, damaged.remedy) == ("warn", "wisp pull smollm2-135m")
    with path.open("wb") as file:
        file.truncate(card.size)
    assert "not checked" in models.model_cached(card).finding


def test_keys_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_API_KEYS", "sk-very-secret")
    check = machine.api_keys()
    assert "WISP_API_KEYS is set" in check.finding
    assert "secret" not in check.finding


def test_an_unreachable_hub_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WISP_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert models.hub_reachable(offline=False).status == "warn"
    assert models.hub_reachable(offline=True).finding == "not asked: offline"
