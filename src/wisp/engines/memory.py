"""How much memory models may take."""

from __future__ import annotations

import contextlib
from pathlib import Path


def available_memory() -> int | None:
    """Available bytes by /proc/meminfo, or by a control group's limit if that is less."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            limit = int((group / "memory.max").read_text())
            free = min(free, limit - int((group / "memory.current").read_text()))
        return max(0, free)
    return None
