"""Plots: matplotlib, if it is installed, and the colours that pictures share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wisp.core.errors import ConfigError

ACCEPTED, OWN, REJECTED, WASTED = "#2a9d5c", "#3b6fb6", "#d1495b", "#b8b8b8"


def pyplot() -> Any:
    """matplotlib.pyplot, for files. Raises ConfigError if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'wisp-serve[sim]'") from None
    return plt


@contextlib.contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """The axes of a new figure (`options`: of `pyplot.subplots`), which is written to `path` in the end."""
    plt = pyplot()
    figure, axes = plt.subplots(rows, columns, **options)
    try:
        yield axes
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
