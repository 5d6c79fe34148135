"""`make test-wheel`: the wheel, in an empty environment of each Python, serves from a folder outside the repository.

    python tests/wheel.py WHEEL [PYTHON ...]

Without Pythons: 3.11, 3.12 and 3.13, as they are found on the path or below ~/.pyenv. Prints one line each.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

VERSIONS = ("3.11", "3.12", "3.13")
PATIENCE_S = 300.0


def main(wheel: str, *given: str) -> int:
    pythons: dict[str, str | None] = {python: python for python in given}
    pythons = pythons or {version: found(version) for version in VERSIONS}
    failed = 0
    for name, python in pythons.items():
        if python is None:
            print(f"Python {name}: skipped, there is none here")
            continue
        with tempfile.TemporaryDirectory(prefix="wisp-wheel-") as folder:
            try:
                print(f"Python {name}: {check(Path(wheel).resolve(), python, Path(folder))}", flush=True)
            except (subprocess.CalledProcessError, AssertionError, OSError) as error:
                failed += 1
                output = getattr(error, "stderr", None) or ""
                print(f"Python {name}: FAILED: {error}\n{output}", flush=True)
    return failed


def found(version: str) -> str | None:
    """A Python that starts: a shim of pyenv may be there without one behind it."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-V"], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def check(wheel: Path, python: str, folder: Path) -> str:
    """Install, then ask an edge and its verifier for the same text. Raises if anything is not as it should be."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WISP_", "PYTHON"))}
    env |= {"WISP_CACHE": str(folder / "cache"), "WISP_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    venv = folder / "venv"
    subprocess.run([python, "-m", "venv", str(venv)], check=True, capture_output=True, text=True)
    install = [str(venv / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True, env=env)
    wisp = str(venv / "bin" / "wisp")
    version = subprocess.run(
        [wisp, "--version"], check=True, capture_output=True, text=True, env=env, cwd=folder
    )
    with ExitStack() as stack:

        def start(*words: str) -> str:
            port = free_port()
            log = stack.enter_context((folder / f"{words[0]}.log").open("w"))
            command = [wisp, *words, "--port", str(port)]
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            address = f"http://127.0.0.1:{port}"
            wait_healthy(address, process, folder / f"{words[0]}.log")
            return address

        server = start("serve", "--target", "tiny-target", "--threads", "1")
        edge = start("edge", "--draft", "tiny-draft", "--threads", "1", "--server", server)
        alone, drafted = answer(server), answer(edge)
        assert alone == drafted, f"{alone!r} is not {drafted!r}"
        assert alone
        for address in (server, edge):
            assert b"wisp:" in get(f"{address}/metrics")
            assert b"<html" in get(f"{address}/").lower()  # the page
    return f"{version.stdout.strip()}; edge and verifier wrote the same {len(alone)} characters"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_healthy(address: str, process: subprocess.Popen[Any], log: Path) -> None:
    """Until /health is 200."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, f"it ended with {process.returncode}:\n{log.read_text()}"
        try:
            get(f"{address}/health")
            return
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < deadline, f"{address} did not come up:\n{log.read_text()}"
            time.sleep(0.1)


def answer(address: str) -> str:
    """What a model says, greedily."""
    body = {
        "model": "tiny-target",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "max_tokens": 32,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
        return response.read()  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
