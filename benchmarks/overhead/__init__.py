"""`make bench-overhead`: what a verification costs beside the engine.

A verifier with the null engine runs as a process of its own, as anybody would start it. Sessions, each on a
connection of its own, draft as fast as they are answered and check every token. In turn with that, the same
client plays the same sizes of payload with a bare `websockets` server, which is what any server over the same
protocol would cost at the least.

    verifier, echo, verifier, echo, ...: medians are reported, because machines are noisy

The control plane's cost is the CPU time of the verifier's process (all threads, the null engine's included)
over the verifications it answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import msgspec

from benchmarks.overhead.client import measure
from benchmarks.overhead.report import Load, LongContext, Percentiles, Report, show
from benchmarks.overhead.script import Round, Script, scripts
from benchmarks.overhead.servers import Server, echo, steps, verifier
from wisp.api.process import event_loop_factory

REPEATS = 3  # of A and of B
LONG = 2000  # tokens committed before the long sessions go on

Case = tuple[Server, Sequence[Script]]


def run_bench(*, sessions: int, seconds: float, as_json: bool) -> int:
    """Measure and print. Returns the exit code: 0. Raises ChildError if a server does not start."""
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        report = runner.run(measure_all(sessions, seconds))
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        show(report)
    return 0


async def measure_all(sessions: int, seconds: float) -> Report:
    """Verifier and echo in turn. Takes about (2 * REPEATS + 2) * `seconds`."""
    plan = scripts(sessions)
    with verifier(sessions) as ours:
        await measure(ours, plan[:1], seconds / 4)  # warm-up
        single, seen = await measure(ours, plan[:1], seconds / 2)
        sizes = {"draft": seen.bytes_out // seen.rounds, "verdict": seen.bytes_in // seen.rounds}
        frame = Script([Round(bytes(sizes["draft"]))])
        with echo(sizes["verdict"]) as theirs:
            echo_single, _ = await measure(theirs, [frame], seconds / 2)
            before = await steps(ours)
            a, b = await _in_turn((ours, plan), (theirs, [frame] * sessions), seconds)
            after = await steps(ours)
        long, _ = await measure(ours, scripts(sessions, LONG), seconds / 2)
    return Report(
        sessions=sessions,
        verifications_per_s=a.rounds_per_s,
        cpu_ms_per_verification=a.cpu_ms,
        single_session_ms=single.latency_ms,
        loaded_ms=a.latency_ms,
        echo_rounds_per_s=b.rounds_per_s,
        ratio=round(a.rounds_per_s / b.rounds_per_s, 3),
        echo_cpu_ms_per_round=b.cpu_ms,
        echo_single_ms=echo_single.latency_ms,
        echo_loaded_ms=b.latency_ms,
        long_context=LongContext(LONG, round(long.rounds_per_s, 1), round(long.cpu_ms, 4)),
        client_busy={"verifier": a.client_busy, "echo": b.client_busy},
        payload_bytes=sizes,
        mean_batch=round((after[1] - before[1]) / (after[0] - before[0]), 2),
        repeats=REPEATS,
        seconds=seconds,
        cpus=os.cpu_count() or 0,
        versions=_versions(),
    )


async def _in_turn(a: Case, b: Case, seconds: float) -> tuple[Load, Load]:
    """A B A B ..., `REPEATS` times, `seconds` each; the median of each figure."""
    loads: tuple[list[Load], list[Load]] = ([], [])
    for _ in range(REPEATS):
        for (server, plan), measured in zip((a, b), loads, strict=True):
            measured.append((await measure(server, plan, seconds))[0])
    return _median(loads[0]), _median(loads[1])


def _median(loads: list[Load]) -> Load:
    def of(figure: Callable[[Load], float]) -> float:
        return round(statistics.median(figure(load) for load in loads), 4)

    return Load(
        of(lambda x: x.rounds_per_s),
        of(lambda x: x.cpu_ms),
        of(lambda x: x.client_busy),
        Percentiles(of(lambda x: x.latency_ms.p50), of(lambda x: x.latency_ms.p99)),
    )


def _versions() -> dict[str, str]:
    packages = ("wisp-serve", "uvicorn", "uvloop", "websockets", "msgspec")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
