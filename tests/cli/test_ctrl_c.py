"""Ctrl-C while a model loads, which happens in native code and may take a minute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.modelless]

# Loading that never ends and hears of no signal: a native lock that is taken twice.
PROGRAM = """
import ctypes
from wisp.engines.llama.target import LlamaTarget
from wisp.engines.llama.tokenizer import LlamaTokenizer

def load(*arguments, **options):
    print("loading", flush=True)
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)

LlamaTarget.__init__ = LlamaTokenizer.open = load
from wisp.cli import main
main()
"""
MODEL = str(Path(__file__).parents[2] / "src/wisp/engines/data/tiny-draft.gguf")
EDGE = ("edge", "--draft", MODEL, "--port", "0")
GENERATE = ("generate", "Hi", "--draft", MODEL)
SERVE = ("serve", "--target", MODEL, "--port", "0")


@pytest.mark.parametrize(
    ("command", "status"),
    [(EDGE, -signal.SIGINT), (GENERATE, -signal.SIGINT), (SERVE, 0)],
    ids=["edge", "generate", "serve"],
)
def test_ctrl_c_ends_a_process_that_loads_a_model(command: tuple[str, ...], status: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"WISP_OFFLINE": "1"},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == status
    assert "Traceback" not in said
