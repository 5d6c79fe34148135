"""The `ai` package of npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import MODEL

FOLDER = Path(__file__).parent / "js"


@pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("node", "npm")),
    reason="no Node.js with npm here: apt-get install nodejs npm (Debian's packages)",
)
def test_objects_and_tools(url: str) -> None:
    assert (FOLDER / "node_modules").is_dir(), "npm ci --prefix tests/clients/js"
    command = ["node", "ai.mjs", url, MODEL]
    told = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found == {
        "object": {"name": "Ada", "age": 36},
        "text": "It is sunny in Paris.",
        "asked": ["Paris"],
    }
