"""`wisp pull`: the catalogue, and a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from wisp.check.catalogue import list_models, pull_model
from wisp.engines.models import PAIRS, catalogue


def test_the_catalogue_as_json_names_every_model_and_pair(capsys: pytest.CaptureFixture[str]) -> None:
    list_models(as_json=True)
    about = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in about["models"]] == [card.name for card in catalogue()]
    assert {name: (p["target"], p["draft"]) for name, p in about["pairs"].items()} == PAIRS
    by_name = {m["name"]: m for m in about["models"]}
    assert by_name["qwen2.5-coder-0.5b"]["roles"] == ["draft of qwen2.5-coder"]


def test_the_table_says_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = next(c for c in catalogue() if c.name == "smollm2-135m")
    monkeypatch.setenv("WISP_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    with (tmp_path / "models" / card.file).open("wb") as file:
        file.truncate(card.size)
    list_models(as_json=False)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert " yes" in lines["smollm2-135m"]
    assert " no" in lines["qwen2.5-coder-1.5b"]


def test_pulling_a_file_tells_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    pull_model(str(path), offline=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "name": str(path),
        "path": str(path),
        "bytes": 1004,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_a_stale_stamp_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF" + bytes(10))
    stamp = {"size": 14, "mtime_ns": path.stat().st_mtime_ns - 1, "sha256": "0" * 64}
    path.with_name("some.gguf.sha256").write_text(json.dumps(stamp))
    pull_model(str(path), offline=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
