"""A verifier of our own for a scenario: `wisp serve` as a child process on loopback."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from wisp.calibrate.hardware import Measured
from wisp.children import Child, serving
from wisp.core.errors import ConfigError
from wisp.engines.emulated import Hardware
from wisp.outputs import toml_lines
from wisp.sim.scenario import Scenario
from wisp.sim.simulate import first_guess
from wisp.sim.systems import System

MOST_SESSIONS = 100_000  # the fleet's own number is the limit


def verifier(scenario: Scenario, of: System) -> AbstractContextManager[Child]:
    """A server with the scenario's engine, until the context is left. Raises ChildError if it does not start."""
    return serving("verifier", functools.partial(serve_arguments, scenario, of))


def serve_arguments(scenario: Scenario, of: System, port: int, folder: Path) -> list[str]:
    """The command that serves a scenario. `folder` is for files that it reads."""
    profile = scenario.profile
    flags = {
        "batching": of.batching,
        "depth": str(of.depth),
        "history-tokens": "0",  # as in the simulator: scripts repeat a few traces again and again
        "max-sessions": str(MOST_SESSIONS),
        "drain-s": "0",
        "log-level": "warning",
        "port": str(port),
    }
    if isinstance(profile, Measured):
        if of.step_tokens:
            raise ConfigError(f"system {of.name}: step_tokens is for the simulator and emulated engines")
        slots = of.slots or profile.slots
        flags |= {"engine": profile.engine, "target": profile.model, "mode": profile.mode, "threads": "1"}
        flags |= {"slots": str(slots), "context": str(profile.slot_tokens), "cost": scenario.hardware}
    else:
        flags |= {
            "engine": "emulated",
            "target": scenario.hardware,
            "traces": scenario.traces,
            "output-tokens": "-".join(map(str, scenario.output_tokens)),
            "kv-tokens": str(profile.kv_tokens),
        }
        if scenario.overlap or scenario.step_tokens or of.step_tokens:
            flags["target"] = _written(profile, of, folder)
        if of.slots or scenario.slots:
            flags["slots"] = str(of.slots or scenario.slots)
        if scenario.acceptance:
            flags["acceptance"] = str(scenario.acceptance)
    if scenario.profile_error != 1.0:
        cost = folder / "cost.json"
        cost.write_bytes(msgspec.json.encode(first_guess(profile, scenario.profile_error)))
        flags["cost"] = str(cost)
    return [
        *("-m", "wisp.cli", "serve"),
        *(part for name, value in flags.items() for part in (f"--{name}", value)),
        "--slo-admission" if of.admission else "--no-slo-admission",
    ]


def _written(profile: Hardware, of: System, folder: Path) -> str:
    """The profile as changed, as a file."""
    changed = msgspec.structs.replace(profile, step_tokens=of.step_tokens or profile.step_tokens)
    path = folder / "hardware.toml"
    path.write_text("\n".join(toml_lines(msgspec.to_builtins(changed))), "utf-8")
    return str(path)


def cpu_s(pid: int) -> float | None:
    """CPU time of a process so far, user and system, all threads; None where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    user, kernel = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(kernel)) / os.sysconf("SC_CLK_TCK")
