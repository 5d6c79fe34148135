"""What deploy/ holds is well-formed, runs commands that there are, and leaves the time that a drain takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command

from wisp.cli import app

DEPLOY = Path(__file__).parent.parent / "deploy"
DRAIN_S = 30  # the default of --drain-s
VERIFIERS = ("verifier-cpu.yaml", "verifier-gpu.yaml")


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


def accepted(words: list[str]) -> dict[str, Any]:
    """The options of a `wisp` command. Raises click's UsageError for one that there is not."""
    group: Any = get_command(app)
    while words[0] == "--config":
        words = words[2:]
    return group.commands[words[0]].make_context(words[0], words[1:]).params  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", sorted(p.relative_to(DEPLOY).as_posix() for p in DEPLOY.rglob("*.y*ml")))
def test_every_file_is_yaml(path: str) -> None:
    assert all(documents(path))


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_are_made_of_files_that_there_are(name: str) -> None:
    root, left_out = DEPLOY.parent, (DEPLOY.parent / ".dockerignore").read_text().split()
    copied = [
        line.split()[1:-1] for line in (DEPLOY / name).read_text().splitlines() if line.startswith("COPY ")
    ]
    sources = [source for words in copied if not words[0].startswith("--from") for source in words]
    assert "." in sources
    for source in sources:
        assert (root / source).exists()
        assert Path(source).parts[:1] not in [(part,) for part in left_out]
    # what the package is built from
    assert not {"pyproject.toml", "README.md", "LICENSE", "src", "data"} & set(left_out)


def test_the_cuda_image_has_the_vllm_that_wisp_fits() -> None:
    (version,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", (DEPLOY / "Dockerfile.cuda").read_text(), re.M)
    extras = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = [Requirement(line) for line in extras["vllm"] if line.startswith("vllm")]
    assert version in wanted.specifier


@pytest.mark.parametrize("path", VERIFIERS)
def test_pods_drain_and_run_as_nobody_in_particular(path: str) -> None:
    (deployment,) = documents(f"kubernetes/{path}")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = accepted(container["args"])
    assert options["host"] == "0.0.0.0"
    assert options["api_keys"] is not None
    assert pod["terminationGracePeriodSeconds"] > options["drain_s"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (path == "verifier-gpu.yaml")
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_compose_file_runs_the_image_of_this_repository() -> None:
    (compose,) = documents("compose.yaml")
    verifier = compose["services"]["verifier"]
    words = [word.replace("${WISP_TARGET:-tiny-target}", "tiny-target") for word in verifier["command"]]
    assert accepted(words)["target"] == "tiny-target"
    assert (DEPLOY.parent / verifier["build"]["dockerfile"]).is_file()
    assert int(verifier["stop_grace_period"].removesuffix("s")) > DRAIN_S
    named = {volume.split(":")[0] for s in compose["services"].values() for volume in s["volumes"]}
    assert {n for n in named if not n.startswith(".")} == set(compose["volumes"])
    assert all((DEPLOY / n).is_dir() for n in named if n.startswith("."))


# --- with other people's tools: `make test-deploy`


@pytest.mark.deploy
@pytest.mark.parametrize("version", ["1.28", "1.37"])
def test_kubernetes_knows_every_field_of_the_manifests(version: str) -> None:
    from kubernetes_validate import ValidationError, validate

    found = [
        d for p in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for d in documents(f"kubernetes/{p.name}")
    ]
    assert {d["kind"] for d in found} == {"Deployment", "PersistentVolumeClaim", "Service"}
    for document in found:
        assert validate(document, version, strict=True) == version
        with pytest.raises(ValidationError):
            validate(document | {"spek": {}}, version, strict=True)


def compose(**env: str) -> subprocess.CompletedProcess[str]:
    """What Compose makes of its file. Needs no daemon."""
    found = shutil.which("docker-compose")
    if found is None:
        pytest.skip("there is no docker-compose")
    clean = {k: v for k, v in os.environ.items() if k not in ("WISP_API_KEYS", "GRAFANA_PASSWORD")}
    command = [found, "--file", str(DEPLOY / "compose.yaml"), "config"]
    return subprocess.run(command, env=clean | env, capture_output=True, text=True, check=False)


@pytest.mark.deploy
def test_compose_takes_its_file() -> None:
    done = compose(WISP_API_KEYS="one", GRAFANA_PASSWORD="two")
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert set(services) == {"verifier", "prometheus", "grafana"}
    assert services["verifier"]["environment"]["WISP_API_KEYS"] == "one"
    assert accepted(services["verifier"]["command"])["host"] == "0.0.0.0"
    assert all(port.startswith("127.0.0.1:") for s in services.values() for port in s["ports"])


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("given", "missing"),
    [({"GRAFANA_PASSWORD": "two"}, "WISP_API_KEYS"), ({"WISP_API_KEYS": "one"}, "GRAFANA_PASSWORD")],
)
def test_compose_asks_for_secrets(given: dict[str, str], missing: str) -> None:
    done = compose(**given)
    assert done.returncode != 0
    assert f"set {missing}" in done.stderr


@pytest.mark.deploy
@pytest.mark.parametrize("unit", ["serve", "router", "edge"])
def test_systemd_knows_every_line_of_the_units(unit: str, tmp_path: Path) -> None:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("there is no systemd-analyze")

    def said(text: str) -> list[str]:
        (path := tmp_path / f"wisp-{unit}.service").write_text(
            text.replace("/opt/wisp/bin/wisp", "/bin/true")
        )
        done = subprocess.run([found, "verify", str(path)], capture_output=True, text=True, check=False)
        return [line for line in done.stderr.splitlines() if path.name in line]

    text = (DEPLOY / "systemd" / f"wisp-{unit}.service").read_text()
    assert said(text) == []
    assert said(text.replace("NoNewPrivileges", "NoNewPrivilegs"))


@pytest.mark.parametrize("unit", ["serve", "router", "edge"])
def test_units_run_commands_that_there_are(unit: str) -> None:
    lines = dict(
        line.split("=", 1)
        for line in (DEPLOY / "systemd" / f"wisp-{unit}.service").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    words = shlex.split(lines["ExecStart"])[1:]
    command = words[2]
    given = tomllib.loads((DEPLOY / "systemd" / "wisp.toml").read_text())[command]
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    accepted([*words, *flags])
    assert int(lines["TimeoutStopSec"]) > (DRAIN_S if command == "serve" else 0)


def test_dashboards_are_json_that_grafana_takes() -> None:
    boards = [json.loads(p.read_text()) for p in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))]
    assert [b["uid"] for b in boards] == ["wisp-edge", "wisp-router", "wisp-server"]
