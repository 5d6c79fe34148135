"""The answers to one request as they grow: of one generation, or of several that run side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from wisp.api.backend import Backend, Generation
from wisp.api.output import Delta, Output
from wisp.api.sse import cancel, close
from wisp.core.errors import EngineError


async def answers(
    backend: Backend, generations: Sequence[Generation], outputs: Sequence[Output]
) -> AsyncGenerator[tuple[int, Delta], None]:
    """(which, what the client may read of it), as it becomes certain, until all have ended. Closes the generations in
    any case."""
    if len(generations) == 1:
        deltas = _deltas(backend, generations[0], outputs[0])
        try:
            async for delta in deltas:
                yield 0, delta
        finally:
            await deltas.aclose()
        return
    news: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_into(news, i, _deltas(backend, g, o)))
        for i, (g, o) in enumerate(zip(generations, outputs, strict=True))
    ]
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
    news: asyncio.Queue[tuple[int, Delta] | Exception], index: int, deltas: AsyncGenerator[Delta, None]
) -> None:
    try:
        async for delta in deltas:
            news.put_nowait((index, delta))
    except Exception as error:  # for whoever reads the queue
        news.put_nowait(error)
    finally:
        await deltas.aclose()


async def _deltas(backend: Backend, generation: Generation, output: Output) -> AsyncGenerator[Delta, None]:
    """One answer, up to its end. Closes the generation in any case."""
    if not generation.max_tokens:  # only its prompt was asked for
        output.finish = "length"
        yield Delta("", [], output.finish)
        return
    committed = backend.generate(generation)
    try:
        async for item in committed:
            delta = output.add(item, time.monotonic())
            yield delta
            if delta.finish:
                return
        raise EngineError("the generation ended without a finish")
    finally:
        await close(committed)
