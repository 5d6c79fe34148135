"""Distance and slowness, added to what is real."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import DraftEngine, Proposal


class DelayedLine:
    """A TCP proxy to `port` of the loopback address: every byte arrives half of `rtt_ms` later, in order."""

    def __init__(self, port: int, rtt_ms: float) -> None:
        self._to = port
        self._delay_s = rtt_ms / 2e3
        self._tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> DelayedLine:
        self._server = await asyncio.start_server(self._line, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in self._ends:
            end.transport.abort()
        await asyncio.sleep(0)  # in which they go

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        self._ends += [writer, back]
        for way in (self._pass_on(reader, back), self._pass_on(there, writer)):
            self._tasks.append(asyncio.create_task(way))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for due, data in _chunks(reader, self._delay_s):
                loop.call_at(due, writer.write, data)
        except OSError:
            pass
        finally:
            loop.call_later(self._delay_s, writer.close)  # behind what is on its way


async def _chunks(reader: asyncio.StreamReader, delay_s: float) -> AsyncIterator[tuple[float, bytes]]:
    """What arrives, and when it is to go on (loop time)."""
    while data := await reader.read(65536):
        yield asyncio.get_running_loop().time() + delay_s, data


class PacedDraft:
    """A draft engine whose every step takes `draft_ms`, or longer if the engine itself does."""

    def __init__(self, engine: DraftEngine, draft_ms: float) -> None:
        self._engine = engine
        self._draft_s = draft_ms / 1e3
        self.name = engine.name
        self.forget = engine.forget
        self.close = engine.close

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        due = time.monotonic() + self._draft_s
        proposal = self._engine.propose(session, context, position, sampling, edit)
        time.sleep(max(0.0, due - time.monotonic()))
        return proposal
