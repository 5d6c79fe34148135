"""`/v1/status`, and the same as a stream of events: one snapshot a second, made once for all who watch.

    GET /v1/status          the snapshot; ?since=T: with the rows of `series` after that time alone
    GET /v1/status/events   it, then what has changed, once a second: the rows of `series` are then the new ones alone

The stream is read with fetch, since keys travel in headers. Nothing is made while nobody watches.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from wisp.api.errors import error_response, request_id, to_request_error
from wisp.api.fields import refuse
from wisp.api.keys import Keyring
from wisp.api.paths import STATUS_PATH
from wisp.api.sse import event
from wisp.core.errors import RequestError, UnavailableError

log = logging.getLogger("wisp.status")

EVERY_S = 1.0
MOST = 64  # followers at a time
BEHIND = 8  # events that wait for a follower that does not read; then some are left out

Json = dict[str, Any]
Make = Callable[[float], Awaitable[Json]]  # since which row


class StatusStream:
    """Snapshots for those who watch."""

    def __init__(self, make: Make, every_s: float = EVERY_S) -> None:
        """`make` gives the snapshot, with the rows after a time alone (0: all)."""
        self._make = make
        self._every_s = every_s
        self._whole: tuple[float, Json] = (-math.inf, {})
        self._watching: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self.made = 0  # snapshots

    async def snapshot(self) -> Json:
        """The whole, at most a second old."""
        at, whole = self._whole
        if time.monotonic() - at >= self._every_s:
            whole = await self._made(0.0)
            self._whole = (time.monotonic(), whole)
        return whole

    async def since(self, t: float) -> Json:
        """The same, with the rows after `t` alone."""
        return await self._made(t)

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """Events until `close`, or until the caller has enough. Raises UnavailableError if too many watch."""
        if len(self._watching) >= MOST:
            raise UnavailableError(f"{MOST} pages watch already; close one", retry_after=10.0)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(BEHIND)
        self._watching.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._tell())
        try:
            yield event(await self.snapshot())
            while (data := await queue.get()) is not None:
                yield data
        finally:
            self._watching.discard(queue)
            if not self._watching and self._task is not None:
                self._task.cancel()
                self._task = None

    def close(self) -> None:
        """End all streams: a process that stops would wait for them."""
        for queue in self._watching:
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def _tell(self) -> None:
        """Make a snapshot every second. If one fails, those who watch are let go: they come back and are told why."""
        try:
            await self._tell_on()
        except Exception:
            log.exception("no snapshot can be made")
            self._task = None
            self.close()

    async def _tell_on(self) -> None:
        since = (await self.snapshot()).get("now", 0.0) - 2 * self._every_s
        while True:
            await asyncio.sleep(self._every_s)
            made = await self._made(since)
            since = max([since, *made.get("series", {}).get("t", ())])
            data = event(made)
            for queue in self._watching:
                if not queue.full():
                    queue.put_nowait(data)

    async def _made(self, since: float) -> Json:
        self.made += 1
        return await self._make(since)


def status_routes(stream: StatusStream, authorize: Callable[[Request], object]) -> list[Route]:
    """The routes. `authorize` raises RequestError."""

    async def whole(request: Request) -> Response:
        try:
            authorize(request)
            since = _since(request)
            body = msgspec.json.encode(await (stream.since(since) if since else stream.snapshot()))
        except Exception as error:
            return error_response(to_request_error(error, request_id(request)), request_id(request))
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    async def events(request: Request) -> Response:
        try:
            authorize(request)
            following = stream.follow()
            first = await anext(following)
        except Exception as error:
            return error_response(to_request_error(error, request_id(request)), request_id(request))

        async def body() -> AsyncIterator[bytes]:
            try:
                yield first
                async for data in following:
                    yield data
            finally:
                await following.aclose()

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(body(), media_type="text/event-stream", headers=headers)

    return [Route(STATUS_PATH, whole), Route(f"{STATUS_PATH}/events", events)]


def _since(request: Request) -> float:
    text = request.query_params.get("since", "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        refuse("since", "expected a time in seconds, such as a `t` of `series`")
    return value


def admins_only(keys: Keyring) -> Callable[[Request], None]:
    """For a fleet's status, which names keys: an admin's key, or our router's."""

    def authorize(request: Request) -> None:
        header = request.headers.get("authorization")
        if keys.speaks_for(header) is None and not keys.is_admin(keys.authorize(header)):
            message = "this key may not see the fleet; give it `admin = true` in the key file"
            raise RequestError(403, message, code="not_admin", type="permission_error")

    return authorize
