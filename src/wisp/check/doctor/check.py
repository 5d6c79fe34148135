"""One thing looked at, and what to do about it."""

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
    """One thing looked at. `remedy` says what to do, unless the status is ok."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that breaks has found something, too."""
    try:
        return check()
    except WispError as error:
        return Check(name, "fail", str(error), REINSTALL)
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}", "Report this as a bug of wisp doctor.")
