"""What `make audit` makes of what its tools say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.audit import BASE, main


def tools(folder: Path, audit: str, status: int) -> Path:
    """Programs that say this."""
    (folder / "said").write_text(audit)
    sbom = json.dumps({"bomFormat": "CycloneDX", "components": [{}, {}]})
    for name, does in (
        ("pip-audit", f"cat {folder}/said; echo cannot reach anyone >&2; exit {status}"),
        ("cyclonedx-py", f"while [ $1 != -o ]; do shift; done; echo '{sbom}' > $2"),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return folder


def audited(folder: Path, audit: str, status: int) -> int:
    return main(["--bin", str(tools(folder, audit, status)), "--sbom", str(folder / "out" / "sbom.json")])


def test_a_known_vulnerability_fails_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vulnerable = {
        "name": "left",
        "version": "1.0",
        "vulns": [{"id": "CVE-1", "fix_versions": ["1.1", "2.0"]}],
    }
    fine = {"name": "right", "version": "1.0", "vulns": []}
    assert audited(tmp_path, json.dumps({"dependencies": [vulnerable, fine]}), 1) == 1
    said = capsys.readouterr().out
    assert "left 1.0: CVE-1, mended in 1.1, 2.0" in said
    assert "1 known vulnerabilities" in said
    assert "sbom.json: 2 packages" in said


def test_none_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        audited(tmp_path, json.dumps({"dependencies": [{"name": "right", "version": "1.0", "vulns": []}]}), 0)
        == 0
    )
    assert "0 known vulnerabilities" in capsys.readouterr().out


def test_where_nobody_can_be_asked_that_is_said_and_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audited(tmp_path, "", 1) == 0
    assert (
        "NOT CHECKED, as the database of advisories could not be asked: cannot reach anyone"
        in capsys.readouterr().out
    )


def test_a_package_that_the_database_does_not_know_was_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = {"name": "new", "skip_reason": "Dependency not found"}
    fine = {"name": "right", "version": "1.0", "vulns": []}
    assert audited(tmp_path, json.dumps({"dependencies": [unknown]}), 0) == 0
    said = capsys.readouterr().out
    assert "NOT CHECKED, as the database of advisories knows none of its 1 packages" in said
    assert "known vulnerabilities" not in said
    assert audited(tmp_path, json.dumps({"dependencies": [unknown, fine]}), 0) == 0
    said = capsys.readouterr().out
    assert "NOT CHECKED, as the database of advisories does not know them: new" in said
    assert "0 known vulnerabilities" in said


def test_the_files_that_are_looked_at_exist() -> None:
    assert BASE.is_file()
    command = next(line for line in Path("Makefile").read_text().splitlines() if "tools.audit" in line)
    _, _, files = command.partition("--requirements ")
    named = files.partition(" --")[0].split()
    assert len(named) >= 2
    assert all(Path(name).is_file() for name in named)
