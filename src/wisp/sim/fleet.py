"""`wisp sim fleet`: hundreds of emulated devices against a live `wisp serve`, over real sockets and in real time.

    for each batching policy:  start a server (or use the one given), run the fleet, stop the server
    then, if asked:            simulate the same, and show both side by side

The server may be a router of several verifiers, and its model a real one: then the requests are recorded ones. Every
committed token is compared with the script. A run is valid only if the machine kept up with it: an overloaded event
loop of the devices is late, and an overloaded verifier answers pings late.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from rich.console import Console

from wisp.api.process import event_loop_factory
from wisp.api.scrape import read_page
from wisp.calibrate.traces.format import TraceSet, trace_folder
from wisp.children import Child, run_beside
from wisp.core.errors import ConfigError, UnavailableError
from wisp.core.protocol.messages import Cancel, Welcome
from wisp.core.verify.batching import batching_policy
from wisp.edge.address import http_url
from wisp.outputs import writable
from wisp.progress import progress_bar
from wisp.sim.commands import one_class
from wisp.sim.differences import differences
from wisp.sim.live import Clock, Sockets
from wisp.sim.report import Engine, Machine, Report, report
from wisp.sim.report_table import table
from wisp.sim.scenario import Scenario, load_scenario
from wisp.sim.serving import cpu_s, verifier
from wisp.sim.sim_verifier import VerifierCounts
from wisp.sim.simulate import Fleet, Simulation, most_devices, quantile, scripts_of
from wisp.sim.systems import System, system
from wisp.sim.timeline import Timeline

LOOP_LAG_MS = 10.0  # p99 above which a run does not count: a draft step of a fast device
SERVER_LAG_MS = 50.0  # likewise
STALL_MS = 10.0  # lateness that is more than timers and a busy loop
STALLED = 0.02  # share of the time that may be lost to it


class Mark(NamedTuple):
    """Counters at one end of the window. CPU time of fleet and server in s; lags, pings: how many were measured."""

    fleet_s: float
    server_s: float | None
    wall: float
    frames: int
    lags: int
    pings: int
    engine: VerifierCounts


Shown = Callable[[float, str], None]  # second of the run, a word on progress


async def run_live(
    scenario: Scenario, of: System, seed: int, url: str, *, api_key: str | None = None,
    child: Child | None = None, shown: Shown = lambda now, text: None,
) -> Report:  # fmt: skip
    """One run against the verifier at `url`. `child`: its process, if this one started it.

    Raises ConfigError where that verifier does not serve the scenario's scripts, UnavailableError if it goes away.
    """
    check_live(scenario, of)
    scenario = _as_served(await _greeted(url, api_key), scenario, url)
    scripts = scripts_of(scenario)  # takes seconds, in which no ping would be answered
    sockets = Sockets(url, api_key)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(sockets.close)
        welcome = await sockets.connect(max(1, most_devices(scenario, seed)))
        sockets.check()
        gc.collect()
        gc.freeze()  # a collection that went through all positions would hold the loop up
        stack.callback(gc.unfreeze)
        env = Timeline()
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        broken.add_done_callback(asyncio.Future.exception)  # marks it as seen, next to any other error
        clock = Clock(env, lambda error: None if broken.done() else broken.set_exception(error))
        stack.callback(clock.stop)
        sockets.clock = clock
        fleet = Fleet(scenario, of, seed, env, sockets, scripts, n_vocab=welcome.n_vocab)
        stack.callback(_cancel, fleet, sockets)
        fleet.shared.max_draft = welcome.max_draft
        fleet.shared.branches = min(fleet.shared.branches, welcome.max_branches)
        pings: list[float] = []
        probe = asyncio.create_task(sockets.probe(pings))
        stack.callback(probe.cancel)
        fleet.begin()  # at second 0, however late this loop is
        clock.arm()

        async def until(second: float) -> None:
            while clock.now < second:
                left_s = min(0.5, max(0.0, second - clock.now))
                ended, _ = await asyncio.wait(
                    (broken, probe), timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                for why in sorted(ended, key=lambda each: each is probe):
                    why.result()
                if child is not None:
                    child.check()
                shown(clock.now, f"{sum(r.ended is not None for r in fleet.requests)} answers")

        async def mark() -> Mark:
            engine = await _scrape(http_url(url, "/metrics"))
            server_s = cpu_s(child.process.pid) if child is not None else None
            frames = sockets.frames_in + sockets.frames_out
            lags = len(clock.lags_ms)
            return Mark(time.process_time(), server_s, clock.now, frames, lags, len(pings), engine)

        end = scenario.warmup_s + scenario.window_s
        await until(scenario.warmup_s)
        a = await mark()
        await until(end)
        b = await mark()
        while clock.now < end + scenario.drain_s and fleet.busy():
            await until(min(end + scenario.drain_s, clock.now + 0.5))
        clock.happen(lambda: None)
        engine = None
        if not sockets.redirects:  # a router has no engine, and its replicas' counters end with them
            engine = Engine.between(a.engine, b.engine, b.wall - a.wall)
        return report(fleet, engine=engine, machine=_machine(a, b, clock.lags_ms, pings))


def _cancel(fleet: Fleet, sockets: Sockets) -> None:
    """Let go of what is under way at the end."""
    for device in fleet.devices:
        if device.generation is not None:
            sockets.receive(device.index, Cancel(device.generation.drafter.session))


async def _greeted(url: str, api_key: str | None) -> Welcome:
    """A verifier's welcome. Raises UnavailableError, ConfigError or ProtocolError."""
    sockets = Sockets(url, api_key)
    try:
        return await sockets.connect(1)
    finally:
        await sockets.close()


def check_live(scenario: Scenario, of: System) -> None:
    """Raises ConfigError for a scenario or system that only the simulator has."""
    if of.beside:
        raise ConfigError(
            f"system {of.name} drafts on the verifier's accelerator: only the simulator has that"
        )
    if scenario.domain:
        raise ConfigError(
            "`wisp serve` speaks from all traces: a scenario with a domain is for the simulator"
        )
    for kit in scenario.devices:
        kit.build()


def _as_served(welcome: Welcome, scenario: Scenario, url: str) -> Scenario:
    """The scenario as this verifier serves it. Raises ConfigError if its text is not that of the scripts.

    A text is a function of target, prompt, sampling and seed. So a verifier must answer a recorded prompt with the text
    that `wisp trace` recorded of its target alone, whatever drafts, replicas and crashes there are between.
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
    server_s = b.server_s - a.server_s if a.server_s is not None and b.server_s is not None else None
    lag, ping = quantile(lags, 0.99), quantile(pings, 0.99)
    stalled = max(sum(x - STALL_MS for x in late if x > STALL_MS) for late in (lags, pings)) / 1e3 / wall
    problems = [
        f"{loop} was late by {late:.0f} ms (p99); up to {most:g} ms counts as valid"
        for loop, late, most in (
            ("the devices' event loop", lag, LOOP_LAG_MS),
            ("the verifier's event loop", ping, SERVER_LAG_MS),
        )
        if not late <= most
    ]
    if stalled > STALLED:
        problems.append(
            f"the machine stood still for {stalled:.1%} of the time; up to {STALLED:.0%} is valid"
        )
    return Machine(
        fleet_cpu=(b.fleet_s - a.fleet_s) / wall,
        server_cpu=None if server_s is None else server_s / wall,
        loop_lag_ms_p50=quantile(lags, 0.5),
        loop_lag_ms_p99=lag,
        server_lag_ms_p50=quantile(pings, 0.5),
        server_lag_ms_p99=ping,
        stalled=stalled,
        frames_per_s=(b.frames - a.frames) / wall,
        problems=tuple(problems),
    )


async def _scrape(url: str) -> VerifierCounts:
    """A verifier's counters, from its metrics. Raises UnavailableError."""
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            values = read_page((await client.get(url)).text)
    except httpx.HTTPError as error:
        raise UnavailableError(f"no metrics at {url}: {str(error) or 'no answer'}") from None

    def of(name: str) -> float:
        return values.get(f"wisp:{name}", 0.0)

    return VerifierCounts(
        steps=int(of("engine_step_seconds_count")),
        busy_ms=of("engine_step_seconds_sum") * 1e3,
        slices=int(of("engine_slices_total")),
        rows=int(of("engine_tokens_total")),
        tokens=int(of("generation_tokens_total")),
        draft_rows=int(of("spec_decode_num_draft_tokens_total")),
        accepted=int(of("spec_decode_num_accepted_tokens_total")),
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
    runs: list[Report] = []
    for one in systems:
        with progress_bar() as tell:
            tell(f"{one.name}, {one.batching}: starting a server", 0.0, scenario.warmup_s + scenario.window_s)

            def shown(now: float, text: str, of: System = one) -> None:
                tell(f"{of.name}, {of.batching}: {text}", now, scenario.warmup_s + scenario.window_s)

            runs.append(_one(scenario, one, seed, server, shown))
        if against_simulator:
            with console.status("simulating the same"):
                simulation = Simulation(scenario, one, seed)
                simulation.run()
                runs.append(report(simulation))
    found = [r.benchmark() for r in runs]
    data = msgspec.json.format(msgspec.json.encode(found if len(found) > 1 else found[0]), indent=1)
    if out is not None:
        out.write_bytes(data + b"\n")
    if as_json:
        print(data.decode())
    else:
        _print(runs)
    return int(any(r.mismatches or (r.machine and r.machine.problems) for r in runs))


def run_once(scenario: Scenario, of: System, seed: int) -> Report:
    """One run on a server of our own."""
    check_live(scenario, of)
    return _one(scenario, of, seed, "", lambda now, text: None)


def _one(scenario: Scenario, of: System, seed: int, server: str, shown: Shown) -> Report:
    key = os.environ.get("WISP_API_KEY")
    with contextlib.ExitStack() as stack:
        child = None if server else stack.enter_context(verifier(scenario, of))
        url = child.url if child else server
        try:
            with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
                return run_beside(
                    runner,
                    run_live(
                        scenario, of, seed, url, api_key=None if child else key, child=child, shown=shown
                    ),
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


def _print(runs: list[Report]) -> None:
    console = Console()
    console.print(table(runs))
    for a, b in itertools.pairwise(runs):
        if a.where == "live" and b.where == "simulator":
            console.print(f"live against simulated ({a.system}, {a.batching}):")
            for d in differences(a, b):
                console.print(f"  {d.name} {d}")
    live = [r for r in runs if r.where == "live"]
    checked, wrong = sum(r.tokens_checked for r in live), sum(r.mismatches for r in live)
    console.print(f"{checked:,} tokens compared with their scripts, {wrong} wrong.")
    for r in live:
        for problem in r.machine.problems if r.machine else ():
            console.print(f"NOT VALID ({r.system}, {r.batching}): {problem}", style="bold red")
