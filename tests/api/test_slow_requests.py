"""Requests that do not come to their end, on a virtual clock."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from wisp.api.http import KEEP_ALIVE_S, READ_BYTES_PER_S, READ_S, PunctualH11

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


class Clock(asyncio.SelectorEventLoop):
    """An event loop on which time goes on when it is told to."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        """Let everything that can happen now happen."""
        for _ in range(10):
            self.run_until_complete(asyncio.sleep(0))

    def sleep(self, seconds: float) -> None:
        """In steps, since what happens may be waited on."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + max(0.5, seconds / 50))
            self.settle()


class Line(asyncio.Transport):
    """A client's connection to a server that answers when it is told to."""

    def __init__(self, clock: Clock) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 8100)})
        self.clock = clock
        self.heard = b""
        self.closed = False
        self.reading = True
        config = uvicorn.Config(_answer, http=PunctualH11, timeout_keep_alive=KEEP_ALIVE_S, log_config=None)  # type: ignore[arg-type]
        config.load()
        self.server = PunctualH11(config, ServerState(), {}, clock)
        self.server.connection_made(self)

    def say(self, data: bytes) -> None:
        self.server.data_received(data)

    def run(self) -> None:
        """Let the application do what it can."""
        self.clock.settle()

    def write(self, data: Any) -> None:
        self.heard += bytes(data)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.server.connection_lost(None)

    def is_closing(self) -> bool:
        return self.closed

    def get_protocol(self) -> Any:
        return self.server

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    if "later" in scope["path"]:
        await asyncio.sleep(3000)
    while "refused" not in scope["path"] and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def line() -> Iterator[Line]:
    clock = Clock()
    with contextlib.closing(clock):
        asyncio.set_event_loop(clock)
        yield Line(clock)
        asyncio.set_event_loop(None)


def ask(line: Line) -> None:
    """One whole request, and its answer."""
    line.say(HEAD + b"content-length: 2\r\n\r\n{}")
    line.run()
    assert line.heard.endswith(b"ok")


def test_a_connection_that_says_nothing_is_closed(line: Line) -> None:
    line.clock.sleep(READ_S - 1)
    assert not line.closed
    line.clock.sleep(2)
    assert line.closed


def test_a_head_that_comes_a_byte_at_a_time_has_no_more_time_than_others(line: Line) -> None:
    for i in range(int(READ_S) - 1):
        line.say(HEAD[i : i + 1])
        line.clock.sleep(1)
    was_open = not line.closed
    line.say(b"x")
    line.clock.sleep(2)
    assert line.closed
    assert was_open
    head, _, body = line.heard.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_a_body_that_stops_in_the_middle_ends_the_request_and_tells_the_application(line: Line) -> None:
    line.say(HEAD + b"content-length: 100\r\n\r\n{")
    line.run()  # it waits for the rest
    line.clock.sleep(READ_S + 1)
    assert line.closed
    assert line.heard.startswith(b"HTTP/1.1 408")
    line.run()  # it is told of a disconnection, and answers nobody
    assert not asyncio.all_tasks(line.clock)
    assert line.heard.count(b"HTTP/1.1") == 1


def test_a_long_body_on_a_slow_line_is_waited_for(line: Line) -> None:
    line.say(HEAD + f"content-length: {100 * READ_BYTES_PER_S}\r\n\r\n".encode())
    for _ in range(100):
        line.clock.sleep(1)
        line.say(b"x" * READ_BYTES_PER_S)
        line.run()
    assert not line.closed
    assert line.heard.endswith(b"ok")


def test_the_time_in_which_we_do_not_read_is_not_the_clients(line: Line) -> None:
    line.say(HEAD.replace(b"completions", b"later") + b"content-length: 300000\r\n\r\n" + b"x" * 200_000)
    assert not line.reading
    line.clock.sleep(2900)
    assert not line.closed
    line.clock.sleep(1000)
    assert line.closed


def test_an_answer_may_take_as_long_as_it_likes(line: Line) -> None:
    line.say(HEAD.replace(b"completions", b"later") + b"content-length: 2\r\n\r\n{}")
    line.run()
    line.clock.sleep(3001)
    assert line.heard.endswith(b"ok")


def test_an_idle_connection_is_kept_for_the_next_request_and_then_closed(line: Line) -> None:
    ask(line)
    line.clock.sleep(KEEP_ALIVE_S - 1)
    assert not line.closed
    ask(line)
    line.clock.sleep(KEEP_ALIVE_S + 1)
    assert line.closed


def test_a_next_request_that_is_only_begun_is_not_waited_for_for_ever(line: Line) -> None:
    ask(line)
    line.say(b"P")  # uvicorn's own clock for idle connections stops at this
    line.clock.sleep(READ_S + 1)
    assert line.closed


def test_a_refused_request_whose_body_never_comes_ends_too(line: Line) -> None:
    line.say(HEAD.replace(b"completions", b"refused") + b"content-length: 100\r\n\r\n")
    line.run()
    assert line.heard.endswith(b"ok")
    line.clock.sleep(READ_S + 1)
    assert line.closed
    assert line.heard.count(b"HTTP/1.1") == 1
