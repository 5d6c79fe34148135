"""Everything measured, and how it is shown."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table


class Percentiles(msgspec.Struct):
    """Milliseconds from a message's departure to its answer's arrival, at the client."""

    p50: float
    p99: float


class Load(msgspec.Struct):
    """One measurement.

    cpu_ms:      the server's CPU time per round; nan where it cannot be read
    client_busy: the client's share of one core; near 1, the client is what limits the rate
    """

    rounds_per_s: float
    cpu_ms: float
    client_busy: float
    latency_ms: Percentiles


class LongContext(msgspec.Struct):
    """The same load on sessions that have `committed` tokens already: cost must not grow with them."""

    committed: int
    verifications_per_s: float
    cpu_ms: float


class Report(msgspec.Struct):
    """Everything measured. Latencies are wall time; `ratio` is verifications over bare echo rounds per second."""

    sessions: int
    verifications_per_s: float
    cpu_ms_per_verification: float
    single_session_ms: Percentiles
    loaded_ms: Percentiles
    echo_rounds_per_s: float
    ratio: float
    echo_cpu_ms_per_round: float
    echo_single_ms: Percentiles
    echo_loaded_ms: Percentiles
    long_context: LongContext
    client_busy: dict[str, float]
    payload_bytes: dict[str, int]
    mean_batch: float
    repeats: int
    seconds: float
    cpus: int
    versions: dict[str, str]


def show(r: Report) -> None:
    table = Table(title=f"{r.sessions} sessions, a null engine, {r.cpus} cores shared with the client")
    table.add_column()
    table.add_column("verifier", justify="right")
    table.add_column("bare echo", justify="right")
    rows = [
        ("rounds per second", f"{r.verifications_per_s:,.0f}", f"{r.echo_rounds_per_s:,.0f}"),
        ("server CPU per round, ms", f"{r.cpu_ms_per_verification:.3f}", f"{r.echo_cpu_ms_per_round:.3f}"),
        (f"the same, {r.long_context.committed} tokens in", f"{r.long_context.cpu_ms:.3f}", ""),
        ("one session alone, p50 / p99, ms", _pair(r.single_session_ms), _pair(r.echo_single_ms)),
        ("all sessions, p50 / p99, ms", _pair(r.loaded_ms), _pair(r.echo_loaded_ms)),
        ("client, share of a core", *(f"{r.client_busy[k]:.2f}" for k in ("verifier", "echo"))),
        ("drafts per engine step", f"{r.mean_batch:.1f}", ""),
        ("bytes out / in per round", f"{r.payload_bytes['draft']} / {r.payload_bytes['verdict']}", "same"),
    ]
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"Verifications are {r.ratio:.2f} of what a bare echo does. Every token was checked.")


def _pair(p: Percentiles) -> str:
    return f"{p.p50:.2f} / {p.p99:.2f}"
