"""`wisp profile --target`: the cost model of an engine on this machine, fitted and judged, as a file for `wisp serve`.

Three configurations in ten are kept out of the fit. The reported errors are those on them: of our form, with the
knee, and of the paper's line.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from wisp import __version__
from wisp.calibrate.profile.grid import EngineSize, cells
from wisp.calibrate.profile.measure import Bench, Measured, Timed
from wisp.core.errors import ConfigError
from wisp.core.verify.cost import Coefficients, Fit, errors, fit
from wisp.engines.base import EngineInfo, TargetEngine
from wisp.engines.build import check_engine, emulated_hardware, load_target, served_name
from wisp.engines.emulated import EmulatedTarget, VirtualClock
from wisp.engines.models import RichProgress
from wisp.outputs import writable
from wisp.progress import progress_bar

FORMAT = "wisp.cost.v1"
KEPT_APART = 0.3  # share of the timed steps that the fit does not see: they say how good it is
NOISY = 0.1  # spread of repeats from which a profile is not to be relied on
REPEATS, QUICK_REPEATS = 5, 3


class Judged(msgspec.Struct, frozen=True):
    """A fit, and its errors on steps that it has not seen. mape is a fraction."""

    coefficients: Coefficients
    r2: float
    mae_ms: float
    mape: float

    @classmethod
    def of(cls, found: Fit) -> Judged:
        """Rounded for a file."""
        return cls(found.coefficients, round(found.r2, 5), round(found.mae, 4), round(found.mape, 5))


class CostProfile(msgspec.Struct, frozen=True):
    """The file: a server uses `fit`; `line` is the paper's form beside it. noise: median relative spread of
    repeats. steps: how many were fitted to and kept apart. measured: [sequences, new, cached, chunk, ms, spread]."""

    format: str
    engine: str
    model: str
    mode: str
    wisp: str
    date: str
    command: str
    machine: dict[str, Any]
    fit: Judged
    line: Judged
    noise: float
    steps: dict[str, int]
    seconds: float
    measured: list[tuple[int, int, int, int, float, float]] = []

    @property
    def coefficients(self) -> Coefficients:
        return self.fit.coefficients


def read_cost(path: Path) -> tuple[Coefficients, str]:
    """The start of a cost model, and the model that it was measured on.

    `path` is a profile, or a JSON object of coefficients alone (of no known model: ""). Raises ConfigError.
    """
    try:
        data = path.read_bytes()
        whole = msgspec.json.decode(data, type=dict[str, Any])
        if "format" not in whole:
            known = {field.name for field in msgspec.structs.fields(Coefficients)}
            if unknown := sorted(whole.keys() - known) or sorted({"step", "token"} - whole.keys()):
                raise ConfigError(
                    f"{path} is no cost profile: look at {unknown[0]!r}; `wisp profile` writes one"
                )
            c, model = msgspec.convert(whole, Coefficients), ""
        elif whole["format"] != FORMAT:
            raise ConfigError(f"{path} has the format {whole['format']!r}; this release reads {FORMAT}")
        else:
            profile = msgspec.json.decode(data, type=CostProfile)
            c, model = profile.coefficients, profile.model
    except OSError as error:
        raise ConfigError(f"cannot read the cost profile {path}: {error.strerror or error}") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no cost profile, as `wisp profile --target` writes it: {error}"
        ) from None
    if problem := c.problem():
        raise ConfigError(f"{path}: {problem}")
    return c, model


def profile_target(
    target: str,
    *,
    engine: str,
    mode: str | None,
    slots: int | None,
    context: int | None,
    threads: int | None,
    kv_tokens: int | None,
    quick: bool,
    cpu_time: bool,
    limit_s: float,
    out: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Time the engine's steps, fit, judge, and write the profile to `out`. Raises WispError."""
    check_engine(engine, mode=mode, kv_tokens=kv_tokens)
    if out is not None:
        writable(out)
    if engine == "null":
        raise ConfigError("the null engine takes no time: there is nothing to profile")
    if cpu_time and (engine != "llama.cpp" or threads != 1):
        raise ConfigError(
            "--cpu-time counts what a step takes of one core: it needs llama.cpp and --threads 1"
        )
    command = _command(
        target=served_name(target), engine=engine, mode=mode, slots=slots, context=context, threads=threads,
        kv_tokens=kv_tokens, quick=quick, cpu_time=cpu_time, limit_s=limit_s,
    )  # fmt: skip
    now = time.perf_counter
    with RichProgress() as progress:
        loaded: TargetEngine
        if engine == "emulated":
            clock = VirtualClock()
            hardware = emulated_hardware(target, slots=slots, context=context, kv_tokens=kv_tokens)
            loaded = EmulatedTarget(
                served_name(target), hardware, lambda *_: 0, now=clock.now, sleep=clock.sleep
            )
            now = clock.now
        else:
            loaded, _ = load_target(
                target, engine=engine, mode=mode, slots=slots, context=context, threads=threads,
                offline=offline, progress=progress,
            )  # fmt: skip
        try:
            measured = measure(loaded, now, quick=quick, limit_s=limit_s, cpu_time=cpu_time)
        finally:
            loaded.close()
    profile = judge(measured, loaded.info, command, threads, "cpu" if cpu_time else "wall")
    if out is not None:
        out.write_bytes(_readable(profile))
    if as_json:
        print(msgspec.json.encode(msgspec.structs.replace(profile, measured=[])).decode())
    else:
        _show(profile, measured, out)


def measure(
    engine: TargetEngine, now: Callable[[], float], *, quick: bool, limit_s: float, cpu_time: bool = False
) -> Measured:
    """Time the grid of an engine, with a bar. `cpu_time`: count CPU time of one core, not wall time."""
    info = engine.info
    size = EngineSize(info.step_tokens, info.slots, info.kv_tokens, info.slot_tokens)
    # On a clock of its own nothing is waited for, so nothing needs to be cut short.
    limit = limit_s if now is time.perf_counter else float("inf")
    with progress_bar() as tell:
        return Bench(engine, now=now, timer=time.process_time if cpu_time else now).measure(
            cells(size, quick=quick), QUICK_REPEATS if quick else REPEATS, limit, tell
        )


def judge(
    measured: Measured, info: EngineInfo, command: str, threads: int | None = None, clock: str = "wall"
) -> CostProfile:
    """Fit both forms to seven steps in ten, and say how well they do on the others."""
    fitted, apart = split(measured.steps)
    loads = [t.cell.load for t in fitted]
    ms = [t.ms for t in fitted]
    ours, line = (
        errors(fit(loads, ms, paper=paper), [t.cell.load for t in apart], [t.ms for t in apart])
        for paper in (False, True)
    )
    return CostProfile(
        FORMAT,
        info.engine,
        info.model,
        info.mode,
        __version__,
        datetime.now(UTC).strftime("%Y-%m-%d"),
        command,
        {} if info.engine == "emulated" else {**machine(threads), "clock": clock},
        Judged.of(ours),
        Judged.of(line),
        round(measured.noise, 5),
        {"fitted": len(fitted), "kept_apart": len(apart), "left_out": len(measured.left_out)},
        round(measured.seconds, 1),
        [(*t.cell, round(t.ms, 4), round(t.spread, 4)) for t in measured.steps],
    )


def split(steps: Sequence[Timed]) -> tuple[list[Timed], list[Timed]]:
    """(steps to fit to, steps kept apart), at random, always the same."""
    shuffled = sorted(steps, key=lambda t: t.cell)
    random.Random(1).shuffle(shuffled)
    apart = max(1, round(KEPT_APART * len(shuffled)))
    return shuffled[apart:], shuffled[:apart]


def machine(threads: int | None) -> dict[str, Any]:
    cpu = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    except OSError:
        pass
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _command(**options: Any) -> str:
    """The command that does it again; a path is told by its last part only."""
    words = ["wisp profile"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            shown = f"{value:g}" if isinstance(value, float) else value
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def _readable(profile: CostProfile) -> bytes:
    """JSON with a line for each measured step."""
    whole = json.loads(msgspec.json.encode(profile))
    steps = whole.pop("measured")
    head = json.dumps(whole, indent=1)[:-2]
    return (head + ',\n "measured": [\n  ' + ",\n  ".join(map(json.dumps, steps)) + "\n ]\n}\n").encode()


def _show(profile: CostProfile, measured: Measured, out: Path | None) -> None:
    console = Console(highlight=False)
    steps = profile.steps
    console.print(
        f"{profile.model} on {profile.engine}, {profile.mode} mode: {len(measured.steps)} steps timed"
        f"{' (time ran out: not all, or not as often)' if measured.cut_short else ''}, "
        f"{steps['left_out']} left out as unsteady; noise {profile.noise:.1%}."
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in (f"on {steps['kept_apart']} kept apart", "R2", "MAE ms", "MAPE", "ms a step", "ms a token"):
        table.add_column(name)
    for name, j in (("fit", profile.fit), ("the paper's line", profile.line)):
        c = j.coefficients
        token = f"{c.token:.3g}" + (f", {c.token + c.beyond:.3g} from {c.knee} on" if c.beyond else "")
        step = f"{c.step:.3g}" + (f" and {c.slice:.3g} a slice" if c.slice >= 1e-3 else "")
        table.add_row(name, f"{j.r2:.4f}", f"{j.mae_ms:.2f}", f"{j.mape:.2%}", step, token)
    console.print(table)
    if profile.noise > NOISY:
        console.print(
            "This machine was busy with other things: the same step took "
            f"{profile.noise:.0%} longer or shorter from one time to the next. Try again when it is quiet."
        )
    if out is not None:
        console.print(f"Written to {out}; for `wisp serve --cost {out}`.", soft_wrap=True)
