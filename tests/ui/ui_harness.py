"""What the tests of the pages share: a line that stops in the middle of an answer, and what a browser says."""

from __future__ import annotations

import asyncio

from harness import Cutter

ENDLESS = 1 << 40
# What a browser says on its console where a test has it refused, or cut off.
REFUSED = "Failed to load resource: the server responded with a status of 40"
CUT_OFF = "Failed to load resource: net::ERR"


class Gate(Cutter):
    """A TCP proxy to `port`. After `hold` it passes on so many bytes more, and then nothing until `open`."""

    def __init__(self, port: int) -> None:
        self._left = ENDLESS
        super().__init__(port, seed=0)

    def hold(self, after: int) -> None:
        """Pass on `after` bytes more, of all connections together."""
        self._left = after

    def open(self) -> None:
        """Pass on everything again."""
        self._left = ENDLESS

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]
    ) -> None:
        try:
            while data := await reader.read(65536):
                while self._left <= 0:
                    await asyncio.sleep(0.01)
                self._left -= len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
