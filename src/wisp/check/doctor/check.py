"""A check: its finding, and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from wisp.core.errors import WispError

Status = Literal["ok", "warn", "fail"]

DISTRIBUTION = "wisp-serve"
REINSTALL = f"pip install --force-reinstall {DISTRIBUTION}"


@dataclass(frozen=True)
class Check:
    """The result of a check. `remedy`: empty if the status is ok."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """The result of `check`, or of its exception."""
    try:
        return check()
    except WispError as error:
        return Check(name, "fail", str(error), REINSTALL)
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}", "Report this as a bug of wisp doctor.")
