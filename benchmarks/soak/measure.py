"""Measurements of a soak's processes: memory, descriptors, CPU, and the answers of /health."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
import psutil

from benchmarks.soak.parties import Tally
from benchmarks.soak.stack import Stack

EVERY_S = 1.0
WARM = 0.25  # of a phase's sessions: before, memory may grow
PER = 10_000  # sessions


class Life(msgspec.Struct):
    """One process, from its first look to its last. samples: sessions ended, resident MB."""

    process: str
    pid: int
    cpu_s: float = 0.0
    files: tuple[int, int] = (0, 0)  # descriptors at the first and at the last look
    samples: list[tuple[int, float]] = []

    def slope(self) -> float | None:
        """MB per 10^4 sessions after warm-up, by least squares; None of too few samples."""
        if not self.samples:
            return None
        first, last = self.samples[0][0], self.samples[-1][0]
        after = [(n, mb) for n, mb in self.samples if n >= first + WARM * (last - first)]
        return least_squares(after) * PER if len({n for n, _ in after}) > 2 else None


def least_squares(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through points."""
    x_mean = math.fsum(x for x, _ in points) / len(points)
    y_mean = math.fsum(y for _, y in points) / len(points)
    over = math.fsum((x - x_mean) * (y - y_mean) for x, y in points)
    return over / math.fsum((x - x_mean) ** 2 for x, _ in points)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many do not exceed. nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


class Watch:
    """While the context is entered, looks at all processes of `stack` every second, and asks for their health.

    lives: of processes. health: answers of /health by door.
    """

    def __init__(self, stack: Stack, tally: Tally) -> None:
        self.lives: list[Life] = []
        self.health: dict[str, dict[str, float]] = {}
        self._stack = stack
        self._tally = tally
        self._before: dict[int, float] = {}  # CPU seconds at the first look, by process id

    async def __aenter__(self) -> Self:
        ports = [str(door.port) for door in (self._stack.router, self._stack.edge)]
        words = ("-m", "benchmarks.soak.probe", *ports)
        self._probe = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._looks = asyncio.create_task(self._look_on())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._looks.cancel()
        await asyncio.gather(self._looks, return_exceptions=True)
        said, _ = await self._probe.communicate(b"")
        if kind is None:
            self.look()
            seen = json.loads(said)
            for door in (self._stack.router, self._stack.edge):
                self.health[door.name] = _health(seen[str(door.port)])

    async def _look_on(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(EVERY_S)

    def look(self) -> None:
        """Take a sample of each process now."""
        for name, pid in self._stack.pids().items():
            life = next((x for x in self.lives if x.pid == pid), None)
            try:
                process = psutil.Process(pid)
                files, mb = process.num_fds(), process.memory_info().rss / 1e6
                cpu_s = sum(process.cpu_times()[:2])
            except psutil.Error:  # it has just gone
                continue
            if life is None:
                life = Life(name, pid, 0.0, (files, files), [])
                self.lives.append(life)
                self._before[pid] = cpu_s
            life.cpu_s = round(cpu_s - self._before[pid], 2)
            life.files = (life.files[0], files)
            life.samples.append((self._tally.done, round(mb, 2)))


def _health(seen: dict[str, Any]) -> dict[str, float]:
    ms = seen["ms"]
    return {
        "looks": len(ms),
        "p50_ms": quantile(ms, 0.5),
        "p99_ms": quantile(ms, 0.99),
        "longest_ms": max(ms, default=math.nan),
        "refused": seen["refused"],
        "failed": seen["failed"],
    }
