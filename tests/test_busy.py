"""The busy loops beside tests end with whatever started them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from waiting import PATIENCE_S, eventually

SCRIPT = Path(__file__).parent / "busy.py"
LASTING = [sys.executable, "-c", "import sys; print('here', flush=True); sys.stdin.read()"]


def running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_loop_outlives_the_command(number: signal.Signals) -> None:
    command = [sys.executable, str(SCRIPT), "--loops", "2", *LASTING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"here\n"
        loops = [p for p in psutil.Process(parent.pid).children() if "getppid" in " ".join(p.cmdline())]
        assert len(loops) == 2
        parent.send_signal(number)
        parent.wait(PATIENCE_S)
        eventually(lambda: not any(running(loop) for loop in loops))


def test_the_first_failure_is_the_status() -> None:
    command = [sys.executable, str(SCRIPT), "--loops", "1", "--times", "3", sys.executable, "-c", "exit(3)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.startswith("busy: 1 of 3: status 3 after ")
    assert len(done.stdout.splitlines()) == 1
