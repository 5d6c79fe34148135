"""Server-sent events; a client that disconnects ends the work for it.

A response runs in one task, next to another that waits for the client to disconnect; whichever ends first
ends the other. Cancelling the response closes the generation it reads from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}


def event(data: object) -> bytes:
    """One event. JSON has no raw line breaks, so one `data:` line is enough."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def named_event(name: str, data: object) -> bytes:
    """One event with a name."""
    return b"event: " + name.encode() + b"\n" + event(data)


class ClientGoneError(Exception):
    """The client disconnected before it had its answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientGoneError as soon as the client disconnects.

    The request's body must have been read.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await cancel(gone)
        await cancel(task)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel and wait, so that what `task` held is released; how it ended is not of interest any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # otherwise asyncio complains that nobody looked


async def close(iterator: AsyncIterator[Any]) -> None:
    """Close an asynchronous iterator that may or may not be a generator."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


class EventSender:
    """Sends a response of events. It starts with the first one: until then a request may still fail properly."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = {**headers, **_HEADERS}
        self._last = 0.0  # when something was sent, by the clock of the event loop
        self._sending = False
        self.started = False

    async def send(self, data: bytes) -> None:
        self._sending = True
        if not self.started:
            headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in self._headers.items()]
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._last = asyncio.get_running_loop().time()
        self._sending = False

    async def close(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def kept_alive(self, every_s: float) -> AsyncIterator[None]:
        """Around what sends events: a comment whenever nothing was sent for `every_s` seconds.

        One task for a whole stream: one for each event would be a good part of what an event costs.
        """
        self._last = asyncio.get_running_loop().time()
        comments = asyncio.create_task(self._comment(every_s))
        try:
            yield
        finally:
            await cancel(comments)

    async def _comment(self, every_s: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            silent_s = loop.time() - self._last
            if silent_s >= every_s and not self._sending:  # a client that does not take an event has one
                await self.send(KEEP_ALIVE)
            await asyncio.sleep(every_s if self._sending else max(every_s - (loop.time() - self._last), 0.0))
