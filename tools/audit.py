"""Known vulnerabilities of what a release depends on, and the list of it all (SBOM, CycloneDX).

    python -m tools.audit --bin FOLDER [--requirements FILE ...] --sbom FILE

Exit status 1 if there are vulnerabilities. Where the database of advisories cannot be reached, that is said, and is no
failure: the next run may reach it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASE = Path("requirements/image.txt")  # what users get
TIMEOUT_S = 300


def main(arguments: Sequence[str] | None = None) -> int:
    about = argparse.ArgumentParser(prog="audit", description=__doc__)
    about.add_argument("--bin", type=Path, required=True, help="where pip-audit and cyclonedx-py are")
    about.add_argument(
        "--requirements", type=Path, nargs="+", default=[BASE], help="files with pins and hashes"
    )
    about.add_argument("--sbom", type=Path, required=True, help="file to write, of the first of them")
    given = about.parse_args(arguments)
    count = write_sbom(given.bin, given.requirements[0], given.sbom)
    print(f"{given.sbom}: {count} packages")
    worst = 0
    for file in given.requirements:
        found = vulnerabilities(given.bin, file)
        if found is None:
            continue
        for line in found:
            print(f"{file}: {line}")
        print(f"{file}: {len(found)} known vulnerabilities")
        worst = max(worst, bool(found))
    return worst


def write_sbom(tools: Path, requirements: Path, to: Path) -> int:
    """Returns the number of packages. Raises CalledProcessError."""
    to.parent.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [
        tools / "cyclonedx-py",
        "requirements",
        "--pyproject",
        "pyproject.toml",
        "--of",
        "JSON",
        "-o",
        to,
        requirements,
    ]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    packages: list[Any] = json.loads(to.read_text()).get("components", [])
    return len(packages)


def vulnerabilities(tools: Path, requirements: Path) -> list[str] | None:
    """One line for each; None, and a word on it, if nobody could be asked."""
    command: list[str | Path] = [
        tools / "pip-audit", "--requirement", requirements, "--require-hashes", "--disable-pip", "--format", "json",
        "--progress-spinner", "off",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        report: dict[str, Any] = json.loads(done.stdout)
    except (ValueError, subprocess.TimeoutExpired) as error:
        said = (
            done.stderr.strip().splitlines()[-1:]
            if not isinstance(error, subprocess.TimeoutExpired)
            else [str(error)]
        )
        print(
            f"{requirements}: NOT CHECKED, as the database of advisories could not be asked: {' '.join(said)}"
        )
        return None
    packages: list[Any] = report["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        print(
            f"{requirements}: NOT CHECKED, as the database of advisories knows none of its {len(packages)} packages"
        )
        return None
    if skipped:
        print(
            f"{requirements}: NOT CHECKED, as the database of advisories does not know them: {', '.join(skipped)}"
        )
    return [
        f"{package['name']} {package['version']}: {found['id']}, {_mended(found['fix_versions'])}"
        for package in packages
        for found in package.get("vulns", ())
    ]


def _mended(versions: Sequence[str]) -> str:
    return f"mended in {', '.join(versions)}" if versions else "mended in no release"


if __name__ == "__main__":
    sys.exit(main())
