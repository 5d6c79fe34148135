"""Plots: matplotlib, if it is installed, and the colours that pictures share."""

from __future__ import annotations

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
