"""`wisp fleet`: hundreds of emulated devices against a live `wisp serve`, over real sockets and in real time.

    for each batching policy:  start a server (or use the one given), run the fleet, stop the server
    then, if asked:            simulate the same, and show both side by side

The server may be a front of several verifiers, and its model a real one: then devices ask what was recorded of it.
Every committed token is held against the script. A run counts as valid only if the machine kept up with it: the
devices' event loop, which is late where it is overloaded, and the verifier's, which then answers pings late.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from wisp.api.process import event_loop_factory
from wisp.api.scrape import read_page
from wisp.core.verify.batching import batching_policy
from wisp.core.errors import ConfigError, UnavailableError
from wisp.core.protocol.messages import Cancel, Welcome
from wisp.edge.address import http_url
from wisp.children import Child
from wisp.sim.commands import one_class, writable
from wisp.sim.compare import differences
from wisp.sim.figures import Engine, Figures, Machine, Totals, Watched, Watching, figures
from wisp.sim.live import Clock, Sockets
from wisp.calibrate.hardware import Measured
from wisp.sim.scenario import Scenario, load_scenario
from wisp.sim.serving import cpu_s, verifier
from wisp.sim.simulate import Fleet, quantile, scripts_of
from wisp.sim.systems import System, system
from wisp.sim.timeline import Timeline
from wisp.sim.world import Counts
from wisp.calibrate.traces.format import TraceSet, trace_folder

LOOP_LAG_MS = 10.0  # p99 above which a run does not count: a draft step of a fast device
SERVER_LAG_MS = 50.0  # likewise
STALL_MS = 10.0  # lateness that is more than timers and a busy loop
STALLED = 0.02  # share of the time that may be lost to it


class Live(Fleet):
    """A fleet whose verifier is elsewhere."""

    handset = Watched


@dataclass
class Mark:
    """What is read at both ends of the window."""

    fleet_s: float
    server_s: float | None
    wall: float
    frames: int
    lags: int
    pings: int
    totals: Totals


Shown = Callable[[float, str], None]  # second of the run, what to say


async def run_live(
    scenario: Scenario, of: System, seed: int, url: str, *, api_key: str | None = None,
    child: Child | None = None, shown: Shown = lambda now, text: None,
) -> Figures:  # fmt: skip
    """One run against the verifier at `url`. `child`: its process, if it is ours.

    Raises ConfigError where that verifier does not serve the scenario's scripts, UnavailableError if it goes away.
    """
    check_live(scenario, of)
    scenario = _as_served(await _greeted(url, api_key), scenario, url)
    scripts = scripts_of(scenario)  # takes seconds, in which no ping would be answered
    sockets = Sockets(url, api_key)
    most = max(n for _, n in scenario.population or ((0.0, scenario.devices_n),))
    welcome = await sockets.connect(most)
    gc.collect()
    gc.freeze()  # a collection that went through all positions would hold the loop up
    env = Timeline()
    broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    clock = sockets.clock = Clock(env, lambda error: None if broken.done() else broken.set_exception(error))
    fleet = Live(scenario, of, seed, env, sockets, scripts, Counts(), welcome.n_vocab)
    pings: list[float] = []
    probe = asyncio.create_task(sockets.probe(pings))
    try:
        fleet.begin()  # at second 0, however late this loop is
        clock.arm()

        async def until(second: float) -> None:
            while clock.now < second:
                await asyncio.wait({broken, probe}, timeout=min(0.5, max(0.0, second - clock.now)))
                if broken.done():
                    broken.result()
                if child is not None:
                    child.check()
                shown(clock.now, f"{sum(r.ended is not None for r in fleet.requests)} answers")

        async def mark() -> Mark:
            totals = await _scrape(http_url(url, "/metrics"))
            server_s = cpu_s(child.process.pid) if child is not None else None
            frames = sockets.frames_in + sockets.frames_out
            lags = len(clock.lags_ms)
            return Mark(time.process_time(), server_s, clock.now, frames, lags, len(pings), totals)

        end = scenario.warmup_s + scenario.window_s
        await until(scenario.warmup_s)
        a = await mark()
        await until(end)
        b = await mark()
        while clock.now < end + scenario.drain_s and fleet.busy():
            await until(min(end + scenario.drain_s, clock.now + 0.5))
        clock.happen(lambda: None)
        found = figures(fleet, where="live", seed=seed)
        if not sockets.redirects:  # a front has no engine, and its replicas' counters end with their lives
            found.engine = Engine.between(a.totals, b.totals, b.wall - a.wall)
        if scenario.as_recorded and not isinstance(
            scenario.profile, Measured
        ):  # no hardware profile says what its steps would have taken alone
            found.mean_interference_ms = found.p99_interference_ms = math.nan
        found.machine = _machine(a, b, clock.lags_ms, pings)
        return found
    finally:
        gc.unfreeze()
        clock.stop()
        if broken.done():
            broken.exception()  # whatever else has gone wrong, this has been seen
        probe.cancel()
        for device in fleet.handsets:
            if device.request is not None:
                sockets.receive(device.index, Cancel(device.drafter.session))
        await sockets.close()


async def _greeted(url: str, api_key: str | None) -> Welcome:
    """What a verifier says that it is. Raises UnavailableError, ConfigError or ProtocolError."""
    sockets = Sockets(url, api_key)
    try:
        return await sockets.connect(1)
    finally:
        await sockets.close()


def check_live(scenario: Scenario, of: System) -> None:
    """Raises ConfigError for what cannot be run live."""
    if scenario.open:
        raise ConfigError(
            "a live fleet has devices that wait for their answers; arrivals are for the simulator"
        )
    if of.beside:
        raise ConfigError(
            f"system {of.name} drafts on the verifier's accelerator: only the simulator has that"
        )
    if scenario.domain:
        raise ConfigError(
            "`wisp serve` says what all traces say: a scenario with a domain is for the simulator"
        )
    for kit in scenario.devices:
        kit.build()


def _as_served(welcome: Welcome, scenario: Scenario, url: str) -> Scenario:
    """The scenario as this verifier serves it. Raises ConfigError if it does not say what devices expect.

    A text is a function of target, prompt, sampling and seed, so what `wisp trace` recorded of a target alone is what
    a verifier of it must say to the same prompt, whatever drafts, replicas and crashes there are between.
    """
    folder = Path(scenario.traces)
    if welcome.engine not in ("emulated", "null"):
        for header in TraceSet.load(trace_folder(folder)).headers:
            of, vocabulary = header["target"]["name"], header["vocabulary"]
            if (of, vocabulary) != (welcome.model, welcome.fingerprint):
                raise ConfigError(
                    f"{folder} was recorded of {of}, and the verifier serves {welcome.model} with "
                    f"{welcome.engine}; record traces of its own with `wisp trace`, or start it with --engine emulated"
                )
        return msgspec.structs.replace(scenario, as_recorded=True)
    if welcome.engine != "emulated" or set(welcome.eos) != scripts_of(scenario).library.eos:
        raise ConfigError(
            f"the verifier at {url} ({welcome.model}, {welcome.engine}) does not say what the devices expect; "
            "start it with --engine emulated and the scenario's --traces and --output-tokens, or leave out --server"
        )
    return scenario


def _machine(a: Mark, b: Mark, lags_ms: list[float], pings_ms: list[float]) -> Machine:
    wall = b.wall - a.wall
    lags, pings = lags_ms[a.lags : b.lags], pings_ms[a.pings : b.pings]
    found = Machine(
        fleet_cpu=(b.fleet_s - a.fleet_s) / wall,
        server_cpu=(b.server_s - a.server_s) / wall
        if a.server_s is not None and b.server_s is not None
        else None,
        loop_lag_ms_p50=quantile(lags, 0.5),
        loop_lag_ms_p99=quantile(lags, 0.99),
        server_lag_ms_p50=quantile(pings, 0.5),
        server_lag_ms_p99=quantile(pings, 0.99),
        stalled=max(sum(x - STALL_MS for x in found if x > STALL_MS) for found in (lags, pings)) / 1e3 / wall,
        frames_per_s=(b.frames - a.frames) / wall,
    )
    for who, lag, most in (
        ("the devices' event loop", found.loop_lag_ms_p99, LOOP_LAG_MS),
        ("the verifier's event loop", found.server_lag_ms_p99, SERVER_LAG_MS),
    ):
        if not lag <= most:
            found.problems.append(f"{who} was late by {lag:.0f} ms (p99); up to {most:g} ms counts as valid")
    if found.stalled > STALLED:
        found.problems.append(
            f"the machine stood still for {found.stalled:.1%} of the time; up to {STALLED:.0%} is valid"
        )
    return found


async def _scrape(url: str) -> Totals:
    """A verifier's counters, from its metrics. Raises UnavailableError."""
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            values = read_page((await client.get(url)).text)
    except httpx.HTTPError as error:
        raise UnavailableError(f"no metrics at {url}: {str(error) or 'no answer'}") from None

    def of(name: str) -> float:
        return values.get(f"wisp:{name}", 0.0)

    return Totals(
        steps=of("engine_step_seconds_count"),
        busy_ms=of("engine_step_seconds_sum") * 1e3,
        slices=of("engine_slices_total"),
        rows=of("engine_tokens_total"),
        tokens=of("generation_tokens_total"),
        drafted=of("spec_decode_num_draft_tokens_total"),
        accepted=of("spec_decode_num_accepted_tokens_total"),
    )


# --- the command


def run_fleet(
    name: str, *, of: str, server: str, policies: list[str], rate: float | None, devices: int | None, seed: int | None,
    window_s: float | None, warmup_s: float | None, against_simulator: bool, as_json: bool, out: Path | None,
) -> int:  # fmt: skip
    """Run, print and write; by default under the scenario's first seed. Returns 0, or 1 if a token was wrong or the
    machine did not keep up."""
    scenario = _changed(load_scenario(name), rate, devices, window_s, warmup_s)
    seed = scenario.seeds[0] if seed is None else seed
    base = system(of)
    systems = [msgspec.structs.replace(base, batching=p) for p in policies] or [base]
    for one in systems:
        batching_policy(one.batching)
        check_live(scenario, one)
    if server and len(systems) > 1:
        raise ConfigError("--policies starts a server for each policy; leave out --server")
    if out is not None:
        writable(out)
    console = Console(stderr=True)
    runs: list[Figures] = []
    for one in systems:
        with _progress(console, scenario, one) as shown:
            runs.append(_one(scenario, one, seed, server, shown))
        if against_simulator:
            with console.status("simulating the same"):
                runs.append(Watching(scenario, one, seed).figures(seed))
    data = msgspec.json.format(msgspec.json.encode(runs if len(runs) > 1 else runs[0]), indent=1)
    if out is not None:
        out.write_bytes(data + b"\n")
    if as_json:
        print(data.decode())
    else:
        _print(runs)
    return int(any(r.mismatches or (r.machine and r.machine.problems) for r in runs))


def _one(scenario: Scenario, of: System, seed: int, server: str, shown: Shown) -> Figures:
    key = os.environ.get("WISP_API_KEY")
    with contextlib.ExitStack() as stack:
        child = None if server else stack.enter_context(verifier(scenario, of))
        url = child.url if child else server
        try:
            with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
                return runner.run(
                    run_live(
                        scenario, of, seed, url, api_key=None if child else key, child=child, shown=shown
                    )
                )
        except UnavailableError as error:
            if child is None:
                raise
            child.check()
            raise child.failed(f"is out of reach: {error}") from None


def _changed(
    s: Scenario, rate: float | None, devices: int | None, window_s: float | None, warmup_s: float | None
) -> Scenario:
    s = one_class(s, rate) if rate is not None else s
    s = s.with_devices(devices) if devices is not None else s
    s = msgspec.structs.replace(s, window_s=window_s) if window_s is not None else s
    return msgspec.structs.replace(s, warmup_s=warmup_s) if warmup_s is not None else s


@contextlib.contextmanager
def _progress(console: Console, scenario: Scenario, of: System) -> Iterator[Shown]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        total = scenario.warmup_s + scenario.window_s
        task = progress.add_task(f"{of.name}, {of.batching}", total=total, text="starting a server")
        yield lambda now, text: progress.update(task, completed=min(now, total), text=text)


# --- tables


def _print(runs: list[Figures]) -> None:
    console = Console()
    live = [r for r in runs if r.where == "live"]
    first = runs[0]
    rates = ", ".join(f"{r:g}" for r in first.rates)
    title = f"{first.scenario}: {first.devices} devices that want {rates} tokens/s, {first.duration:g} s"
    table = Table(title=title)
    for heading in (
        "",
        *(f"{r.system}, {r.batching}" + ("" if r.where == "live" else " (sim)") for r in runs),
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for label, text in _ROWS:
        table.add_row(label, *(text(r) for r in runs))
    console.print(table)
    for a, b in itertools.pairwise(runs):
        if a.where == "live" and b.where == "simulator":
            console.print(f"live against simulated ({a.system}, {a.batching}):")
            for d in differences(a, b):
                console.print(f"  {d.name} {d}")
    checked, wrong = sum(r.tokens_checked for r in live), sum(r.mismatches for r in live)
    console.print(f"{checked:,} tokens held against their scripts, {wrong} wrong.")
    for r in live:
        for problem in r.machine.problems if r.machine else ():
            console.print(f"NOT VALID ({r.system}, {r.batching}): {problem}", style="bold red")


def _engine(text: Callable[[Engine], str]) -> Callable[[Figures], str]:
    return lambda r: text(r.engine) if r.engine else ""


def _on_machine(text: Callable[[Machine], str]) -> Callable[[Figures], str]:
    return lambda r: text(r.machine) if r.machine else ""


_ROWS: list[tuple[str, Callable[[Figures], str]]] = [
    ("requests arrived / met", lambda r: f"{r.arrived} / {r.met}"),
    ("attainment", lambda r: f"{r.attainment:.1%}" if r.arrived else "nothing arrived"),
    ("within 10 % / 1 % violations",
     lambda r: " / ".join(_yes(r.violation_rate <= x) for x in (0.1, 0.01)) if r.arrived else ""),
    ("goodput, tokens/s", lambda r: f"{r.goodput:,.0f}"),
    ("output, tokens/s", lambda r: f"{r.output_throughput:,.0f}"),
    ("TTFT p50 / p99, ms", lambda r: f"{r.median_ttft_ms:,.0f} / {r.p99_ttft_ms:,.0f}"),
    ("TPOT p50 / p99, ms", lambda r: f"{r.median_tpot_ms:.1f} / {r.p99_tpot_ms:.1f}"),
    ("chunks p50 / p99, ms", lambda r: f"{r.median_itl_ms:.0f} / {r.p99_itl_ms:.0f}"),
    ("interference mean / p99, ms",
     lambda r: f"{r.mean_interference_ms:.1f} / {r.p99_interference_ms:.1f}".replace("nan / nan", "")),
    ("drafting, share of time", lambda r: f"{r.drafting_busy:.0%}"),
    ("engine busy", _engine(lambda e: f"{e.utilisation:.0%}")),
    ("step, ms", _engine(lambda e: f"{e.step_ms:.1f}")),
    ("sequences / tokens per step", _engine(lambda e: f"{e.slices_per_step:.1f} / {e.rows_per_step:.1f}")),
    ("draft tokens accepted", _engine(lambda e: f"{e.acceptance:.0%}")),
    ("CPU of fleet / server, cores",
     _on_machine(lambda m: f"{m.fleet_cpu:.2f} / " + ("?" if m.server_cpu is None else f"{m.server_cpu:.2f}"))),
    ("lag of fleet p50 / p99, ms", _on_machine(lambda m: f"{m.loop_lag_ms_p50:.1f} / {m.loop_lag_ms_p99:.1f}")),
    ("stood still, share of time", _on_machine(lambda m: f"{m.stalled:.1%}")),
    ("lag of server p50 / p99, ms", _on_machine(lambda m: f"{m.server_lag_ms_p50:.1f} / {m.server_lag_ms_p99:.1f}")),
]  # fmt: skip


def _yes(it_is: bool) -> str:
    return "yes" if it_is else "no"
