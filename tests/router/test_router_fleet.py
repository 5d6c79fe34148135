"""A fleet of replicas that are pretended: started, dying, failing, drained; without processes and sockets."""

from __future__ import annotations

import asyncio
import gzip
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import msgspec
import pytest

import wisp.engines
from hf_files import tokenizer_files
from waiting import run, until
from wisp.api.process import Listen
from wisp.core.errors import ConfigError, ModelError, RequestError
from wisp.core.protocol.messages import VERSION, Welcome
from wisp.core.protocol.slo import Slo
from wisp.core.route.placement import Placement
from wisp.core.verify.cost import Coefficients
from wisp.engines.huggingface import HfTokenizer
from wisp.engines.plain import NumberTokenizer, PlainTokenizer
from wisp.router import fleet as module
from wisp.router.fleet import Fleet, Replica
from wisp.router.launch import Running
from wisp.router.ray_launcher import RayLauncher
from wisp.router.replica import ReplicaSpec, listen_above
from wisp.router.thin import RouterTokenizers, _load
from wisp.server.app import Settings
from wisp.server.control import MOVE_PATH, Report

WELCOME = Welcome(VERSION, "m", "f" * 64, 100, [1], 512, 64, digest="d1")
SPEC = ReplicaSpec("r1", "target", {"slots": 4}, Settings("m"), Listen(port=8100), "token")


def test_a_replica_is_told_all_that_its_front_was() -> None:
    """As text: engine arguments, and settings with what a cost model starts from."""
    settings = Settings(
        "m",
        "paper",
        event_log=Path("events"),
        cost=Coefficients(3.0, 0.5),
        slo_classes={"hurry": Slo(1.0, 2.0)},
    )
    engine = {"engine": "vllm", "mode": None, "slots": None, "memory": 0.9, "kv_tokens": 100}
    spec = msgspec.structs.replace(SPEC, settings=settings, engine=engine)
    assert ReplicaSpec.decode(spec.encode()) == spec


@pytest.mark.parametrize("kind", [PlainTokenizer(), NumberTokenizer(300, frozenset({299}))])
def test_a_front_reads_tokenizers_that_are_no_gguf_file(kind: PlainTokenizer | NumberTokenizer) -> None:
    tokenizer = _load(kind.blob())
    assert tokenizer.fingerprint == kind.fingerprint
    assert type(tokenizer) is type(kind)


def test_a_front_reads_hugging_faces_tokenizers(tmp_path: Path) -> None:
    tokenizer_files(Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf", tmp_path)
    theirs = HfTokenizer.open(tmp_path, 512)
    assert _load(theirs.blob()).fingerprint == theirs.fingerprint
    with pytest.raises(ModelError):
        _load(b"{}")


@pytest.mark.parametrize(
    "blob",
    [b"no gzip", gzip.compress(b"{}"), gzip.compress(b"x" * 999)[:-9]],
    ids=["no gzip", "no tokenizer", "cut off"],
)
def test_what_is_no_tokenizer_is_an_error_with_words_and_not_kept(blob: bytes) -> None:
    given = [blob, gzip.compress(PlainTokenizer().blob())]

    async def tokenizer(fingerprint: str) -> bytes:
        return given.pop(0)

    async def scenario() -> None:
        fleet = SimpleNamespace(fleet=SimpleNamespace(tokenizer=tokenizer))
        tokenizers = RouterTokenizers(fleet)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="the tokenizer that a replica gave is of no use") as error:
            await tokenizers.get("f" * 64)
        assert (error.value.status, error.value.code) == (502, "tokenizer_unavailable")
        assert (await tokenizers.get("f" * 64)).fingerprint == PlainTokenizer().fingerprint

    asyncio.run(scenario())


class Pretended:
    """A replica. `fate` is how it ends by itself, "" for not at all."""

    def __init__(self, name: str, life: int, fate: str, welcome: Welcome) -> None:
        self.address = self.url = f"http://{name}-{life}"
        self.welcome = welcome
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.moved = self.stopped = False
        if fate:
            self.end.set_result(fate)

    async def ended(self) -> str:
        return await asyncio.shield(self.end)

    def over(self, why: str) -> None:
        if not self.end.done():
            self.end.set_result(why)

    def stop(self) -> None:
        self.stopped = True
        self.over("stopped")

    def kill(self) -> None:
        self.over("killed")


class PretendLauncher:
    """`fates` by name: how its lives end, one after the other; then they last."""

    name = "pretend"

    def __init__(self, **fates: list[str]) -> None:
        self.fates = fates
        self.started: list[Pretended] = []
        self.welcome = WELCOME
        self.speechless = False  # when told to move sessions

    async def start(self, spec: ReplicaSpec) -> Running:
        fates = self.fates.get(spec.name, [])
        fate = fates.pop(0) if fates else ""
        if fate == "raise":
            raise ConfigError("no room for it")
        replica = Pretended(spec.name, len(self.started), fate, self.welcome)
        self.started.append(replica)
        return replica

    def close(self) -> None:
        for replica in self.started:
            replica.kill()

    def answer(self, request: httpx.Request) -> httpx.Response:
        """What replicas say by HTTP."""
        assert request.headers["authorization"].startswith("Bearer ")
        replica = next(r for r in self.started if httpx.URL(r.url).host == request.url.host)
        if replica.end.done():
            raise httpx.ConnectError("gone")
        if request.url.path == MOVE_PATH:
            replica.moved = True
            if self.speechless:
                return httpx.Response(502, content=b"")
            return httpx.Response(200, json={"moved": 3})
        return httpx.Response(200, content=msgspec.json.encode(Report(2, 4, 10, 1000, replica.welcome)))


Scenario = Callable[[Fleet, PretendLauncher], Awaitable[None]]


def with_fleet(launcher: PretendLauncher, replicas: int, scenario: Scenario) -> None:
    async def main() -> None:
        def spec(r: Replica) -> ReplicaSpec:
            return msgspec.structs.replace(SPEC, name=r.name, token=r.token)

        fleet = Fleet(
            launcher, spec, Placement(), None, drain_s=1.0, changed=lambda: None, heard=lambda r, report: None
        )
        await fleet._client.aclose()
        fleet._client = httpx.AsyncClient(transport=httpx.MockTransport(launcher.answer))
        fleet.add(replicas)
        try:
            await scenario(fleet, launcher)
        finally:
            await fleet.close()

    run(main())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "BACKOFF_S", (0.01, 0.05))


def names(fleet: Fleet) -> list[str]:
    return [r.name for r in fleet.up()]


def test_a_fleet_of_which_nothing_can_start_has_failed() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await fleet.ended()
        assert "could not start" in str(fleet.failed)
        assert fleet.up() == []

    with_fleet(PretendLauncher(r1=["raise"] * 9, r2=["exit status 2"] * 9), 2, scenario)


def test_one_that_cannot_start_at_first_does_not_stop_the_others() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: len(fleet.up()) == 2)
        assert fleet.failed is None
        assert {v.name: v.restarts for v in fleet.view()} == {"r1": 4, "r2": 0}
        assert {v.name: v.last_end for v in fleet.view()} == {"r1": "killed by SIGKILL", "r2": ""}

    fates = ["exit status 2", "raise", "exit status 2", "killed by SIGKILL"]
    with_fleet(PretendLauncher(r1=fates), 2, scenario)


def test_a_replica_that_hangs_does_not_hold_up_a_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: len(fleet.up()) == 2)
        asked: list[str] = []

        async def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request.url.host)
            if request.url.host.startswith("r1"):
                await asyncio.Event().wait()
            return launcher.answer(request)

        await fleet._client.aclose()
        fleet._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        monkeypatch.setattr(module, "ANSWER_S", 0.01)
        for _ in range(2):
            asked.clear()
            await fleet.look()
            assert {host[:2] for host in asked} == {"r1", "r2"}

    with_fleet(PretendLauncher(), 2, scenario)


def test_a_replica_that_hangs_is_passed_over_before_it_counts_as_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: len(fleet.up()) == 2)

        answered: list[str] = []

        async def answer(request: httpx.Request) -> httpx.Response:
            if request.url.host.startswith("r1"):
                await asyncio.Event().wait()
            answered.append(request.url.host)
            return launcher.answer(request)

        def place(session: str) -> str:
            return fleet._placement.place(0.0, session, "", []).replica

        there = next(name for n in itertools.count() if place(name := f"session-{n}") == "r1")
        monkeypatch.setattr(module, "ANSWER_S", 0.01)
        old, fleet._client = fleet._client, httpx.AsyncClient(transport=httpx.MockTransport(answer))
        await until(
            lambda: len(answered) > 20
        )  # by the other, each after a wait as long as r1's answer is due in
        assert place(there) == "r2"  # it would have gone back
        assert names(fleet) == ["r1", "r2"]
        await old.aclose()

    with_fleet(PretendLauncher(), 2, scenario)


def test_one_that_keeps_dying_is_started_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        while len(fleet.up()) < 2:
            await real(0.01)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        launcher.fates["r1"] = ["killed"] * 6
        launcher.started[0].kill()
        while fleet.replicas["r1"].lives < 8 or len(fleet.up()) < 2:
            await real(0.01)
        monkeypatch.undo()

    with_fleet(PretendLauncher(), 2, scenario)
    assert waits[0] < waits[2] < waits[-1]
    assert waits == sorted(waits)


@pytest.mark.parametrize("digest", ["d2", ""])
def test_a_replica_with_other_weights_is_not_taken_in(digest: str) -> None:
    """Nor one of a release that does not say which it has. Operators see why."""

    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: names(fleet) == ["r1"])
        launcher.welcome = msgspec.structs.replace(WELCOME, digest=digest)
        fleet.add()
        await until(lambda: fleet.replicas["r2"].restarts >= 2)
        assert names(fleet) == ["r1"]
        assert fleet.welcome == WELCOME
        (why,) = (v.last_end for v in fleet.view() if v.name == "r2")
        assert ("other weights" if digest else "WISP 0.2.0 or later") in why
        launcher.welcome = WELCOME
        await until(lambda: names(fleet) == ["r1", "r2"])

    with_fleet(PretendLauncher(), 1, scenario)


def test_a_fleet_whose_last_replica_ends_comes_back_with_whatever_weights_there_are() -> None:
    """Edges were let go meanwhile, and say to each session whether it may go on."""

    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: names(fleet) == ["r1"])
        launcher.welcome = msgspec.structs.replace(WELCOME, digest="d2")
        launcher.started[0].over("out of memory")
        await until(lambda: names(fleet) == ["r1"] and fleet.welcome == launcher.welcome)

    with_fleet(PretendLauncher(), 1, scenario)


def test_a_drain_moves_then_stops_then_forgets() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: len(fleet.up()) == 2)
        leaving = fleet.replicas["r1"].running
        await fleet.drain("r1")
        assert isinstance(leaving, Pretended)
        assert (leaving.moved, leaving.stopped) == (True, True)
        assert [v.name for v in fleet.view()] == ["r2"]
        with pytest.raises(RequestError, match="the only replica"):
            await fleet.drain("r2")
        with pytest.raises(RequestError, match="no replica r1"):
            await fleet.drain("r1")

    with_fleet(PretendLauncher(), 2, scenario)


def test_a_replica_whose_answer_is_not_json_is_drained_all_the_same() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        launcher.speechless = True
        await until(lambda: len(fleet.up()) == 2)
        await fleet.drain("r1")
        assert [r.name for r in fleet.up()] == ["r2"]
        assert launcher.started[0].stopped

    with_fleet(PretendLauncher(), 2, scenario)


def test_a_restart_is_not_counted_as_an_accident() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: len(fleet.up()) == 1)
        await fleet.restart("r1")  # even of the only one: its sessions wait
        await until(lambda: len(fleet.up()) == 1)
        assert len(launcher.started) == 2
        assert launcher.started[0].moved
        assert [(v.restarts, v.last_end) for v in fleet.view()] == [(0, "stopped")]

    with_fleet(PretendLauncher(), 1, scenario)


def test_scaling_down_lets_those_go_that_do_not_serve_and_then_the_youngest() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: names(fleet) == ["r1", "r3", "r4"])
        await fleet.scale(2)
        assert names(fleet) == ["r1", "r3"]
        await fleet.scale(3)
        await until(lambda: names(fleet) == ["r1", "r3", "r5"])
        for count in (0, 65):
            with pytest.raises(RequestError, match="from 1 to 64"):
                await fleet.scale(count)

    with_fleet(PretendLauncher(r2=["exit status 2"] * 1000), 4, scenario)


def test_a_fleet_that_stops_lets_all_finish_where_they_are() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: len(fleet.up()) == 3)
        await fleet.stop()
        assert fleet.view() == []
        assert [(r.moved, r.stopped) for r in launcher.started] == [(False, True)] * 3
        with pytest.raises(RequestError, match="shutting down"):
            await fleet.scale(2)

    with_fleet(PretendLauncher(), 3, scenario)


def test_a_replicas_spec_survives_its_encoding() -> None:
    settings = Settings("m", event_log=Path("a") / "b")
    listen = Listen("::1", 8100, Path("cert.pem"), Path("key.pem"))
    whole = msgspec.structs.replace(
        SPEC, settings=settings, listen=listen, key_file=Path("k.toml"), secrets="s"
    )
    for spec in (SPEC, whole):
        line = spec.encode()
        assert line.count(b"\n") == 1
        assert ReplicaSpec.decode(line) == spec
    assert SPEC.on("10.0.0.7", 8105).listen == Listen("10.0.0.7", 8105)


def test_the_first_free_port_above_is_taken() -> None:
    with listen_above("127.0.0.1", 42_000) as first:
        port = first.getsockname()[1]
        with (
            listen_above("127.0.0.1", 42_000) as second,
            listen_above("127.0.0.1", 42_000, {port + 2}) as third,
        ):
            assert 42_000 < port < second.getsockname()[1] < third.getsockname()[1]
    with pytest.raises(ConfigError, match="choose another --port"):
        listen_above("127.0.0.1", 65_535)


def test_a_cluster_of_ray_needs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes listen beyond this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(ConfigError, match="--api-keys"):
        RayLauncher()


def test_a_replica_that_is_given_up_as_soon_as_it_is_added_is_gone() -> None:
    async def scenario(fleet: Fleet, launcher: PretendLauncher) -> None:
        await until(lambda: len(fleet.up()) == 1)
        await fleet.scale(2)
        await fleet.drain("r2")
        await until(lambda: [v.name for v in fleet.view()] == ["r1"])

    with_fleet(PretendLauncher(), 1, scenario)


def test_an_actor_whose_start_is_given_up_as_it_answers_is_killed() -> None:
    class Ray:
        exceptions = SimpleNamespace(RayError=ConnectionError)

        def __init__(self) -> None:
            self.killed: list[object] = []

        def kill(self, actor: object) -> None:
            self.killed.append(actor)

    async def scenario() -> None:
        answer = asyncio.get_running_loop().create_future()
        actor = SimpleNamespace(where=SimpleNamespace(remote=lambda: answer))
        launcher, ray = RayLauncher.__new__(RayLauncher), Ray()
        launcher._ray, launcher._ip, launcher._actors = ray, "192.0.2.1", []
        launcher._actor = SimpleNamespace(remote=lambda *_: actor)
        starting = asyncio.ensure_future(launcher.start(SPEC))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        answer.set_result((":1", "http://192.0.2.1:1", 1))
        for _ in range(2):  # the answer is there, and `start` has not gone on
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert ray.killed == [actor]

    asyncio.run(scenario())
