"""Exclusive thread CPU time of methods: each has what it took less what watched methods below it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LEFT_OUT = ""  # the name of what is not counted


class Stopwatch:
    """`ms` by name since the last `reset`. Methods of an owner are replaced for good."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._inner = [0.0]  # of the watched methods at work, what those below them took

    def reset(self) -> None:
        self.ms = {}

    def on(self, name: str, owner: Any, *methods: str) -> None:
        """Count these methods of `owner` under `name`."""
        for method in methods:
            setattr(owner, method, self.timed(name, getattr(owner, method)))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted under `name`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begun = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - begun
                below = self._inner.pop()
                self._inner[-1] += took
                self.ms[name] = self.ms.get(name, 0.0) + (took - below) * 1e3

        return counted
