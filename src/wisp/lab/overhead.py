"""`wisp bench-overhead`: what a verification costs beside the engine.

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
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from wisp.api.process import event_loop_factory
from wisp.core.errors import ProtocolError, UnavailableError
from wisp.core.messages import (
    SUBPROTOCOL,
    Cancel,
    Draft,
    Hello,
    Open,
    Verdict,
    decode_from_cloud,
    encode,
)
from wisp.core.messages import VERSION as PROTOCOL
from wisp.core.sampling import Sampling
from wisp.engines.null import null_token

REPEATS = 3  # of A and of B
DRAFT = 4  # tokens per draft
RIGHT = (4, 4, 2, 4, 0)  # how many of them agree, in turn: 70 %
MAX_TOKENS = 128  # per session; then it is opened again
PROMPT = 64  # tokens, of which half are the same for all sessions
LONG = 2000  # tokens committed before the long sessions go on
SEEDS = 8  # different outputs
START_S = 30.0  # for a process to answer


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


# --- what a session says, and what it must hear


class Round(msgspec.Struct, frozen=True):
    """A frame to send and the answer that is due: (round, base, accepted, tokens, finish), None for any."""

    frame: bytes
    answer: tuple[int, int, int, list[int], str] | None = None


class Script(msgspec.Struct, frozen=True):
    """One session from start to end, encoded beforehand, and the frame that ends it in between."""

    rounds: list[Round]
    cancel: bytes = b""


def script(index: int, truth: list[int], seed: int, committed: int = 0) -> Script:
    """Session `index`, whose output is `truth`, of which `committed` tokens are there at the start."""
    name = f"overhead-{index}"
    rounds: list[Round] = []
    base = committed
    while base < len(truth):
        number, room = len(rounds), len(truth) - base
        right = RIGHT[number % len(RIGHT)]
        draft = [t if i < right else (t + 1) % 256 for i, t in enumerate(truth[base : base + DRAFT])]
        n = min(right + 1, room)  # tokens of the verdict
        answer = (number, base, n - 1, truth[base : base + n], "length" if n == room else "")
        frame = encode(Draft(name, number, base, draft))
        if number == 0:
            sampling = Sampling(seed=seed)
            frame = encode(
                Open(name, 0, _prompt(index), sampling, len(truth), committed=truth[:base], draft=draft)
            )
        rounds.append(Round(frame, answer))
        base += n
    return Script(rounds, encode(Cancel(name)))


def _prompt(index: int) -> list[int]:
    """Half the same for all, half this session's own."""
    half = range(PROMPT // 2)
    return [*half, *((index * 7 + i * i) % 256 for i in half)]


def scripts(sessions: int, committed: int = 0) -> list[Script]:
    """One for each session; they share `SEEDS` outputs."""
    truths = [
        [null_token(seed, position) for position in range(committed + MAX_TOKENS)] for seed in range(SEEDS)
    ]
    return [script(i, truths[i % SEEDS], i % SEEDS, committed) for i in range(sessions)]


# --- the client


class Tally:
    """What the sessions of one measurement have seen."""

    def __init__(self) -> None:
        self.latencies: list[float] = []  # seconds
        self.bytes_out = 0
        self.bytes_in = 0

    @property
    def rounds(self) -> int:
        """Answers so far."""
        return len(self.latencies)


async def play(peer: ClientConnection, script_: Script, until: float, tally: Tally) -> None:
    """Repeat the script until the clock says `until`. Raises ProtocolError if an answer is wrong."""
    clock = time.perf_counter
    while True:
        for round_ in script_.rounds:
            sent = clock()
            await peer.send(round_.frame)
            answer = await peer.recv()
            now = clock()
            tally.latencies.append(now - sent)
            tally.bytes_out += len(round_.frame)
            tally.bytes_in += len(answer)
            if round_.answer is not None:
                _check(answer, round_)
            if now >= until:
                if script_.cancel:
                    await peer.send(script_.cancel)
                return


def _check(frame: str | bytes, due: Round) -> None:
    assert isinstance(frame, bytes)
    v = decode_from_cloud(frame)
    if not isinstance(v, Verdict) or (v.round, v.base, v.accepted, v.tokens, v.finish) != due.answer:
        raise ProtocolError("wrong_answer", f"expected {due.answer}, got {v}")


@contextlib.asynccontextmanager
async def connected(url: str, n: int) -> AsyncIterator[list[ClientConnection]]:
    """`n` connections to a verifier (they say hello) or an echo server."""
    gate = asyncio.Semaphore(32)

    async def one() -> ClientConnection:
        async with gate:
            peer = await connect(
                url,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,
                proxy=None,
                ping_interval=None,
            )
            await peer.send(encode(Hello(PROTOCOL, client="bench-overhead")))
            await peer.recv()
            return peer

    peers = await asyncio.gather(*(one() for _ in range(n)))
    try:
        yield peers
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))


async def measure(server: Server, plan: Sequence[Script], seconds: float) -> tuple[Load, Tally]:
    """Load `server` with one session per script for `seconds`."""
    tally = Tally()
    async with connected(server.url, len(plan)) as peers:
        cpu, busy, start = server.cpu_s(), time.process_time(), time.perf_counter()
        until = start + seconds
        await asyncio.gather(*(play(*pair, until, tally) for pair in zip(peers, plan, strict=True)))
        wall = time.perf_counter() - start
        cpu, busy = server.cpu_s() - cpu, time.process_time() - busy
    n = tally.rounds
    return Load(n / wall, cpu / n * 1e3, busy / wall, percentiles(tally.latencies)), tally


def percentiles(seconds: list[float]) -> Percentiles:
    """Of latencies in seconds."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[min(int(len(ordered) * q), len(ordered) - 1)] * 1e3 for q in (0.5, 0.99))
    return Percentiles(round(p50, 4), round(p99, 4))


# --- the servers


class Server:
    """A server process on a port of this machine."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, path: str) -> None:
        self.process = process
        self.url = f"ws://127.0.0.1:{port}{path}"
        self.http = f"http://127.0.0.1:{port}"

    def cpu_s(self) -> float:
        """CPU time so far, user and system, all threads; nan where there is no /proc."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return float("nan")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


Case = tuple[Server, Sequence[Script]]


@contextlib.contextmanager
def started(arguments: Callable[[int], list[str]], path: str) -> Iterator[Server]:
    """Run `python <arguments(port)>` on a free port, without this process's WISP settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WISP_")}
    process = subprocess.Popen([sys.executable, *arguments(port)], env=environment)
    try:
        yield Server(process, port, path)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def verifier(sessions: int) -> contextlib.AbstractContextManager[Server]:
    """`wisp serve` with the null engine."""
    flags = ["--engine", "null", "--target", "null", "--log-level", "warning", "--drain-s", "0"]
    room = ["--max-sessions", str(2 * sessions + 64)]
    return started(
        lambda port: ["-m", "wisp.cli", "serve", *flags, *room, "--port", str(port)], "/v1/sessions"
    )


def echo(reply_bytes: int) -> contextlib.AbstractContextManager[Server]:
    """A bare `websockets` server that answers every frame with `reply_bytes` bytes."""
    return started(lambda port: ["-m", "wisp.lab.overhead", str(port), str(reply_bytes)], "/")


async def ready(server: Server) -> None:
    """Wait until `server` can take sessions. Raises UnavailableError if it does not come up."""
    deadline = time.monotonic() + START_S
    async with httpx.AsyncClient(trust_env=False) as client:
        while time.monotonic() < deadline and server.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{server.http}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
    raise UnavailableError("a server for the benchmark did not start")


async def steps(server: Server) -> tuple[float, float]:
    """Engine steps and slices of a verifier so far."""
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"{server.http}/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return float(values["wisp:engine_step_seconds_count"]), float(values["wisp:engine_slices_total"])


async def serve_echo(port: int, reply_bytes: int) -> None:
    """The bare server: one task per connection, one answer per frame."""
    reply = bytes(reply_bytes)

    async def answer(peer: ServerConnection) -> None:
        async for _ in peer:
            await peer.send(reply)

    def health(peer: ServerConnection, request: Request) -> Response | None:
        return peer.respond(HTTPStatus.OK, "ok") if request.path == "/health" else None

    async with serve(answer, "127.0.0.1", port, compression=None, process_request=health) as server:
        await server.serve_forever()


# --- the measurement


async def measure_all(sessions: int, seconds: float) -> Report:
    """Verifier and echo in turn. Takes about (2 * REPEATS + 2) * `seconds`."""
    plan = scripts(sessions)
    with verifier(sessions) as ours:
        await ready(ours)
        await measure(ours, plan[:1], seconds / 4)  # warm-up
        single, seen = await measure(ours, plan[:1], seconds / 2)
        sizes = {"draft": seen.bytes_out // seen.rounds, "verdict": seen.bytes_in // seen.rounds}
        frame = Script([Round(bytes(sizes["draft"]))])
        with echo(sizes["verdict"]) as theirs:
            await ready(theirs)
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
    """Each figure's median."""

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


# --- the command


def run_bench(*, sessions: int, seconds: float, as_json: bool) -> int:
    """Measure and print. Returns the exit code: 0. Raises UnavailableError if a server does not start."""
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        report = runner.run(measure_all(sessions, seconds))
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        _print(report)
    return 0


def _print(r: Report) -> None:
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


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=event_loop_factory()) as _runner:
        _runner.run(serve_echo(int(sys.argv[1]), int(sys.argv[2])))
