"""Session sockets when there are fewer than wanted: every key gets some, and nobody is sent away without need."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from wisp.core.errors import RequestError
from wisp.server.crowd import Crowd


async def talk(scope: Scope, receive: Receive, send: Send) -> None:
    """An endpoint that repeats what it hears."""
    while (event := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "bytes": event.get("bytes", b"")})


def authorize(header: str | None) -> str:
    if not header:
        raise RequestError(401, "no key")
    return header


class Peer:
    """One end of a connection. `said` is what it was sent."""

    def __init__(self, crowd: Crowd, key: str) -> None:
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.said: list[dict[str, Any]] = []
        scope = {
            "type": "websocket",
            "headers": [(b"authorization", key.encode())],
            "extensions": {"websocket.http.response": {}},
        }
        self.task = asyncio.ensure_future(crowd(scope, self.inbox.get, self._send))
        self.say("websocket.connect")

    async def _send(self, event: Any) -> None:
        self.said.append(event)

    def say(self, type_: str = "websocket.receive") -> None:
        self.inbox.put_nowait({"type": type_, "bytes": b"here"})

    @property
    def end(self) -> int | None:
        """How it ended: a status, a close code, or not at all."""
        codes = [e.get("status") or e.get("code") for e in self.said if "status" in e or "code" in e]
        return codes[0] if codes else None


Scenario = Callable[[Crowd, Callable[..., Awaitable[Peer]]], Awaitable[None]]


def with_crowd(scenario: Scenario, most: int) -> None:
    async def main() -> None:
        crowd, peers = Crowd(talk, authorize, most), []

        async def come(key: str) -> Peer:
            peers.append(peer := Peer(crowd, key))
            await settled()
            return peer

        await scenario(crowd, come)
        for peer in peers:
            peer.say("websocket.disconnect")
            await asyncio.wait_for(peer.task, 60)
        assert not crowd._inside

    asyncio.run(main())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_one_key_with_all_sockets_does_not_keep_others_out() -> None:
    async def scenario(crowd: Crowd, come: Callable[..., Awaitable[Peer]]) -> None:
        hogs = [await come("hog") for _ in range(6)]
        hogs[0].say()  # it is not this one that has been silent for longest
        await settled()
        guest = await come("guest")
        guest.say()
        await settled()
        assert guest.said[-1] == {"type": "websocket.send", "bytes": b"here"}
        assert [hog.end for hog in hogs] == [None, 1013, None, None, None, None]
        assert hogs[1].task.done()
        assert not hogs[1].task.cancelled()

    with_crowd(scenario, 6)


def test_sockets_are_shared_evenly_and_whoever_has_its_share_waits() -> None:
    async def scenario(crowd: Crowd, come: Callable[..., Awaitable[Peer]]) -> None:
        hogs = [await come("hog") for _ in range(6)]
        guests = [await come("guest") for _ in range(4)]
        assert [g.end for g in guests] == [None, None, None, 503]
        assert sum(h.end is None for h in hogs) == 3
        assert (await come("hog")).end == 503
        guests[0].say("websocket.disconnect")
        await settled()
        assert (await come("hog")).end is None  # nobody else wants it

    with_crowd(scenario, 6)


def test_strangers_are_the_endpoints_matter() -> None:
    async def scenario(crowd: Crowd, come: Callable[..., Awaitable[Peer]]) -> None:
        await come("")
        assert not crowd._inside

    with_crowd(scenario, 1)


def test_an_end_of_the_server_is_not_taken_for_anothers_turn() -> None:
    async def scenario(crowd: Crowd, come: Callable[..., Awaitable[Peer]]) -> None:
        peer = await come("a")
        peer.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await peer.task
        peer.task = asyncio.ensure_future(asyncio.sleep(0))

    with_crowd(scenario, 1)
