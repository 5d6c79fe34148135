"""Runs a command again and again on a machine that is busy: `python tests/busy.py --loops 4 --times 3 make test`.

Beside it, loops use whatever CPU they get. Each of them looks who its parent is, and ends with it, however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

LOOP = "import os\nwhile os.getppid() == {parent}:\n    for _ in range(1_000_000): pass"


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many busy loops, until the context is left or this process ends."""
    command = [sys.executable, "-c", LOOP.format(parent=os.getpid())]
    running = [subprocess.Popen(command) for _ in range(loops)]
    try:
        yield
    finally:
        for loop in running:
            loop.kill()
        for loop in running:
            loop.wait()


def run(command: list[str]) -> int:
    """Its exit status. Ctrl-C and SIGTERM end it together with this process."""
    with subprocess.Popen(command) as running:
        try:
            return running.wait()
        finally:
            running.terminate()


def main() -> int:
    """The first exit status that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with busy(given.loops):
        for time_ in range(1, given.times + 1):
            began = time.monotonic()
            status = run(given.command)
            print(
                f"busy: {time_} of {given.times}: status {status} after {time.monotonic() - began:.0f} s",
                flush=True,
            )
            if status:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
