"""How long a transport waits for a peer that takes nothing: by looks without progress, also after it was closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from wisp.api.connections import LOOKS, _Transport


class Pipe:
    """A transport that holds what it is told to, look by look; the last amount stays."""

    def __init__(self, *waiting: int) -> None:
        self.waiting = list(waiting)
        self.aborted = asyncio.Event()
        self.closing = False

    def get_write_buffer_size(self) -> int:
        return self.waiting.pop(0) if len(self.waiting) > 1 else self.waiting[0]

    def get_extra_info(self, name: str) -> str:
        return name

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        """Never called here."""

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted.set()


def looks_until_cut_off(pipe: Callable[[], Pipe], what: Callable[[_Transport], None]) -> int:
    """How often it was looked at before the end."""

    async def scenario() -> int:
        made = pipe()
        transport = _Transport(cast(asyncio.Transport, made), 0.0)
        looked, look = [0], transport._look

        def counted(before: int, looks: int) -> None:
            looked[0] += 1
            look(before, looks)

        transport._look = counted  # type: ignore[method-assign]
        what(transport)
        await asyncio.wait_for(made.aborted.wait(), 60)
        return looked[0]

    return asyncio.run(scenario())


def test_a_peer_that_takes_nothing_is_cut_off_after_a_few_looks() -> None:
    assert looks_until_cut_off(lambda: Pipe(100), _Transport.watch) == LOOKS


def test_one_that_takes_a_little_has_all_the_time_again() -> None:
    def slow() -> Pipe:  # asked for twice a look: how it is, and how it was when the next look began
        return Pipe(100, 100, 100, 99, 99, 99)

    assert looks_until_cut_off(slow, _Transport.watch) > LOOKS


def test_a_closed_connection_does_not_wait_for_ever_for_the_rest_to_be_taken() -> None:
    def paused_closed_and_read_a_little(transport: _Transport) -> None:
        transport.watch()
        transport.close()
        transport.relax()  # below the low-water mark, and then nothing more

    assert looks_until_cut_off(lambda: Pipe(100), _Transport.close) == LOOKS
    assert looks_until_cut_off(lambda: Pipe(100), paused_closed_and_read_a_little) == LOOKS
