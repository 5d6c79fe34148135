"""The bare echo: `python -m benchmarks.overhead.echo PORT BYTES` answers every frame with so many bytes."""

from __future__ import annotations

import asyncio
import sys
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from wisp.api.process import event_loop_factory


async def serve_echo(port: int, reply_bytes: int) -> None:
    """The bare server: one task per connection, one answer per frame."""
    reply = bytes(reply_bytes)

    async def answer(peer: ServerConnection) -> None:
        async for _ in peer:
            await peer.send(reply)

    def health(peer: ServerConnection, request: Request) -> Response | None:
        return peer.respond(HTTPStatus.OK, "{}") if request.path == "/health" else None

    async with serve(answer, "127.0.0.1", port, compression=None, process_request=health) as server:
        await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(serve_echo(int(sys.argv[1]), int(sys.argv[2])))
