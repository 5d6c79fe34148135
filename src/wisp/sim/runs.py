"""Many runs: in several processes, stopped once their outcome is clear, and remembered on disk.

A run is a function of scenario, system, seed and source, so its report can be kept: the key is a hash of all four. A
changed line in a policy makes all of them new.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import msgspec

import wisp
from wisp.calibrate.traces.format import trace_folder
from wisp.core.protocol.slo import met
from wisp.engines.models.store import cache_dir
from wisp.sim.report import Report, report
from wisp.sim.request import Request
from wisp.sim.scenario import Scenario, arrivals_file
from wisp.sim.simulate import Simulation
from wisp.sim.systems import System

A = TypeVar("A")
B = TypeVar("B")
# Files that a run depends on.
SOURCES = (
    "core/**/*.py",
    "engines/emulated.py",
    "engines/data/predictor.json",
    "engines/data/hardware/*.toml",
    "calibrate/hardware.py",
    *(f"calibrate/profile/{name}.py" for name in ("grid", "measure", "target")),
    *(f"calibrate/traces/{name}.py" for name in ("format", "prompts", "scripts")),
    *(
        f"sim/{name}.py"
        for name in (
            "devices",
            "report",
            "request",
            "runs",
            "scenario",
            "sim_device",
            "sim_verifier",
            "simulate",
            "smooth",
            "systems",
            "timeline",
        )
    ),
)
CLEARLY = 1.5  # a run is cut once this many times as many have missed as are tolerated


class Job(msgspec.Struct, frozen=True):
    """A run to do. give_up: stop it once clearly more than this share misses its SLO (0: never)."""

    scenario: Scenario
    system: System
    seed: int
    give_up: float = 0.0


def run(job: Job, progress: Callable[[float], None] = lambda _: None) -> Report:
    """Do it. `progress` is told simulated seconds."""
    simulation = Simulation(job.scenario, job.system, job.seed)
    estimate: list[float] = []

    def enough(simulation: Simulation) -> bool:
        progress(simulation.env.now)
        if job.give_up:
            share = clearly_missed(simulation, job.give_up)
            if share is not None:
                estimate.append(share)
        return bool(estimate)

    simulation.run(enough)
    return report(simulation, violation_rate=estimate[0] if estimate else None)


def clearly_missed(simulation: Simulation, tolerance: float) -> float | None:
    """The share that will have missed at least, if it is clear that this is beyond tolerance; else None.

    Looks at those that arrived since half of the warm-up. The window is expected to go on as it began.
    """
    s, now = simulation.scenario, simulation.env.now
    start, end = s.warmup_s / 2, s.warmup_s + s.window_s
    if s.population or now < s.warmup_s + 0.1 * s.window_s:
        return None
    recent = [r for r in simulation.requests if r.arrived >= start]
    expected = len(recent) * (end - start) / (now - start)
    missed = sum(missed_for_sure(r, now) for r in recent)
    if missed < CLEARLY * tolerance * expected + 3:
        return None
    settled = sum(r.ended is not None or missed_for_sure(r, now) for r in recent)
    return max(missed / expected, min(missed / max(settled, 1), 1.0) * 0.8)


def missed_for_sure(request: Request, now: float) -> bool:
    """Has it missed its SLO, whatever may follow?"""
    served = request.served()
    if served.ended is not None or not served.ok or served.tokens == 0:
        return not met(served, now)
    if served.slo.ttft_ms and served.ttft_ms > served.slo.ttft_ms:
        return True
    longest = (request.max_tokens - 1) * served.slo.tpot_ms
    return bool(longest) and (now - served.first) * 1e3 > longest


@functools.cache
def source_hash() -> str:
    root = Path(wisp.__file__).parent
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _traces_hash(folder: str) -> str:
    digest = hashlib.sha256()
    found = trace_folder(Path(folder))
    for path in [found] if found.is_file() else sorted(found.glob("*.npz")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def key(job: Job) -> str:
    """The name under which a run's report is remembered."""
    bare = msgspec.structs.replace(job, scenario=_placeless(job.scenario), system=_unnamed(job.system))
    data, traces = msgspec.json.encode(bare), _traces_hash(job.scenario.traces)
    parts = (data, source_hash().encode(), traces.encode(), *_files(job.scenario))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _files(scenario: Scenario) -> list[bytes]:
    """Contents of the files that a scenario names, beside traces."""
    named = [Path(scenario.hardware)]
    if scenario.arrivals:
        named.append(arrivals_file(Path(scenario.arrivals)))
    return [path.read_bytes() for path in named if os.path.isfile(path)]


def _placeless(scenario: Scenario) -> Scenario:
    """Without paths of files, since their contents count."""
    hardware = "" if os.path.isfile(scenario.hardware) else scenario.hardware
    return msgspec.structs.replace(scenario, arrivals="", traces="", hardware=hardware)


def _unnamed(system: System) -> System:
    return msgspec.structs.replace(system, name="", about="")


def remembered(job: Job) -> Report:
    """The report of a run: from disk, or done now."""
    path = cache_dir() / "runs" / f"{key(job)}.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Report)
        return msgspec.structs.replace(found, system=job.system.name)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        pass
    done = run(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(msgspec.json.encode(done))
    partial.replace(path)
    return done


def _end_with_parent() -> None:
    """Have this worker process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Runs:
    """Does jobs in `jobs` processes, one of which is this one if there is but one."""

    def __init__(self, jobs: int = 1) -> None:
        self._pool: Executor | None = None
        if jobs > 1:
            self._pool = ProcessPoolExecutor(
                jobs, multiprocessing.get_context("spawn"), initializer=_end_with_parent
            )

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)

    def map(self, do: Callable[[A], B], items: Sequence[A]) -> Iterable[B]:
        """`do` of each, in order, as they come."""
        return map(do, items) if self._pool is None else self._pool.map(do, items)

    def finished(self, do: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
        """`do` of each, as soon as it is done."""
        if self._pool is None:
            yield from map(do, items)
            return
        for future in as_completed([self._pool.submit(do, item) for item in items]):
            yield future.result()

    def reports(self, jobs: Sequence[Job]) -> list[Report]:
        return list(self.map(remembered, jobs))
