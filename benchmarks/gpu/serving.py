"""A verifier on vLLM and an edge before it, and streamed requests to both: decoded by the server, and drafted."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu import requests
from benchmarks.gpu.report import write

START_S = 300.0  # loading, graphs and the self-test; the part that this is has a shorter limit


def run(target: str, slots: int, depth: int, out: Path, *, tiny: bool) -> None:
    """Raises RuntimeError if one of them does not come up, or a request fails."""
    verifier, edge = _port(), _port()
    # Requests repeat few prompts, and answers to them would be drafted from each other.
    alike = ("--history-tokens", "0")
    serve = ("serve", "--engine", "vllm", "--target", target, "--slots", str(slots), "--offline", *alike)
    size = ("--context", "512" if tiny else "2048", "--depth", str(depth), "--port", str(verifier))
    with _process(out / f"serve-{depth}.log", (*serve, *size), verifier):
        found = {"served": requests.loads(f"http://127.0.0.1:{verifier}", slots, tiny=tiny)}
        to = ("--server", f"http://127.0.0.1:{verifier}", "--port", str(edge))
        drafts = ("edge", "--draft", "ngram", *alike, *to)
        with _process(out / f"edge-{depth}.log", drafts, edge):
            found["drafted by n-grams"] = requests.loads(f"http://127.0.0.1:{edge}", slots, tiny=tiny)
    write(out, f"depth-{depth}", found)


@contextmanager
def _process(log: Path, command: tuple[str, ...], port: int) -> Iterator[None]:
    with log.open("wb") as words:
        child = subprocess.Popen(
            [sys.executable, "-m", "wisp.cli", *command], stdout=words, stderr=subprocess.STDOUT
        )
        try:
            _await(child, port, log)
            yield
        finally:
            child.terminate()
            try:
                child.wait(15.0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _await(child: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if child.poll() is not None:
            lines = log.read_text(errors="replace").splitlines() or ["nothing"]
            raise RuntimeError(f"it ended with {child.returncode}, and said: {lines[-1][:300]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2.0):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise RuntimeError(f"it did not answer within {START_S:g} s")


def _port() -> int:
    """One that is free now."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])
