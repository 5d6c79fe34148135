"""A Prometheus scrapes verifier, edge and router: it takes the rules, and every query of the dashboards has data."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from harness import HTTP, Fleet, Peer, Process, ask, free_port, opening
from tools import monitoring
from waiting import eventually
from wisp.core.protocol.messages import Cancel

MISSING = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {' and '.join(MISSING)} here: apt-get install prometheus (Debian's package)",
    ),
]

DEPLOY = monitoring.ROOT / "deploy" / "prometheus"
MODEL = "toy"
NUMBERS = itertools.count()  # of sessions
TOY = """
about = "for tests"
parameters = 0.5
layers = 24
heads = 14
kv_heads = 2
head_dim = 64
bandwidth = 1000
tflops = 100
launch_ms = 1.0
kv_tokens = 20000
slots = 16
slot_tokens = 2048
"""
KEYS = """
[keys.operator]
secret = "operator-secret"
admin = true

[keys.limited]
secret = "limited-secret"
requests_per_minute = 1
"""
CLASSES = "[patient]\nttft_ms = 60000\ntpot_ms = 20000\n"


def test_promtool_takes_configuration_and_rules() -> None:
    for what in (
        ["rules", str(DEPLOY / "alerts.yml")],
        ["config", "--syntax-only", str(DEPLOY / "prometheus.yml")],
    ):
        done = subprocess.run(["promtool", "check", *what], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def prometheus(fleet: Fleet) -> Iterator[Callable[[dict[str, Process]], str]]:
    """Starts one that scrapes these processes, by job; the address of its API."""
    started: list[subprocess.Popen[bytes]] = []

    def start(jobs: dict[str, Process]) -> str:
        secret = fleet.folder / "operator"
        secret.write_text("operator-secret")
        lines = ["global: {scrape_interval: 1s, evaluation_interval: 1s}"]
        lines += [f"rule_files: [{json.dumps(str(DEPLOY / 'alerts.yml'))}]", "scrape_configs:"]
        for job, process in jobs.items():
            lines += [
                f"  - job_name: {job}",
                f"    authorization: {{credentials_file: {json.dumps(str(secret))}}}",
                f"    static_configs: [{{targets: ['127.0.0.1:{process.port}']}}]",
            ]
        config = fleet.folder / "prometheus.yml"
        config.write_text("\n".join(lines) + "\n")
        port = free_port()
        flags = [f"--config.file={config}", f"--storage.tsdb.path={fleet.folder / 'tsdb'}"]
        with (fleet.folder / "prometheus.log").open("wb") as log:
            command = ["prometheus", *flags, f"--web.listen-address=127.0.0.1:{port}"]
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        return f"http://127.0.0.1:{port}/api/v1"

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_every_query_of_the_dashboards_has_data(
    fleet: Fleet, prometheus: Callable[[dict[str, Process]], str]
) -> None:
    for name, text in (("toy.toml", TOY), ("keys.toml", KEYS), ("classes.toml", CLASSES)):
        (fleet.folder / name).write_text(text)
    keyed = (
        "--api-keys",
        str(fleet.folder / "keys.toml"),
        "--slo-classes",
        str(fleet.folder / "classes.toml"),
    )
    emulated: dict[str, Any] = {
        "target": str(fleet.folder / "toy.toml"),
        "engine": "emulated",
        "ready": False,
    }
    written = ("--traces", str(monitoring.ROOT / "data" / "traces"))  # text that repeats itself, for n-grams
    server = fleet.serve(*keyed, *written, **emulated)
    router = fleet.serve("--replicas", "2", *keyed, **emulated)
    devices: dict[str, Any] = {"draft": "ngram", "env": {"WISP_API_KEY": "operator-secret"}, "ready": False}
    edge, behind_router = (fleet.edge(p.url, *keyed, **devices) for p in (server, router))
    processes = {"Server": server, "Edge": edge, "Router": router}
    for process in (*processes.values(), behind_router):
        process.wait_ready()
    api = prometheus({f"wisp-{name.lower()}": process for name, process in processes.items()})

    def complete() -> bool:
        _traffic(server, edge, router, behind_router)
        missing = [query for name in processes for query in _queries(name) if not _has_data(api, query)]
        print("without data:", *missing, sep="\n  ")  # shown if the test fails
        return not missing

    eventually(lambda: _answers(api))
    eventually(complete)
    loaded = httpx.get(f"{api}/rules", **HTTP).json()["data"]["groups"]
    assert {rule["health"] for group in loaded for rule in group["rules"]} == {"ok"}
    assert sum(len(group["rules"]) for group in loaded) == len(monitoring.alerts(monitoring.PAGE.read_text()))
    server.kill()
    eventually(lambda: "WispDown" in _alerting(api))


def _traffic(server: Process, edge: Process, router: Process, behind_router: Process) -> None:
    """Some of everything that is counted once it happens."""
    for process in (server, edge, router, behind_router):
        ask(process.url, "one two one two", model=MODEL, max_tokens=200, seed=7, key="operator-secret")
        for key in ("operator-secret", "limited-secret"):
            headers = {"x-slo-class": "patient", "Authorization": f"Bearer {key}"}
            body = {"model": MODEL, "prompt": "abc", "max_tokens": 8}
            httpx.post(f"{process.url}/v1/completions", json=body, headers=headers, **HTTP)
    with Peer(server.url, key="limited-secret") as peer:  # beyond its one request a minute
        for _ in range(2):
            peer.say(opening(f"limited-{next(NUMBERS)}"))
            peer.hear()
    with Peer(server.url, key="operator-secret") as peer:
        first = f"drafted-{next(NUMBERS)}"
        said = peer.open(first)
        drafted = f"drafted-{next(NUMBERS)}"
        peer.open(drafted, draft=said.tokens)
        for session in (first, drafted):
            peer.say(Cancel(session))


def _queries(process: str) -> list[str]:
    """As Grafana would send them: its variables filled in."""
    board = monitoring.dashboard(monitoring.PAGE.read_text(), process)
    filled = {"$job": f"wisp-{process.lower()}", "$instance": ".+", "$__rate_interval": "10m"}
    queries = monitoring.queries(board)
    for name, value in filled.items():
        queries = [query.replace(name, value) for query in queries]
    return queries


def _answers(api: str) -> bool:
    try:
        return httpx.get(f"{api}/targets", **HTTP).status_code == 200
    except httpx.TransportError:
        return False


def _has_data(api: str, query: str) -> bool:
    """Whether there is a number."""
    answer = httpx.get(f"{api}/query", params={"query": query}, **HTTP).json()
    assert answer["status"] == "success", answer
    return any(not math.isnan(float(series["value"][1])) for series in answer["data"]["result"])


def _alerting(api: str) -> set[str]:
    """Names of the alerts that fire, or will if what they say goes on."""
    found = httpx.get(f"{api}/alerts", **HTTP).json()["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in found}
