"""The progress of a pull: one small callback, and a bar for terminals."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Progress(Protocol):
    """Called again and again as bytes arrive."""

    def __call__(self, description: str, done: int, total: int, /) -> None:
        """`done` of `total` bytes of the phase `description`; `total` 0 is a remark, to be shown once."""


class RichProgress:
    """Bars on standard error; where that is no terminal, one line for each phase and remark.

    Use it as a context manager, so that an error or Ctrl-C gives the cursor back.
    """

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: set[str] = set()

    def __call__(self, description: str, done: int, total: int, /) -> None:
        if not sys.stderr.isatty():
            self._say_once(description)
        elif total == 0:
            self._live().console.print(description, markup=False, highlight=False)
        else:
            self._move(description, done, total)

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _say_once(self, description: str) -> None:
        if description not in self._said:
            self._said.add(description)
            print(description, file=sys.stderr, flush=True)

    def _move(self, description: str, done: int, total: int) -> None:
        bars = self._live()
        if description not in self._tasks:
            self._tasks[description] = bars.add_task(description, total=total)
        bars.update(self._tasks[description], completed=done, total=total)

    def _live(self) -> Bars:
        """The bars, begun at the first use: a model that is already here shows nothing."""
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}", markup=False), BarColumn())
            self._bars = Bars(
                *columns, DownloadColumn(), TimeRemainingColumn(), console=Console(file=sys.stderr)
            )
            self._bars.start()
        return self._bars
