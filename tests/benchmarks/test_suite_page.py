"""The page of the suite: made of what `wisp sim compare` found, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from benchmarks import suite
from benchmarks.pages import remade
from wisp.core.errors import ConfigError
from wisp.sim.compare import command
from wisp.sim.compare.cell import Extent
from wisp.sim.compare.results import read
from wisp.sim.compare.suite import Cell
from wisp.sim.scenario import load_scenario

SMALL = msgspec.structs.replace(load_scenario("mixed").with_devices(2), output_tokens=(10, 20))


def test_a_page_says_what_failed_and_is_made_anew_from_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "QUICK", Extent((1, 2), 3, (9,), 2, True))
    monkeypatch.setattr(suite, "load_suite", lambda: [Cell("two-devices", SMALL)])
    suite.run_suite(tmp_path, quick=True, jobs=1, as_json=False)
    page = (tmp_path / "suite.md").read_text()
    data = json.loads((tmp_path / "suite.json").read_text())
    assert "`python -m benchmarks suite --quick`" in page
    assert "A quick run" in page
    assert f"**{1 - len(data['failing'])} of 1 cells pass.**" in page
    assert "| two-devices | a100-qwen3-32b@1.3; 6, 16 tokens/s; 2 devices; prompts 60 to 200;" in page
    assert "central-wisp" in page
    assert page == remade("suite", tmp_path)
    found = read(tmp_path / "suite.json")
    assert found is not None
    monkeypatch.setattr(command, "measure", None)  # nothing is left to do
    suite.run_suite(tmp_path, quick=True, jobs=1, as_json=False)
    assert (tmp_path / "suite.md").read_text() == page


def test_a_page_without_wisp_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for systems in ("paper", "wisp,ahead=no"):
        with pytest.raises(ConfigError, match="name it, as it is"):
            suite.run_suite(tmp_path, quick=True, systems=systems, jobs=1, as_json=False)
