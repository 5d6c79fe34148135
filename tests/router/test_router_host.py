"""A router's side of the session socket, before pretended replicas: who waits, who is refused, who is placed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from wisp.core.errors import UnavailableError
from wisp.core.protocol.messages import VERSION, Cancel, Hello, Open, Redirect, Refused, Welcome, encode
from wisp.core.protocol.sampling import Sampling
from wisp.core.route.placement import Placement, ReplicaSize
from wisp.core.verify.admission import Admission, KeyLimits, KeyUsage
from wisp.router import host as module
from wisp.router.host import RouterHost
from wisp.router.metrics import RouterMetrics
from wisp.server.sockets import SessionEndpoint

ROOM = ReplicaSize(slots=8, kv_tokens=1 << 20, max_sessions=1000)
LIMITS = {"limited": KeyLimits(sessions=1)}


class PretendFleet:
    """Replicas that are all up; a look at them takes as long as `answering` is not set."""

    def __init__(self) -> None:
        self.welcome = Welcome(VERSION, "m", "f" * 64, 100, [1], 1 << 20, 64)
        self.replicas: dict[str, Any] = {}
        self.answering = asyncio.Event()
        self.looks = 0

    async def look(self) -> None:
        self.looks += 1
        await self.answering.wait()

    def address(self, name: str) -> str:
        return f"{name}:1"

    def at(self, address: str) -> None:
        return None


class Edge:
    """A connection, and what came over it."""

    def __init__(self, host: RouterHost, key: str) -> None:
        self.heard: list[Any] = []
        self.host = host
        self.connection = host.attach(key, self.heard.append, close=lambda: None)

    def open(self, session: str, prompt: int = 3, **fields: Any) -> None:
        self.host.receive(self.connection, Open(session, 0, [1] * prompt, Sampling(), max_tokens=8, **fields))

    def refused(self) -> list[Refused]:
        return [m for m in self.heard if isinstance(m, Refused)]

    def placed(self) -> list[str]:
        return [m.session for m in self.heard if isinstance(m, Redirect)]


Scenario = Callable[[RouterHost, PretendFleet, Admission], Awaitable[None]]


def with_front(scenario: Scenario, room: ReplicaSize = ROOM) -> None:
    async def main() -> None:
        fleet, placement, admission = PretendFleet(), Placement(), Admission(1 << 40, LIMITS)
        for name in ("r1", "r2"):
            placement.up(name, room)
        metrics = RouterMetrics(lambda: fleet)  # type: ignore[arg-type, return-value]
        await scenario(RouterHost(fleet, placement, admission, metrics), fleet, admission)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.0)


async def until(look: Callable[[], object]) -> None:
    while not look():
        await asyncio.sleep(0)


def test_while_a_replica_hangs_few_opens_of_a_key_wait_and_the_others_are_told_when_to_come_again() -> None:
    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        edge, other = Edge(router, "limited"), Edge(router, "another")
        edge.open("first-of-all")
        assert edge.placed() == ["first-of-all"]
        for n in range(500):
            edge.open(f"session-{n}")
            await asyncio.sleep(0)
        refused = edge.refused()
        assert len(refused) == 500 - module.WAITING
        assert {(r.code, r.retry_after, r.fatal) for r in refused} == {("rate_limit_exceeded", 1.0, True)}
        other.open("of-another-key")
        assert other.placed() == ["of-another-key"]
        admission.usage["limited"] = KeyUsage()  # its first session has ended
        fleet.answering.set()
        await until(lambda: len(edge.heard) == 501)
        assert edge.placed() == ["first-of-all", "session-0"]

    with_front(scenario)


def test_long_prompts_that_wait_are_fewer_still() -> None:
    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        edge = Edge(router, "limited")
        edge.open("first-of-all")
        for n in range(39):
            edge.open(f"session-{n}", prompt=100_000)
            await asyncio.sleep(0)
        assert len(edge.refused()) == 39 - module.WAITING_TOKENS // 100_000

    with_front(scenario)


def test_unused_parts_of_an_open_are_not_kept_while_it_waits() -> None:
    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        edge = Edge(router, "limited")
        edge.open("first-of-all")
        edge.open("not-a-prompt", prompt=(1 << 20) + 1)  # beyond the context: its replica will say so
        edge.open("has-history", committed=[2] * 100, draft=[3] * 100)
        kept = [open_ for _, open_ in router._waiting["limited"].opens]
        assert [(o.session, len(o.prompt), o.committed, o.draft) for o in kept] == [
            ("not-a-prompt", 0, [], []),
            ("has-history", 3, [], []),
        ]

    with_front(scenario)


def test_a_session_that_left_or_was_cancelled_waits_no_longer() -> None:
    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        edge, gone = Edge(router, "limited"), Edge(router, "limited")
        edge.open("first-of-all")
        gone.open("session-a")
        edge.open("session-b")
        edge.open("session-c")
        router.receive(edge.connection, Cancel("session-b"))
        router.detach(gone.connection)
        fleet.answering.set()
        await until(lambda: len(edge.heard) == 2)
        assert [r.session for r in edge.refused()] == ["session-c"]
        assert gone.heard == []
        await until(lambda: not router._waiting)

    with_front(scenario)


def test_an_open_during_a_query_waits_for_the_next_query() -> None:
    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        edge = Edge(router, "limited")
        edge.open("first-of-all")
        edge.open("session-a")
        await until(lambda: fleet.looks == 1)
        edge.open("session-b")
        fleet.answering.set()
        await until(lambda: len(edge.refused()) == 2)
        assert fleet.looks == 2

    with_front(scenario)


def test_where_one_key_fills_all_replicas_another_is_sent_to_one_all_the_same() -> None:
    """It has fewer places than it may have: the replica makes room for it."""

    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        hog, guest = Edge(router, "hog"), Edge(router, "guest")
        for n in range(8):
            hog.open(f"session-{n}")
        hog.open("session-8")
        assert [(r.session, r.code) for r in hog.refused()] == [("session-8", "overloaded")]
        guest.open("session-9")
        assert guest.placed() == ["session-9"]

    with_front(scenario, ReplicaSize(2, 1024, max_sessions=4))


def test_prefixes_draw_sessions_only_within_one_salt() -> None:
    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        edge = Edge(router, "edge")
        edge.open("session-1", prompt=64, salt="a")
        edge.open("session-2", prompt=64, salt="b")  # goes to the emptier one
        edge.open("session-3", prompt=64, salt="b")
        addresses = [m.address for m in edge.heard]
        assert addresses[0] != addresses[1] == addresses[2]

    with_front(scenario)


def test_an_edge_that_says_hello_as_the_last_replica_goes_is_told_to_come_back_later() -> None:
    async def scenario(router: RouterHost, fleet: PretendFleet, admission: Admission) -> None:
        hello = encode(Hello(VERSION, client="for testing", redirects=True))
        events: list[dict[str, Any]] = [{"type": "websocket.receive", "bytes": hello}]
        events.append({"type": "websocket.connect"})
        sent: list[dict[str, Any]] = []

        def gone() -> Welcome:
            raise UnavailableError("this router is without a replica")

        async def receive() -> dict[str, Any]:
            event = events.pop()
            if not events:  # since the upgrade
                router.welcome = gone  # type: ignore[method-assign]
            return event

        async def send(event: Any) -> None:
            sent.append(event)

        endpoint = SessionEndpoint(lambda: router, lambda authorization: "key")
        await endpoint({"headers": [], "extensions": {}}, receive, send)
        assert [event["type"] for event in sent] == ["websocket.accept", "websocket.close"]
        assert sent[1]["code"] == 1012

    with_front(scenario)
