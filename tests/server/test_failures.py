"""What goes wrong inside a verifier: it goes on, or it ends where everybody can see it. It never just stands there."""

from __future__ import annotations

import asyncio
import math
import os
import stat
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx
import pytest

from wisp.api.keys import Keyring
from wisp.core.errors import ConfigError, EngineDeadError, InternalError
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice, SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.cost import Coefficients, CostModel, Load
from wisp.core.verify.events import Limits, Run
from wisp.engines.null import ByteTokenizer, NullTarget
from wisp.server.app import ServerApp, Settings
from wisp.server.event_log import LogHeader, read_runs
from wisp.server.host import VerifierHost
from wisp.server.watchdog import LoopWatch, StepWatch, patience_s

DEADLINE_S = 60.0
LONG = [7] * 100_000  # a prompt that no buffer holds back


def opening(session: str, prompt: Sequence[int] = (1, 2), **fields: object) -> Open:
    return Open(session, 1, list(prompt), Sampling(), 8, **fields)  # type: ignore[arg-type]


class Client:
    """A connection to a host."""

    def __init__(self, host: VerifierHost) -> None:
        self.host = host
        self.inbox: asyncio.Queue[Verdict | Refused] = asyncio.Queue()
        self.connection = host.attach("key", self.inbox.put_nowait)

    async def ask(self, message: Open) -> Verdict | Refused:
        self.host.receive(self.connection, message)
        return await self.inbox.get()


class Hanging(NullTarget):
    """Does not come back from a step until it is let go."""

    def __init__(self) -> None:
        super().__init__(slots=4)
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        self.entered.set()
        assert self.let_go.wait(DEADLINE_S)
        return super().run(batch)


def with_host(
    scenario: Callable[[VerifierHost, list[Exception]], Awaitable[None]],
    engine: NullTarget | None = None,
    **options: object,
) -> None:
    """Run a scenario with a verifier, and with what it ends of."""

    async def main() -> None:
        ends: list[Exception] = []
        host = VerifierHost(
            engine or NullTarget(4, 1 << 18),
            ByteTokenizer(),
            Admission(10),
            model="m",
            died=ends.append,
            **options,  # type: ignore[arg-type]
        )
        try:
            await asyncio.wait_for(scenario(host, ends), DEADLINE_S)
        finally:
            host.stop()

    asyncio.run(main())


# --- the event log


def test_a_full_disk_stops_the_log_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(host: VerifierHost, ends: list[Exception]) -> None:
        client = Client(host)
        for number in range(3):
            assert isinstance(await client.ask(opening(f"session-{number}", LONG)), Verdict)
        assert not ends
        assert host.metrics.registry.get_sample_value("wisp:event_log_lost_total") == 1

    with_host(scenario, event_log=Path("/dev/full"))
    said = [r.getMessage() for r in caplog.records if "event log" in r.getMessage()]
    assert said == [
        "cannot write the event log /dev/full: No space left on device; it ends here, and the server goes on "
        "without it. For a new one make room and start again"
    ]


def test_a_log_that_was_given_up_ends_with_a_whole_record_and_can_be_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.log"
    write, room = os.write, [300_000]

    def until_full(file: int, data: bytes) -> int:
        """A disk with little room: takes a part of what does not fit, and then nothing."""
        n = write(file, bytes(data[: room[0]]))
        room[0] -= n
        if not n:
            raise OSError(28, "No space left on device")
        return n

    async def scenario(host: VerifierHost, ends: list[Exception]) -> None:
        client = Client(host)
        for number in range(6):
            assert isinstance(await client.ask(opening(f"session-{number}", LONG)), Verdict)

    with monkeypatch.context() as patched:
        patched.setattr("wisp.server.event_log.os.write", until_full)
        with_host(scenario, event_log=path)
    before = path.stat().st_size
    assert 100_000 < before < 300_000
    with_host(scenario, event_log=path)
    first, second = read_runs(path)
    assert 0 < len(first[1]) < len(second[1])


def test_the_log_is_for_its_owner_alone(tmp_path: Path) -> None:
    async def scenario(host: VerifierHost, ends: list[Exception]) -> None:
        pass

    with_host(scenario, event_log=tmp_path / "events.log")
    assert stat.S_IMODE((tmp_path / "events.log").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("release", "policy", "meant"),
    [
        ("0.1.0", "wisp", "paper"),
        ("0.2.0", "wisp", "wisp"),
        ("0.1.0", "fcfs", "fcfs"),
    ],
)
def test_a_log_of_an_earlier_release_is_replayed_with_the_policy_that_it_meant(
    release: str, policy: str, meant: str
) -> None:
    limits = Limits(100, frozenset(), 2, 64, 128, 64)
    header = LogHeader(release, "null", "m", limits, policy, None, 8, {})
    assert header.verifier().policy.name == meant


def test_a_log_of_a_policy_that_is_gone_says_which_release_replays_it() -> None:
    limits = Limits(100, frozenset(), 2, 64, 128, 64)
    header = LogHeader("0.1.0", "null", "m", limits, "laxity", None, 8, {})
    with pytest.raises(ConfigError, match=r"0\.1\.0 with batching policy 'laxity'"):
        header.verifier()


@pytest.mark.parametrize(
    "damaged", [Coefficients(slice=1e300), Coefficients(step=-1.0), Coefficients(token=math.nan)]
)
def test_a_log_with_coefficients_that_no_engine_has_is_refused(damaged: Coefficients) -> None:
    limits = Limits(100, frozenset(), 2, 64, 128, 64)
    with pytest.raises(ConfigError, match="damaged: coefficients must not be negative"):
        LogHeader("0.2.0", "null", "m", limits, "wisp", damaged, 8, {}).verifier()


# --- any other exception


@pytest.mark.parametrize("where", ["step", "dispatched", "sent"])
def test_an_exception_in_the_host_ends_the_verifier_and_sends_its_sessions_elsewhere(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(host: VerifierHost, ends: list[Exception]) -> None:
        def broken(*_: object) -> None:
            raise KeyError("for testing")

        waiting, client = Client(host), Client(host)
        assert isinstance(await waiting.ask(opening("session-0")), Verdict)
        monkeypatch.setattr(host.metrics, where, broken)
        for session, who in (("session-1", client), ("session-0", waiting)):
            refused = await (who.ask(opening(session)) if who is client else who.inbox.get())
            assert isinstance(refused, Refused)
            assert (refused.session, refused.code, refused.fatal) == (session, "shutting_down", True)
            assert refused.retry_after > 0
        assert "KeyError('for testing')" in str(ends[0])
        assert isinstance(ends[0], InternalError)
        late = await client.ask(opening("session-2"))
        assert isinstance(late, Refused)
        assert late.code == "shutting_down"
        assert len(ends) == 1

    with_host(scenario)


def test_a_failed_verifier_says_so_in_its_health_and_asks_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        server = ServerApp(Settings("m"), Keyring(None, None), lambda: (NullTarget(4), ByteTokenizer()))
        async with server.asgi.router.lifespan_context(server.asgi):
            transport = httpx.ASGITransport(server.asgi)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                while (health := await http.get("/health")).json()["status"] == "loading":
                    await asyncio.sleep(0)
                assert health.status_code == 200
                host = server.host()
                monkeypatch.setattr(host.verifier, "handle", lambda now, event: 1 / 0)
                body = {"model": "m", "prompt": "hello", "max_tokens": 4}
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 503
                await asyncio.wait_for(server.ended(), DEADLINE_S)
                health = await http.get("/health")
                assert (health.status_code, health.json()) == (503, {"status": "failed"})
        assert isinstance(server.failed, InternalError)

    asyncio.run(scenario())


# --- watchdogs


def test_a_step_that_does_not_end_ends_the_verifier() -> None:
    engine = Hanging()

    async def scenario(host: VerifierHost, ends: list[Exception]) -> None:
        client = Client(host)
        refused = await client.ask(opening("session-1"))
        assert engine.entered.is_set()
        assert isinstance(refused, Refused)
        assert (refused.code, refused.fatal) == ("shutting_down", True)
        assert isinstance(ends[0], EngineDeadError)
        assert "a step of 1 slices has not ended after" in str(ends[0])

    try:
        with_host(
            scenario, engine, look_s=0.01, patience=lambda step, cost: 0.02
        )  # and `stop` does not wait for it
    finally:
        engine.let_go.set()


def test_a_step_that_does_not_end_does_not_hold_up_a_stop_for_longer_than_its_patience() -> None:
    engine = Hanging()

    async def scenario(host: VerifierHost, ends: list[Exception]) -> None:
        client = Client(host)
        host.receive(client.connection, opening("session-1"))
        while not engine.entered.is_set():
            await asyncio.sleep(0)
        await asyncio.to_thread(host.stop)
        assert isinstance(ends[0], EngineDeadError)

    try:
        with_host(scenario, engine, look_s=0.01, patience=lambda step, cost: 0.1)
    finally:
        engine.let_go.set()


def test_an_engine_that_cannot_be_closed_costs_no_line_of_the_event_log(tmp_path: Path) -> None:
    class Unclosable(NullTarget):
        def close(self) -> None:
            raise RuntimeError("for testing")

    async def scenario(host: VerifierHost, ends: list[Exception]) -> None:
        assert isinstance(await Client(host).ask(opening("session-1")), Verdict)

    with pytest.raises(RuntimeError, match="for testing"):
        with_host(scenario, Unclosable(4), event_log=tmp_path / "bad.log")
    with_host(scenario, NullTarget(4), event_log=tmp_path / "good.log")
    bad, good = (len(read_runs(tmp_path / f"{name}.log")[0][1]) for name in ("bad", "good"))
    assert bad == good > 0


STEP = Run([], [Slice(1, 0, 0, [1] * 100)])


def test_a_step_is_given_up_after_so_many_looks_and_a_process_that_slept_has_not_waited() -> None:
    """Looks count, not the clock: between any two of them the machine may have slept for a day."""
    running: list[Run | None] = [STEP]
    hung: list[float] = []
    watch = StepWatch(lambda: running[0], lambda step: 20.0, hung.append)
    for _ in range(4):
        watch.look(5.0)
    assert not hung
    running[0] = Run([], STEP.slices)  # the next step begins
    for _ in range(4):
        watch.look(5.0)
    assert not hung
    running[0] = None
    watch.look(5.0)
    running[0] = STEP
    for _ in range(5):
        watch.look(5.0)
    assert hung == [20.0]


def test_patience_is_far_above_what_a_step_takes_and_the_first_may_compile() -> None:
    cost = CostModel(Coefficients(step=10.0, token=1.0))
    first = patience_s(STEP, cost)
    cost.observe(Load(100, 5000, 0, 1), 110.0)
    assert first - patience_s(STEP, cost) == pytest.approx(600.0)
    assert patience_s(STEP, cost) == pytest.approx(60.0 + 25.0)
    slow = CostModel(Coefficients(step=10_000.0, token=100.0))
    slow.observe(Load(100, 5000, 0, 1), 20_000.0)
    assert patience_s(STEP, slow) == pytest.approx(20 * 20.0, rel=0.05)


def test_an_event_loop_that_stands_still_ends_the_process() -> None:
    aborted = threading.Event()

    async def main() -> None:
        watch = LoopWatch(asyncio.get_running_loop(), aborted.set, every_s=0.001, limit_s=0.01)
        assert aborted.wait(DEADLINE_S)  # blocks the loop, until the watchdog steps in
        watch.stop()

    asyncio.run(main())
