"""`wisp sim fleet`: emulated devices against a live verifier. Every run here is a second of real time.

What devices ask first, they ask at second 0 and get in the end, whatever the machine does meanwhile: that is what tests
hold on to. How fast a verifier is, and how near to a simulation, is for `wisp sim fleet` and the
experiment `reality`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from waiting import PATIENCE_S
from wisp.api.process import event_loop_factory
from wisp.children import Child
from wisp.cli import app
from wisp.core.draft.itinerary import HOME
from wisp.core.errors import ConfigError, ProtocolError, UnavailableError
from wisp.core.protocol.messages import (
    SUBPROTOCOL,
    VERSION,
    Draft,
    Message,
    Open,
    Redirect,
    Refused,
    Verdict,
    Welcome,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.edge.link import LOST
from wisp.engines.emulated import HARDWARE, hardware
from wisp.sim import serving
from wisp.sim.fleet import check_live, run_live
from wisp.sim.live import Clock, Sockets
from wisp.sim.report import Engine, Report, report
from wisp.sim.request import Request
from wisp.sim.scenario import Kit, Scenario, SloClass
from wisp.sim.serving import verifier
from wisp.sim.sim_device import Generation, SimDevice
from wisp.sim.simulate import Fleet, Simulation, scripts_of
from wisp.sim.systems import system
from wisp.sim.timeline import Timeline
from wisp.sim.wire import Wire

DEVICES = 12
OURS = "wisp,admission=no"  # who would be late here is served all the same


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Short answers from hardware ten times as fast as an A100, for two classes of users on two kinds of devices."""
    profile = (HARDWARE / "a100-qwen3-32b.toml").read_text()
    lines = [
        line for line in profile.splitlines() if not line.startswith(("bandwidth ", "tflops ", "launch_ms"))
    ]
    fast = tmp_path_factory.mktemp("hardware") / "fast.toml"
    fast.write_text("\n".join([*lines, "bandwidth = 20000.0", "tflops = 3000.0", "launch_ms = 0.5", ""]))
    return Scenario(
        title="a quick one",
        hardware=str(fast),
        slo=(SloClass(20.0, share=0.5, name="fast"), SloClass(10.0, share=0.5, name="slow")),
        devices=(Kit("200", rtt_ms=10.0, share=0.5), Kit("100", rtt_ms=20.0, jitter_ms=4.0, share=0.5)),
        prompt_tokens=(10, 40),
        output_tokens=(8, 24),
        devices_n=DEVICES,
        warmup_s=0.0,  # so nobody joins later than at second 0
        window_s=0.8,
        drain_s=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def server(quick: Scenario) -> Iterator[Child]:
    """`wisp serve` as a child process; not all tests need one of their own."""
    with verifier(quick, system(OURS)) as child:
        yield child


def written(s: Scenario, folder: Path) -> str:
    """The scenario as a file: msgspec reads TOML by itself, but does not write it."""
    tables = [f"[[slo]]\nname = '{c.name}'\nrate = {c.rate}\nshare = {c.share}" for c in s.slo]
    tables += [
        f"[[devices]]\ndevice = '{k.device}'\nrtt_ms = {k.rtt_ms}\nshare = {k.share}" for k in s.devices
    ]
    lines = [f"title = '{s.title}'", f"hardware = '{s.hardware}'", f"devices_n = {s.devices_n}"]
    lines += [f"{name} = {list(getattr(s, name))}" for name in ("prompt_tokens", "output_tokens")]
    lines += [f"{name} = {getattr(s, name)}" for name in ("warmup_s", "window_s", "drain_s")]
    path = folder / "scenario.toml"
    path.write_text("\n".join([*lines, *tables, ""]))
    return str(path)


def play(scenario: Scenario, name: str, server: Child, seed: int = 1) -> Report:
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        return runner.run(run_live(scenario, system(name), seed, server.url, child=server))


@pytest.fixture(scope="module")
def ours(quick: Scenario, server: Child) -> Report:
    """A run that several tests look at."""
    return play(quick, OURS, server)


@pytest.mark.parametrize("name", ["central", "paper"])
def test_every_token_that_devices_see_is_the_scripts(name: str, quick: Scenario, server: Child) -> None:
    found = play(quick, name, server)
    served_and_exact(found)
    assert (found.drafting_busy > 0) == (name != "central")


def test_also_with_drafting_ahead_and_server_mode(ours: Report) -> None:
    served_and_exact(ours)


def served_and_exact(found: Report) -> None:
    assert found.mismatches == 0
    assert found.tokens_checked >= found.total_output_tokens > 100
    assert found.completed + found.failed + found.unfinished == found.arrived >= DEVICES
    assert found.failed == found.unfinished == 0


def test_the_report_has_what_benchmark_tools_look_for(ours: Report) -> None:
    found = json.loads(msgspec.json.encode(ours.benchmark()))
    for latency in ("ttft", "tpot", "itl", "e2el"):
        mean, median, p99 = (found[f"{which}_{latency}_ms"] for which in ("mean", "median", "p99"))
        assert 0 <= median <= p99
        assert mean >= 0
    assert found["median_ttft_ms"] >= 10.0  # the nearer devices' round trip
    assert found["goodput"] <= found["output_throughput"]
    assert found["request_goodput"] <= found["request_throughput"]
    assert found["violation_rate"] == pytest.approx(1 - found["met"] / found["arrived"])
    assert [c["name"] for c in found["by_class"]] == ["fast", "slow"]
    assert sum(c["arrived"] for c in found["by_class"]) == found["arrived"]
    machine = found["machine"]
    assert machine["fleet_cpu"] > 0
    assert machine["server_cpu"] >= 0
    assert machine["loop_lag_ms_p99"] >= machine["loop_lag_ms_p50"] >= 0
    assert found["engine"].keys() == set(Engine.__struct_fields__)


def test_a_wrong_token_is_counted(quick: Scenario, server: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = SimDevice.start

    def start(self: SimDevice, request: Request) -> None:
        begin(self, request)
        if self.index == 3:
            assert self.generation is not None
            self.generation.script.tokens[5] += 1  # this device believes in another text

    monkeypatch.setattr(SimDevice, "start", start)
    assert play(quick, "central", server).mismatches > 0


class Fickle(SimDevice):
    """Every third device is switched off when it has read the beginning of its first answer."""

    def _read(self, generation: Generation, verdict: Verdict) -> None:
        super()._read(generation, verdict)
        if self.index % 3 == 1:
            self.vanish()


def test_devices_come_go_and_vanish(quick: Scenario, server: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "device_class", Fickle)
    scenario = msgspec.structs.replace(quick, population=((0.0, 4), (0.3, 10), (0.6, 6)), think_s=0.05)
    found = play(scenario, OURS, server)
    assert found.devices == 10
    assert found.mismatches == 0
    assert found.failed == 3  # of devices 1, 4 and 7
    assert found.arrived >= 10
    assert found.completed == found.arrived - found.failed


def test_requests_that_come_by_themselves_each_have_a_device(
    quick: Scenario, server: Child, tmp_path: Path
) -> None:
    """Twelve of them at once, and one that comes after the run: live, they are the simulator's own."""
    path = tmp_path / "arrivals.jsonl"
    path.write_text('{"at_s": 0.2, "prompt_tokens": 30}\n' * 12 + '{"at_s": 9999, "prompt_tokens": 30}\n')
    scenario = msgspec.structs.replace(quick, devices_n=1, arrivals=str(path))
    found = play(scenario, OURS, server)
    simulation = Simulation(scenario, system(OURS), 1)
    simulation.run()
    assert found.arrived == report(simulation).arrived == 12
    assert found.devices == 12
    served_and_exact(found)


def test_a_full_verifier_is_asked_again_later(quick: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that are refused count as missed, and their devices wait as they are told: beyond the window."""
    monkeypatch.setattr(serving, "MOST_SESSIONS", 3)
    with verifier(quick, system(OURS)) as child:
        found = play(quick, OURS, child)
    assert 0 < found.refused == found.failed <= DEVICES
    assert found.completed == found.arrived - found.refused > 0
    assert found.mismatches == 0


# --- what goes wrong


def test_a_verifier_that_says_something_else_is_refused(
    quick: Scenario, server: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts_of(quick).library, "eos", frozenset({1}))
    with pytest.raises(ConfigError, match="does not say what the devices expect"):
        play(quick, "wisp", server)


def test_nobody_there() -> None:
    with (
        asyncio.Runner(loop_factory=event_loop_factory()) as runner,
        pytest.raises(UnavailableError, match="no verifier at"),
    ):
        runner.run(Sockets("http://127.0.0.1:9").connect(2))


def test_a_verifier_that_dies_ends_the_run(quick: Scenario) -> None:
    scenario = msgspec.structs.replace(quick, window_s=30.0)
    with verifier(quick, system("wisp")) as child:

        async def run() -> None:
            asyncio.get_running_loop().call_later(0.7, child.process.kill)
            await run_live(scenario, system("wisp"), 1, child.url)

        with asyncio.Runner(loop_factory=event_loop_factory()) as runner, pytest.raises(UnavailableError):
            runner.run(run())


@pytest.mark.parametrize(
    ("change", "of"),
    [({"domain": "code"}, "wisp"), ({}, "central-speculative")],
)
def test_options_of_the_simulator_alone_are_refused_by_name(
    change: dict[str, object], of: str, quick: Scenario
) -> None:
    with pytest.raises(ConfigError, match="simulator"):
        check_live(msgspec.structs.replace(quick, **change), system(of))


def test_a_server_of_ones_own_has_the_scenarios_hardware_as_it_is_changed(
    tmp_path: Path, quick: Scenario
) -> None:
    def target(scenario: Scenario, spec: str) -> str:
        arguments = serving.serve_arguments(scenario, system(spec), 1, tmp_path)
        return arguments[arguments.index("--target") + 1]

    assert target(quick, "wisp") == quick.hardware
    changed = hardware(target(msgspec.structs.replace(quick, overlap=3.0), "central,step_tokens=128"))
    assert changed == msgspec.structs.replace(hardware(quick.hardware), overlap=3.0, step_tokens=128)


def test_a_profile_without_measurements_of_its_overlap_can_be_changed_too(
    tmp_path: Path, quick: Scenario
) -> None:
    lines = Path(quick.hardware).read_text().splitlines()
    own = tmp_path / "own.toml"
    own.write_text("\n".join(line for line in lines if not line.startswith("overlap")))
    scenario = msgspec.structs.replace(quick, hardware=str(own), overlap=3.0)
    arguments = serving.serve_arguments(scenario, system("central"), 1, tmp_path)
    changed = hardware(arguments[arguments.index("--target") + 1])
    assert changed == msgspec.structs.replace(hardware(str(own)), overlap=3.0)


# --- where a router sends a session (`core.draft.itinerary`), and what its device is told of it

WELCOME = Welcome(VERSION, "m", "f", 1000, [999], 512, 64, digest="d1")
OPENING = Open("session-1", 0, [1, 2, 3], Sampling(), 20, digest="d1")


class FakeWire(Wire):
    """A connection that is there. `sent` is what went out on it."""

    def __init__(self) -> None:
        super().__init__("ws://127.0.0.1:9", {}, lambda frame: None, lambda why: None)
        self.welcome = WELCOME
        self.sent: list[Message] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(msgspec.msgpack.decode(frame, type=Open | Draft))


def behind_a_router(scenario: Callable[[Sockets, FakeWire, FakeWire, list[object]], None]) -> None:
    """`scenario` gets a device's sockets, the wires to the router and to :8101, and what the device is told."""

    def what(env: Timeline, clock: Clock) -> None:
        sockets, home, away = Sockets("http://127.0.0.1:9"), FakeWire(), FakeWire()
        told: list[object] = []
        sockets.clock, sockets.senders[0], sockets._digests[0] = clock, told.append, "d1"
        sockets._wires[0] = {HOME: home, ":8101": away}
        scenario(sockets, home, away, told)

    on_a_loop(what, 0.1)


def test_a_session_repeats_to_a_verifier_what_it_told_the_router() -> None:
    def scenario(sockets: Sockets, home: FakeWire, away: FakeWire, told: list[object]) -> None:
        first, second = (Draft("session-1", n, n, [n]) for n in (1, 2))
        sockets.receive(0, OPENING)
        sockets.receive(0, first)
        sockets._take(0, HOME, Redirect("another-1", ":8101"))
        assert away.sent == []
        sockets._take(0, HOME, Redirect("session-1", ":8101"))
        assert home.sent == away.sent == [OPENING, first]
        sockets.receive(0, second)  # sent ahead of the first verdict
        assert away.sent == [OPENING, first, second]
        assert told == []

    behind_a_router(scenario)


def test_a_session_that_comes_home_avoids_the_verifier_that_refused_it() -> None:
    def scenario(sockets: Sockets, home: FakeWire, away: FakeWire, told: list[object]) -> None:
        sockets.receive(0, OPENING)
        sockets._take(0, HOME, Redirect("session-1", ":8101"))
        sockets._take(0, ":8101", LOST)  # a lost verifier may come back
        back = told.pop()
        assert isinstance(back, Refused)
        assert (back.session, back.code, back.retry_after) == ("session-1", "unknown_session", 0.0)
        sockets.receive(0, OPENING)
        assert home.sent == [OPENING, OPENING]
        sockets._take(0, HOME, Redirect("session-1", ":8101"))
        refused = Refused("session-1", "overloaded", "full", 9.0)
        sockets._take(0, ":8101", refused)
        full = told.pop()
        assert isinstance(full, Refused)
        assert full.code == "unknown_session"
        assert 0.0 < full.retry_after < 9.0  # the second trip in vain
        sockets.receive(0, OPENING)
        assert home.sent[-1] == msgspec.structs.replace(OPENING, avoid=":8101")
        sockets._take(0, HOME, refused)
        assert told == [refused]  # by the router itself

    behind_a_router(scenario)


def test_a_device_whose_replica_has_another_model_is_told_that_its_answer_ends() -> None:
    def scenario(sockets: Sockets, home: FakeWire, away: FakeWire, told: list[object]) -> None:
        away.welcome = msgspec.structs.replace(WELCOME, digest="d2")
        sockets.receive(0, OPENING)
        sockets._take(0, HOME, Redirect("session-1", ":8101"))
        (ended,) = told
        assert isinstance(ended, Refused)
        assert (ended.code, ended.fatal) == ("model_changed", True)
        assert away.sent == []

    behind_a_router(scenario)


# --- the clock


class Instant(selectors.SelectSelector):
    """Whoever waits finds that the time has passed, and a little more."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if timeout and not ready:
            self.now += timeout + 0.0007
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time is of whole milliseconds, as uvloop's is, and timers are late."""

    def __init__(self) -> None:
        self._instant = Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return int(self._instant.now * 1e3) / 1e3


def on_a_loop(what: Callable[[Timeline, Clock], None], seconds: float) -> None:
    """Let `what` set things up, and virtual time pass."""
    env = Timeline()

    async def run() -> None:
        clock = Clock(env, failures.append)
        clock.happen(lambda: what(env, clock))
        await asyncio.sleep(seconds)
        clock.stop()

    failures: list[Exception] = []
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run())
    if failures:
        raise failures[0]


def test_timers_that_follow_each_other_do_not_drift() -> None:
    """A device that drafts for 3.3 ms a token drafts 30 tokens in 99 ms, though a loop's timers are of whole ms."""
    times: list[float] = []

    def what(env: Timeline, clock: Clock) -> None:
        began = env.now

        def step() -> None:
            times.append(env.now - began)
            if len(times) < 30:
                env.after(0.0033, step)

        env.after(0.0033, step)

    on_a_loop(what, 0.11)
    assert times == pytest.approx([0.0033 * (i + 1) for i in range(30)])


def test_an_exception_in_a_device_stops_the_clock() -> None:
    def what(env: Timeline, clock: Clock) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        env.after(0.01, fail)
        env.after(0.02, lambda: seen.append(1))

    seen: list[int] = []
    with pytest.raises(ZeroDivisionError):
        on_a_loop(what, 0.1)
    assert not seen


# --- the command


def test_the_command_prints_one_json_object_and_writes_it(
    quick: Scenario, server: Child, tmp_path: Path
) -> None:
    path, out = written(quick, tmp_path), tmp_path / "out" / "figures.json"
    flags = [
        "--server",
        server.url,
        "--devices",
        "5",
        "--window",
        "1.5",
        "--rate",
        "12",
        "--json",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, ["fleet", path, *flags])
    assert result.exit_code in (0, 1), result.output  # 1: this machine did not keep up
    found = json.loads(result.stdout)
    assert (found["devices"], found["rates"], found["mismatches"]) == (5, [12.0], 0)
    assert json.loads(out.read_text()) == found


def test_policies_are_compared_and_held_against_the_simulator(quick: Scenario, tmp_path: Path) -> None:
    path = written(msgspec.structs.replace(quick, devices_n=5, window_s=1.0), tmp_path)
    result = CliRunner().invoke(
        app, ["fleet", path, "--policies", "fcfs,wisp", "--against-simulator", "--json"]
    )
    assert result.exit_code in (0, 1), result.output
    runs = json.loads(result.stdout)
    assert [(r["batching"], r["where"]) for r in runs] == [
        ("fcfs", "live"), ("fcfs", "simulator"), ("wisp", "live"), ("wisp", "simulator"),
    ]  # fmt: skip
    assert all(r["mismatches"] == 0 and r["tokens_checked"] > 0 for r in runs)


def test_policies_need_servers_of_their_own(quick: Scenario, tmp_path: Path) -> None:
    path = written(quick, tmp_path)
    result = CliRunner().invoke(
        app, ["fleet", path, "--policies", "fcfs,wisp", "--server", "http://127.0.0.1:9"]
    )
    assert isinstance(result.exception, ConfigError)
    assert "leave out --server" in str(result.exception)


def test_a_fleet_ends_while_a_verifier_has_not_answered_its_handshake() -> None:
    """A redirection under way when the run ends: nothing is raised, and the connection is closed."""

    async def run() -> None:
        arrived, gone = asyncio.Event(), asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            arrived.set()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            gone.set()

        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            sockets = Sockets("http://127.0.0.1:9")
            sockets._wires[0] = {}
            async with asyncio.timeout(PATIENCE_S):
                sockets._follow(0, f":{port}")
                await arrived.wait()
                await sockets.close()
                await gone.wait()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def answering(
    answer: Callable[[int], Message],
) -> AsyncIterator[tuple[int, list[ServerConnection]]]:
    """A verifier that says one thing to each connection's hello, by how many there are: its port, and these."""
    opened: list[ServerConnection] = []

    async def peer(connection: ServerConnection) -> None:
        opened.append(connection)
        await connection.recv()
        await connection.send(encode(answer(len(opened))))
        await connection.wait_closed()

    async with (
        serve(peer, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)]) as server,
        asyncio.timeout(PATIENCE_S),
    ):
        yield next(iter(server.sockets)).getsockname()[1], opened


def test_a_fleet_that_one_verifier_refuses_leaves_no_connection_open() -> None:
    """The second of two connections gets no welcome: the first is closed, and the error says why."""

    async def run() -> None:
        full = Refused("", "overloaded", "full", 1.0)
        async with answering(lambda n: WELCOME if n == 1 else full) as (port, opened):
            with pytest.raises(ProtocolError, match="full"):
                await Sockets(f"http://127.0.0.1:{port}").connect(2)
            for connection in opened:
                await connection.wait_closed()

    asyncio.run(run())


def test_a_fleet_takes_no_welcome_that_an_edge_would_not_take() -> None:
    async def run() -> None:
        strange = msgspec.structs.replace(WELCOME, n_vocab=0)
        async with answering(lambda n: strange) as (port, _):
            with pytest.raises(ProtocolError, match="limits that no verifier has"):
                await Sockets(f"http://127.0.0.1:{port}").connect(1)

    asyncio.run(run())


def test_a_connection_lost_before_the_run_ends_it() -> None:
    async def run() -> None:
        sockets = Sockets("http://127.0.0.1:9")
        sockets.check()
        sockets._broken(0, HOME, "no reason given")
        with pytest.raises(UnavailableError, match="no reason given"):
            sockets.check()

    asyncio.run(run())


def test_a_device_that_is_switched_off_while_it_follows_a_redirection_leaves_no_connection() -> None:
    async def run() -> None:
        sockets = Sockets("http://127.0.0.1:9")
        sockets._wires[0] = {}

        def welcome(_: int) -> Message:
            sockets.lost(0)
            return WELCOME

        async with answering(welcome) as (port, opened):
            sockets._follow(0, f":{port}")
            while not opened:
                await asyncio.sleep(0.01)
            await opened[0].wait_closed()

    asyncio.run(run())


def test_a_probe_that_fails_ends_the_run_and_says_why(
    quick: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def probe(sockets: Sockets, lags_ms: list[float]) -> None:
        raise UnavailableError("no room for one more connection")

    monkeypatch.setattr(Sockets, "probe", probe)
    with (
        verifier(quick, system("wisp")) as child,
        asyncio.Runner() as runner,
        pytest.raises(UnavailableError, match="no room for one more connection"),
    ):
        runner.run(run_live(quick, system("wisp"), 1, child.url))
