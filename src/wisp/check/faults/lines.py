"""Connections with delays, that stall, break, and are noticed late.

A connection (`Line`) carries frames in order, both ways. Frames of different connections overtake each other. What can
happen to one is what happens to TCP and what runs over it:

    cut      what is in flight is lost, mid-frame too; each end notices when it does, or only by a ping
    drain    one end is gone; what it sent before is still delivered
    stall    nothing arrives until it heals: a black hole, in one direction or both

A frame is the real bytes of a message. A frame that was cut never arrives, as no WebSocket delivers half of one.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from websockets.frames import Close

from wisp.check.faults.loop import Life

if TYPE_CHECKING:
    from wisp.check.faults.network import Network

PING_S, PONG_S = 10.0, 20.0  # between pings of either end, and the longest wait for the answer
NORMAL = Close(1000, "")
LOST = Close(1006, "")  # no close frame came


class End:
    """One end of a connection. `closed`: why nothing more comes."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.inbox: deque[bytes] = deque()
        self.closed: Close | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.unanswered: float | None = None  # when the ping was sent that has no answer yet

    def feed(self, frame: bytes) -> None:
        if self.closed is None:
            self.inbox.append(frame)
            self._wake()

    def close(self, why: Close) -> None:
        if self.closed is None:
            self.closed = why
            self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
        self.waiter = None

    async def next(self) -> bytes | None:
        """The next frame; None once the connection is over."""
        while not self.inbox:
            if self.closed is not None:
                return None
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.inbox.popleft()


class Way:
    """One direction of a connection."""

    def __init__(self, net: Network, rng: random.Random, to: End) -> None:
        self.net, self.rng, self.to = net, rng, to
        self.free = 0.0  # when the last frame arrives
        self.stalls = 0
        self.under_way: deque[Callable[[], object]] = deque()
        self.held = 0  # frames that came while it stalled
        self.cut = False

    def carry(self, what: Callable[[], object]) -> None:
        """Have the other end do `what`, in its turn."""
        if self.cut:
            return
        now = self.net.loop.now
        self.free = max(self.free, now + self.net.delay(self.rng))
        self.under_way.append(what)
        self.net.loop.run_in(self.to.life, self._arrive, after_s=self.free - now)

    def _arrive(self) -> None:
        """Something has come: the first that is under way, also where the receiver was frozen while a stall healed."""
        if self.cut:
            return
        if self.stalls:
            self.held += 1
        else:
            self.under_way.popleft()()

    def stall(self) -> None:
        self.stalls += 1

    def heal(self) -> None:
        self.stalls -= 1
        if not self.stalls:
            held, self.held = self.held, 0
            for _ in range(held):
                self.net.loop.run_in(self.to.life, self._arrive)


class Line:
    """A connection between a client and a server."""

    def __init__(self, net: Network, name: str, client: End, server: End, address: str) -> None:
        self.net, self.name, self.address = net, name, address
        self.client, self.server = client, server
        self.up = Way(net, net.chance(f"up {name}"), server)
        self.down = Way(net, net.chance(f"down {name}"), client)
        self.over = False
        for end, out, back in ((client, self.up, self.down), (server, self.down, self.up)):
            net.loop.run_in(end.life, self._ping, end, out, back, after_s=PING_S)

    def cut(self, client_s: float | None, server_s: float | None) -> None:
        """It breaks. Each end notices after so many seconds, or by a ping (None)."""
        self.up.cut = self.down.cut = True
        for end, after_s in ((self.client, client_s), (self.server, server_s)):
            if after_s is not None:
                self.net.loop.run_in(end.life, end.close, LOST, after_s=after_s)

    def drain(self, gone: End, why: Close = LOST) -> None:
        """One end is gone: the other hears what was sent before, and then that."""
        out, back, other = (
            (self.up, self.down, self.server) if gone is self.client else (self.down, self.up, self.client)
        )
        out.carry(lambda: self._closed(other, why))
        back.cut = True

    def _closed(self, end: End, why: Close) -> None:
        end.close(why)
        self.up.cut = self.down.cut = True

    def close(self, end: End, why: Close) -> None:
        """One end closes it, in order."""
        if end.closed is None:
            end.close(why)
            self.drain(end, why)
        self.net.forget(self)

    def _ping(self, end: End, out: Way, back: Way) -> None:
        if end.closed is not None:
            return
        now = self.net.loop.now
        if end.unanswered is not None and now >= end.unanswered + PONG_S:
            end.close(LOST)
            self.drain(end)
            return
        if end.unanswered is None:
            end.unanswered = now
        other = self.server if end is self.client else self.client
        out.carry(lambda: back.carry(lambda: self._pong(end)) if other.closed is None else None)
        self.net.loop.run_in(end.life, self._ping, end, out, back, after_s=PING_S)

    def _pong(self, end: End) -> None:
        end.unanswered = None
