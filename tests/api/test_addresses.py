"""HTTP connections when there are fewer than wanted: every address gets some, and no answer is cut without need."""

from __future__ import annotations

import asyncio
import functools
import json
import resource

import pytest

from api_fakes import MODEL, ScriptedBackend, make_app
from waiting import run, until
from wisp.api import addresses as module_of_addresses
from wisp.api import body as module
from wisp.api.addresses import Addresses, raise_descriptors
from wisp.api.body import Bodies
from wisp.api.process import Listen, run_app
from wisp.core.errors import RequestError


class Caller:
    """One connection. gone: it was cut."""

    def __init__(self, addresses: Addresses, address: str, heard: float = 0.0, *, idle: bool = True) -> None:
        self.address, self.heard, self.idle = address, heard, idle
        self.gone = False
        self.inside = addresses.enter(self)

    def cut(self) -> None:
        self.gone = True


def test_one_address_may_have_all_while_nobody_else_comes() -> None:
    addresses = Addresses(3)
    assert [Caller(addresses, "a").inside for _ in range(3)] == [True] * 3


def test_a_flood_from_one_address_keeps_no_other_out() -> None:
    addresses = Addresses(4)
    flood = [Caller(addresses, "a", float(i)) for i in range(4)]
    guests = [Caller(addresses, name) for name in ("b", "c")]
    assert all(guest.inside and not guest.gone for guest in guests)
    assert [caller.gone for caller in flood] == [True, True, False, False]  # the longest silent ones


def test_idle_connections_go_first_and_then_busy_ones() -> None:
    addresses = Addresses(3)
    busy = [Caller(addresses, "a", float(i), idle=False) for i in range(2)]
    idle = Caller(addresses, "a", 9.0)
    Caller(addresses, "b")
    assert idle.gone
    assert not any(caller.gone for caller in busy)
    addresses = Addresses(3)
    busy = [Caller(addresses, "a", float(i), idle=False) for i in range(3)]
    assert Caller(addresses, "b").inside
    assert [caller.gone for caller in busy] == [True, False, False]


def test_the_largest_address_gives_up_an_idle_connection_of_its_own_or_is_refused() -> None:
    addresses = Addresses(2)
    busy, idle = Caller(addresses, "a", idle=False), Caller(addresses, "a")
    assert Caller(addresses, "a", idle=False).inside
    assert (busy.gone, idle.gone) == (False, True)
    assert not Caller(addresses, "a").inside


def test_equal_shares_stay() -> None:
    addresses = Addresses(2)
    first, second = Caller(addresses, "a", idle=False), Caller(addresses, "b", idle=False)
    assert not Caller(addresses, "a").inside
    assert not Caller(addresses, "c").inside
    assert not first.gone
    assert not second.gone


def test_a_closed_connection_takes_no_place() -> None:
    addresses = Addresses(1)
    first = Caller(addresses, "a", idle=False)
    addresses.leave(first)
    addresses.leave(first)
    assert Caller(addresses, "a").inside


def test_a_server_whose_places_are_full_says_so_and_lets_the_next_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_addresses, "descriptors", lambda: 8)  # two of them for HTTP

    async def scenario() -> None:
        ready, stop = asyncio.Event(), asyncio.Event()
        port = await _free_port()
        backend = ScriptedBackend()
        backend.script = [600.0]

        async def none() -> None:
            """Nothing to drain."""

        async def stopped() -> None:
            ready.set()
            await stop.wait()

        app = make_app(backend)
        task = asyncio.create_task(
            run_app(app, Listen(port=port), none, keyed=False, stopped=stopped, signals=False)
        )
        await ready.wait()
        body = b'{"model": "%s", "prompt": "x"}' % MODEL.encode()
        request = (
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        pipes = []
        for n in (1, 2):
            pipes.append(await _connected(port))
            pipes[-1][1].write(request)
            await until(functools.partial(_runs, backend, n))
        reader, writer = await _connected(port)
        answer = await reader.read(-1)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
        writer.close()
        pipes[0][1].close()
        await until(lambda: backend.running == 1)
        pipes.append(await _connected(port))
        pipes[-1][1].write(request)
        await until(lambda: backend.running == 2)
        for _, pipe in pipes:
            pipe.close()
        await until(lambda: backend.running == 0)
        stop.set()
        await task

    run(scenario())


def _runs(backend: ScriptedBackend, n: int) -> bool:
    return backend.running == n


async def _connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.02)


async def _free_port() -> int:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


def test_descriptors_are_raised_and_never_lowered() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_descriptors(most=1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    raise_descriptors()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]


def test_bodies_of_a_key_are_bounded_and_those_of_another_are_not_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_HELD", 100)
    bodies = Bodies()
    with bodies.of("hog") as first, bodies.of("hog") as second, bodies.of("guest") as other:
        first.add(80, 50)
        with pytest.raises(RequestError, match="too much memory") as refused:
            second.add(30, 50)
        assert (refused.value.status, refused.value.retry_after) == (429, 1.0)
        second.add(20, 50)
        other.add(90, 50)
        first.release()
        second.add(70, 50)
    assert not bodies._held


def test_a_body_that_is_allowed_is_never_too_much_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HELD", 100)
    with Bodies().of("key") as held:
        held.add(5000, 5000)
