"""A scripted verifier and an edge that drafts n-grams before it, as processes of the environment `WISP_PYTHON`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("WISP_PYTHON", sys.executable)
MODEL = "scripted"
START_S = 600.0  # a machine may be ten times slower


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, "the process has ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing healthy on port {port}")


@pytest.fixture(scope="session")
def ports() -> Iterator[dict[str, int]]:
    """Of the server and of the edge."""
    ports = {"server": free_port(), "edge": free_port()}
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_WAIT_POLICY": "passive"}
    commands = {
        "server": ["-m", "tests.clients.scripted", str(ports["server"])],
        "edge": ["-m", "wisp.cli", "edge", "--draft", "ngram", "--server",
                 f"http://127.0.0.1:{ports['server']}", "--port", str(ports["edge"])],
    }  # fmt: skip
    processes = []
    try:
        for name, command in commands.items():
            processes.append(
                subprocess.Popen([PYTHON, *command], env=env, cwd=ROOT, stderr=subprocess.DEVNULL)
            )
            wait(ports[name], processes[-1])
        yield ports
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


@pytest.fixture(params=["server", "edge"])
def url(request: pytest.FixtureRequest, ports: dict[str, int]) -> str:
    """The base URL of either port, as OpenAI's clients take it."""
    return f"http://127.0.0.1:{ports[request.param]}/v1"
