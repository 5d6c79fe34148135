"""A progress bar for commands that take long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Tell = Callable[[str, float, float], None]  # the present task, how much of it is done, of how much


@contextmanager
def progress_bar() -> Iterator[Tell]:
    """A bar on standard error, while that is a terminal; it goes away at the end. Yields what to tell it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield lambda task, done, total: bars.update(bar, description=task, completed=done, total=total)
