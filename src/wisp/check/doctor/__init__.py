"""`wisp doctor`: checks of the installation, the engines and the machine, each with a remedy.

Each check is a function that returns a `Check`.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wisp.check.doctor import installed, machine
from wisp.check.doctor.check import Check, guarded
from wisp.check.doctor.engine import ENGINE_S, VLLM_S, engine_checks, vllm_checks
from wisp.check.doctor.models import HUB_S, hub_reachable, model_cached
from wisp.engines.models import catalogue, is_cached

SYSTEM: dict[str, Callable[[], Check]] = {
    "Python": installed.python_version,
    "packages": installed.packages,
    "extras": installed.extras,
    "event loop": installed.event_loop,
    "grammars": installed.grammars,
    "emulated": installed.emulated,
    "cores": machine.cores,
    "idle threads": machine.wait_policy,
    "memory": machine.memory,
    "disk": machine.disk,
    "model cache": machine.cache_writable,
    "ports": machine.ports,
    "API keys": machine.api_keys,
}


def run_doctor(*, offline: bool, as_json: bool) -> int:
    """Print the findings; 1 if any check fails, else 0."""
    checks = examine(offline=offline)
    ok = all(check.status != "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}))
    else:
        _show(checks)
    return 0 if ok else 1


def examine(*, offline: bool) -> list[Check]:
    """All checks. The slow ones, engine and network, run beside the others."""
    hub = _InBackground("model hub", lambda: hub_reachable(offline))
    engine = _InBackground("engine", engine_checks)
    vllm = _InBackground("vllm", vllm_checks)
    system = [guarded(name, check) for name, check in SYSTEM.items()]
    cards = [card for card in catalogue() if card.bundled or card.checked or is_cached(card.name)]
    models = [guarded(f"model {card.name}", functools.partial(model_cached, card)) for card in cards]
    engines = [*engine.result(ENGINE_S + 5), *vllm.result(VLLM_S + 5)]
    return [*system, *engines, *models, *hub.result(HUB_S + 1)]


class _InBackground:
    """Checks in a thread that may be abandoned: looking up a host name has no timeout."""

    def __init__(self, name: str, check: Callable[[], Check | list[Check]]) -> None:
        self._name, self._check = name, check
        self._found: list[Check] | None = None
        self._thread = threading.Thread(target=self._run, name=f"doctor-{name}", daemon=True)
        self._thread.start()

    def result(self, timeout_s: float) -> list[Check]:
        self._thread.join(timeout_s)
        if self._found is None:
            return [Check(self._name, "warn", f"no result after {timeout_s:.0f} s", "Try again.")]
        return self._found

    def _run(self) -> None:
        try:
            found = self._check()
            self._found = found if isinstance(found, list) else [found]
        except Exception as error:
            self._found = [
                Check(self._name, "fail", f"{type(error).__name__}: {error}", "Report this as a bug.")
            ]


def _show(checks: list[Check]) -> None:
    marks = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
    table = Table("", "check", "finding", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.columns[1].no_wrap = True
    for check in checks:
        finding = Text(check.finding, overflow="fold")
        if check.remedy:
            finding.append(f"\n-> {check.remedy}", style=marks[check.status][1])
        table.add_row(Text(*marks[check.status]), check.name, finding)
    console = Console()
    console.print(table)
    failed = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    console.print(f"{failed} failed, {warned} with a warning, of {len(checks)} checks.", highlight=False)
