"""The network between processes: their ports, all their connections (`lines`), and requests over HTTP. `sockets` are
the ends of connections as the product's own code expects them."""

from __future__ import annotations

import asyncio
import random
from urllib.parse import urlsplit

import httpx

from wisp.check.faults.lines import LOST, NORMAL, End, Line
from wisp.check.faults.loop import Life, VirtualLoop, present_life
from wisp.check.faults.sockets import App, Listener, Refused, serve


class Network:
    """All connections. `delay` makes the seconds that a frame takes."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop = loop
        self.seed = seed
        self.listeners: dict[str, Listener] = {}
        self.lines: dict[str, Line] = {}
        self.silent: set[frozenset[str]] = set()  # pairs of hosts between which nothing passes
        self.slow = 1.0
        self.balanced: dict[str, list[str]] = {}  # addresses that each stand for several
        self.proxied = 0.0  # until then, something else answers new connections
        self.outdated = 0.0  # until then, it is a server of the release before
        self.old_server: App | None = None
        self._made = 0
        self._rng = self.chance("requests")

    def chance(self, name: str) -> random.Random:
        """A source of its own for each thing, so that one has no influence on another's."""
        return random.Random(f"{self.seed} {name}")

    def delay(self, rng: random.Random) -> float:
        """Mostly milliseconds, now and then a tenth of a second."""
        return (0.0005 + rng.expovariate(1.0) * (0.05 if rng.random() < 0.05 else 0.003)) * self.slow

    def parted(self, a: str, b: str) -> bool:
        return frozenset((a, b)) in self.silent

    def forget(self, line: Line) -> None:
        line.over = True
        self.lines.pop(line.name, None)

    def live(self) -> list[Line]:
        """Connections that at least one end believes in."""
        over = [x for x in self.lines.values() if x.client.closed and x.server.closed]
        for line in over:
            self.forget(line)
        return list(self.lines.values())

    def part(self, a: str, b: str) -> None:
        """Nothing passes between two hosts any more."""
        pair = frozenset((a, b))
        if pair not in self.silent:
            self.silent.add(pair)
            for line in self._between(pair):
                line.up.stall()
                line.down.stall()

    def join(self, a: str, b: str) -> None:
        """It passes again."""
        pair = frozenset((a, b))
        if pair in self.silent:
            self.silent.discard(pair)
            for line in self._between(pair):
                line.up.heal()
                line.down.heal()

    def _between(self, pair: frozenset[str]) -> list[Line]:
        return [x for x in self.live() if frozenset((x.client.life.name, x.server.life.name)) == pair]

    def died(self, life: Life, *, silently: bool) -> None:
        """A process is gone. Its system says so to its peers, unless the machine is gone, too."""
        for address, listener in list(self.listeners.items()):
            if listener.life is life:
                del self.listeners[address]
        for line in self.live():
            for end in (line.client, line.server):
                if end.life is life and end.closed is None:
                    end.closed = LOST
                    if silently:
                        line.up.cut = line.down.cut = True
                    else:
                        line.drain(end)

    # --- opening connections

    async def _reach(self, me: Life, address: str) -> Listener:
        """The process at that address. Raises what a socket would; hangs where nothing comes back."""
        await asyncio.sleep(2 * self.delay(self._rng))
        if address in self.balanced:
            behind = self.balanced[address]
            address = self._rng.choice([a for a in behind if a in self.listeners] or behind)
        listener = self.listeners.get(address)
        host = listener.life.name if listener is not None else address
        if self.parted(me.name, host):
            await asyncio.sleep(1e9)
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens at {address}")
        return listener

    async def open(self, address: str, headers: dict[str, str]) -> Line | Refused:
        """A session socket, or the HTTP answer that refuses it."""
        self._made += 1
        name = f"c{self._made}"
        me = present_life()
        listener = await self._reach(me, address)
        if self.loop.now < self.proxied:
            return 502, {}, b"a proxy"
        client, server = End(me), End(listener.life)
        line = Line(self, name, client, server, address)
        self.lines[name] = line
        if self.parted(me.name, listener.life.name):
            line.up.stall()
            line.down.stall()
        answer: asyncio.Future[Refused | None] = self.loop.create_future()
        request = list(headers.items())
        line.up.carry(lambda: serve(self.loop, line, listener, request, answer))
        try:
            refused = await answer
        except BaseException:
            line.close(client, LOST)
            raise
        if refused is not None:
            self.forget(line)
            client.close(NORMAL)
            server.close(NORMAL)
            return refused
        return line

    async def request(self, method: str, url: str, authorization: str, timeout_s: float) -> tuple[int, bytes]:
        """An HTTP request and its answer. Raises httpx.HTTPError."""
        parts = urlsplit(url)
        me = present_life()
        try:
            async with asyncio.timeout(timeout_s):
                listener = await self._reach(me, parts.netloc)
                answer: asyncio.Future[tuple[int, bytes]] = self.loop.create_future()
                self.loop.run_in(
                    listener.life, self._answer, listener, method, parts.path, authorization, me, answer
                )
                found = await answer
                await asyncio.sleep(self.delay(self._rng))
                if self.parted(me.name, listener.life.name):
                    await asyncio.sleep(1e9)
                return found
        except TimeoutError:
            raise httpx.ReadTimeout("no answer in time") from None
        except OSError as error:
            raise httpx.ConnectError(str(error)) from None

    def _answer(
        self,
        listener: Listener,
        method: str,
        path: str,
        authorization: str,
        me: Life,
        answer: asyncio.Future[tuple[int, bytes]],
    ) -> None:
        async def work() -> None:
            found = await listener.http(method, path, authorization)
            self.loop.run_in(me, lambda: None if answer.done() else answer.set_result(found))

        self.loop.create_task(work())
