"""What requests without constraints cost, by this version and by another one: the last before there were any.

*step*, *rule*      a server's step, and the sampling rule (`benchmarks.constraints_steps`)
*streamed*, *whole* a chat request of 64 tokens to `wisp serve`, with a null engine: all that is not the model

Both versions run at once and take turns of some milliseconds, so that what else the machine does meets both
alike. How a process lies in memory makes a difference of its own, so there are several pairs of processes, and
the interval is over these.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from wisp.children import Child, Children, free_ports
from wisp.core.errors import ConfigError

PAIRS, TURNS, WARM = 10, 40, 4
TOKENS = 64
ROOT = Path(__file__).parent.parent

# Arguments of `python` that run a file or module with another source of wisp first on the path
_FIRST = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
_SERVE = (_FIRST + "runpy.run_module('wisp.cli', run_name='__main__', alter_sys=True)",)
_STEPS = (_FIRST + "runpy.run_path(sys.argv[1], run_name='__main__')",)
_FLAGS = ("serve", "--engine", "null", "--target", "null", "--batching", "continuous", "--log-level", "warning",
          "--drain-s", "0")  # fmt: skip
_CHAT = {
    "model": "null",
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "Tell me a story about a lamp and a tree."},
    ],
    "max_tokens": TOKENS,
    "temperature": 0.7,
    "seed": 7,
}


class Plain(msgspec.Struct):
    """CPU milliseconds before and now: medians. more: how much more that is, the median over pairs of processes;
    low, high: the second least and the second largest of them, which the true median is between in 98 % of cases for
    ten pairs."""

    before: float
    now: float
    more: float
    low: float
    high: float


@contextlib.contextmanager
def version(ref: str) -> Iterator[Path]:
    """The source folder of another version, checked out for as long as the context. Raises ConfigError."""
    with tempfile.TemporaryDirectory(prefix="wisp-version-") as folder:
        tree = str(Path(folder, "tree"))
        try:
            _git("worktree", "add", "--detach", tree, ref)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise ConfigError(
                f"version {ref!r} cannot be checked out ({said.strip()}). Run this in a git checkout that has it "
                "(git fetch --unshallow), or name another one (--before REF)."
            ) from None
        try:
            yield Path(tree, "src")
        finally:
            _git("worktree", "remove", "--force", tree)


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)


def plain(ref: str, pairs: int = PAIRS, turns: int = TURNS) -> dict[str, Plain]:
    """Requests without constraints, of version `ref` and of this one, in turn."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with version(ref) as before:
        for _ in range(pairs):
            for name, costs in _pair(before, ROOT / "src", turns).items():
                ratios = [now / old - 1.0 for old, now in costs]
                medians = (statistics.median(side) for side in zip(*costs, strict=True))
                found[name].append((*medians, statistics.median(ratios)))
    return {name: _sum(rows) for name, rows in found.items()}


def _sum(rows: list[tuple[float, float, float]]) -> Plain:
    before, now, more = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = sorted(ratio for _, _, ratio in rows)
    inner = ratios[1:-1] if len(ratios) > 3 else ratios
    return Plain(before, now, more, inner[0], inner[-1])


def _pair(before: Path, now: Path, turns: int) -> dict[str, list[tuple[float, float]]]:
    """Costs of a process of each version, by turn."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        children = stack.enter_context(Children())
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=600))
        sides = [
            (stack.enter_context(Steps(source)), Served(children, client, name, source))
            for name, source in (("before", before), ("now", now))
        ]
        for turn in range(-WARM, turns):
            costs = {}
            for i in (0, 1) if turn % 2 else (1, 0):
                steps, served = sides[i]
                costs[i] = steps.turn() | served.turn()
            for name in costs[0] if turn >= 0 else ():
                found[name].append((costs[0][name], costs[1][name]))
    return found


class Steps:
    """`constraints_steps` as a process."""

    def __init__(self, source: Path) -> None:
        script = str(ROOT / "benchmarks" / "constraints_steps.py")
        self._process = subprocess.Popen(
            [sys.executable, "-c", *_STEPS, str(source), script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def turn(self) -> dict[str, float]:
        """What each of its works costs, in CPU milliseconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        costs: dict[str, float] = json.loads(self._process.stdout.readline())
        return costs


class Served:
    """`wisp serve` as a process, and its only client."""

    def __init__(self, children: Children, client: httpx.Client, name: str, source: Path) -> None:
        (port,) = free_ports(1)
        arguments = ["-c", *_SERVE, str(source), *_FLAGS, "--port", str(port)]
        self._child = children.start(name, arguments, port)
        self._client = client
        self._child.wait_healthy(client)

    def turn(self) -> dict[str, float]:
        """What a request costs the process, in CPU milliseconds."""
        return {"streamed": self._cost(stream=True), "whole": self._cost(stream=False)}

    def _cost(self, **fields: Any) -> float:
        before = _cpu_ms(self._child)
        answer = self._client.post(f"{self._child.url}/v1/chat/completions", json=_CHAT | fields)
        answer.raise_for_status()
        return _cpu_ms(self._child) - before


def _cpu_ms(child: Child) -> float:
    """CPU time of all threads of another process, to the nanosecond: Linux's clock of that process."""
    return time.clock_gettime(~child.process.pid << 3 | 2) * 1e3
