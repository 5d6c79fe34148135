"""The answers to one request as they grow: of one generation, or of several that run side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from wisp.api.backend import Backend, Generation
from wisp.api.output import Delta, Output
from wisp.api.sse import cancel, close
from wisp.core.errors import EngineError


def answers(
    backend: Backend, generations: Sequence[Generation], outputs: Sequence[Output]
) -> AsyncGenerator[tuple[int, Delta], None]:
    """(which, what the client may read of it), as it becomes certain, until all have ended. Closes the generations in
    any case."""
    found = [_deltas(i, backend, g, o) for i, (g, o) in enumerate(zip(generations, outputs, strict=True))]
    return found[0] if len(found) == 1 else _merged(found)


async def _merged(
    found: Sequence[AsyncGenerator[tuple[int, Delta], None]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    news: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()
    tasks = [asyncio.create_task(_into(news, deltas)) for deltas in found]
    left = len(tasks)
    try:
        while left:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            left -= bool(item[1].finish)
            yield item
    finally:
        for task in tasks:
            await cancel(task)


async def _into(
    news: asyncio.Queue[tuple[int, Delta] | Exception], deltas: AsyncGenerator[tuple[int, Delta], None]
) -> None:
    try:
        async for item in deltas:
            news.put_nowait(item)
    except Exception as error:  # for the reader of the queue
        news.put_nowait(error)
    finally:
        await deltas.aclose()


async def _deltas(
    index: int, backend: Backend, generation: Generation, output: Output
) -> AsyncGenerator[tuple[int, Delta], None]:
    """One answer, up to its end. Closes the generation in any case."""
    if not generation.max_tokens:  # only its prompt was asked for
        output.finish = "length"
        yield index, Delta("", [], output.finish)
        return
    committed = backend.generate(generation)
    try:
        async for item in committed:
            delta = output.add(item, time.monotonic())
            yield index, delta
            if delta.finish:
                return
        raise EngineError("the generation ended without a finish")
    finally:
        await close(committed)
