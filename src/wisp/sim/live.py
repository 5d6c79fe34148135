"""A fleet in real time: the simulator's devices, their time kept by an event loop, their verifier behind sockets.

    SimDevice (core.Drafter, link, script)  --Uplink-->  Sockets  --one WebSocket per device-->  a live `wisp serve`
                  ^ Timeline, advanced by Clock

Behind a router, a device follows redirects as an edge does (`core.draft.itinerary`). It opens one more WebSocket to
each verifier that the router names, and comes back to the router when that verifier is lost or shuts down.

All timers of all devices are in one heap, with one timer of the event loop for the first of them; a device has no task.
A callback sees the time at which it was due, not the time at which the loop reached it, so that timers of a millisecond
do not add up to a slower device. The delay is measured (`Clock.lags_ms`). A run with much delay is invalid.
"""

from __future__ import annotations

import asyncio
import functools
import math
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from websockets.exceptions import InvalidStatus, WebSocketException

from wisp.core.draft.itinerary import HOME, Go, Home, Itinerary, Said, Send
from wisp.core.draft.patience import Patience
from wisp.core.errors import ConfigError, ProtocolError, RequestError, UnavailableError
from wisp.core.protocol.messages import (
    REFUSAL_HEADER,
    Open,
    Refused,
    ServerMessage,
    Verdict,
    Welcome,
    decode_server_message,
    encode,
    welcome_from,
)
from wisp.edge.address import redirected_url, session_url
from wisp.edge.link import HANDSHAKE_S, LOST, Lost
from wisp.sim.timeline import Timeline
from wisp.sim.wire import Wire

EARLY_S = 5e-4  # an event loop's timers are good to a millisecond: half of one early is in time
AT_ONCE = 32  # connections being opened
CLOSE_S = 0.2  # for goodbyes
PROBE_S = 0.05  # between measurements of the verifier's loop


class Clock:
    """Advances a Timeline with an event loop's time. Zero is when it is made."""

    def __init__(self, env: Timeline, failed: Callable[[Exception], None]) -> None:
        """`failed` is told of the first exception of a callback; then time stands still."""
        self.env = env
        self.lags_ms: list[float] = []  # how late the loop was, each time
        self._loop = asyncio.get_running_loop()
        self._zero = self._loop.time() - env.now
        self._failed = failed
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # of the timer
        self._stopped = False

    @property
    def now(self) -> float:
        """Seconds by the loop's clock. (uvloop's counts whole milliseconds, and its timers fit that.)"""
        return self._loop.time() - self._zero

    def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def happen(self, what: Callable[[], None]) -> None:
        """Something happens from outside, now, after all callbacks that were due before."""
        if self._stopped:
            return
        try:
            self._advance(self.now)
            what()
        except Exception as error:
            self._fail(error)
            return
        self.arm()

    def arm(self) -> None:
        """Set the timer for the next callback."""
        due = self.env.next
        if due == float("inf") or (self._timer is not None and self._due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(self._zero + due, self._wake)

    def _wake(self) -> None:
        self._timer = None
        now = self.now
        self.lags_ms.append(max(0.0, now - self._due) * 1e3)
        try:
            self._advance(now + EARLY_S)
        except Exception as error:
            self._fail(error)
            return
        self.arm()

    def _advance(self, to: float) -> None:
        if to > self.env.now:
            self.env.run(until=to)

    def _fail(self, error: Exception) -> None:
        self.stop()
        self._failed(error)


class Sockets:
    """`sim_device.Uplink` to a live verifier, or a router: one WebSocket for each device, and one for each redirection.

    redirects: how often a router sent a session somewhere
    """

    def __init__(self, server: str, api_key: str | None = None) -> None:
        """Raises ConfigError for a bad URL."""
        self.url = session_url(server)
        self.senders: dict[int, Callable[[Verdict | Refused], None]] = {}
        self.clock: Clock | None = None  # once time passes
        self.frames_out = self.frames_in = self.redirects = 0
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._patience = Patience(math.inf, 0.0)  # a device in the field never gives up
        self._digests: dict[int, str] = {}  # of the model that each device found at home
        self._itineraries: dict[int, Itinerary] = {}  # of each device's session
        self._wires: dict[int, dict[str | None, Wire]] = {}  # of each device, by address
        self._all: list[Wire] = []
        self._following: set[asyncio.Task[None]] = set()
        self._closing = False
        self._problem = ""  # why the run is over

    async def connect(self, devices: int) -> Welcome:
        """Open the sockets. Returns the verifier's welcome. Raises UnavailableError, ConfigError or ProtocolError."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(index: int) -> Welcome:
            self._wires[index] = {}
            async with gate:
                welcome = await self._extend(index, HOME)
                self._digests[index] = welcome.digest
                return welcome

        opening = [asyncio.ensure_future(one(i)) for i in range(devices)]
        try:
            welcomes = await asyncio.gather(*opening)
        except BaseException:
            for task in opening:
                task.cancel()
            await self.close()
            raise
        return welcomes[0]

    async def probe(self, lags_ms: list[float]) -> None:
        """Until cancelled, measure how long the verifier's event loop takes to answer a ping."""
        wire, _ = await self._wire(self.url, lambda frame: None, self._ended)
        try:
            while True:
                started = time.monotonic()
                await wire.ping()
                lags_ms.append((time.monotonic() - started) * 1e3)
                await asyncio.sleep(PROBE_S)
        finally:
            wire.close()

    # --- Uplink

    def receive(self, connection: int, message: Said) -> None:
        self.frames_out += 1
        itinerary = self._itineraries.get(connection)
        if isinstance(message, Open):
            message = msgspec.structs.replace(message, digest=self._digests[connection])
            if itinerary is None or itinerary.session != message.session:
                itinerary = self._itineraries[connection] = Itinerary(message.session, self._patience)
        if itinerary is not None:
            self._send(connection, itinerary.say(message))

    def lost(self, connection: int) -> None:
        """A device is switched off: its connections break without a word."""
        self._itineraries.pop(connection, None)
        for wire in self._wires.pop(connection).values():
            wire.abort()

    async def close(self) -> None:
        """Close all sockets, in any state."""
        self._closing = True
        for task in self._following:
            task.cancel()
        for wire in self._all:
            wire.close()
        await asyncio.sleep(CLOSE_S)
        for wire in self._all:
            wire.abort()
        await asyncio.sleep(0)

    # --- sockets

    def _send(self, index: int, messages: list[Said]) -> None:
        if (wire := self._wires[index].get(self._itineraries[index].at)) is not None:
            for message in messages:
                wire.send(encode(message))

    async def _extend(self, index: int, address: str | None) -> Welcome:
        """Connect a device to another address. Raises UnavailableError, ConfigError or ProtocolError."""
        url = self.url if address is HOME else redirected_url(self.url, address)
        heard = functools.partial(self._heard, index, address)
        broken = functools.partial(self._broken, index, address)
        wire, welcome = await self._wire(url, heard, broken)
        if index not in self._wires:
            wire.close()
            raise UnavailableError("the device was switched off")
        self._wires[index][address] = wire
        return welcome

    async def _wire(
        self, url: str, heard: Callable[[bytes], None], broken: Callable[[str], None]
    ) -> tuple[Wire, Welcome]:
        """A connection, and the verifier's welcome. Whoever cancels it has no connection.

        Raises UnavailableError, ConfigError or ProtocolError.
        """
        wire = Wire(url, self._headers, heard, broken)
        try:
            wire.welcome = await self._welcome(wire, url)
        except BaseException:
            wire.abort()
            raise
        self._all.append(wire)
        return wire, wire.welcome

    async def _welcome(self, wire: Wire, url: str) -> Welcome:
        parts = urlsplit(url)
        secure = parts.scheme == "wss"
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await asyncio.get_running_loop().create_connection(
                    lambda: wire,
                    parts.hostname or "",
                    parts.port or (443 if secure else 80),
                    ssl=ssl.create_default_context() if secure else None,
                )
                frame = await wire.ready
        except (OSError, TimeoutError, WebSocketException) as error:
            code = error.response.headers.get(REFUSAL_HEADER) if isinstance(error, InvalidStatus) else None
            if code == "invalid_api_key":
                raise ConfigError(f"the verifier at {url} refused our key; set WISP_API_KEY") from None
            raise UnavailableError(f"no verifier at {url}: {str(error) or 'no answer'}") from None
        if wire.ended:  # in the same moment
            raise UnavailableError(f"the verifier at {url} went away")
        return welcome_from(decode_server_message(frame))

    def _heard(self, index: int, address: str | None, frame: bytes) -> None:
        self.frames_in += 1
        clock = self.clock
        if clock is not None:
            clock.happen(lambda: self._take(index, address, decode_server_message(frame)))

    def _take(self, index: int, address: str | None, message: ServerMessage | Lost) -> None:
        """Something arrived from `address`: do what follows from it, and tell the device."""
        itinerary, clock = self._itineraries.get(index), self.clock
        if isinstance(message, Refused) and not message.session:
            raise ProtocolError(message.code, f"the verifier refused a frame: {message.message}")
        if itinerary is None or clock is None:
            return  # the device was switched off, or has not asked for anything yet
        try:
            if isinstance(message, Lost):
                step = itinerary.lost(address, clock.now)
            else:
                step = itinerary.heard(address, message, clock.now)
        except RequestError as error:
            step = Refused(itinerary.session, error.code or "failed", str(error), fatal=True)
        if isinstance(step, Send):
            self._send(index, step.messages)
        elif isinstance(step, Go):
            self._follow(index, step.address)
        elif isinstance(step, Home):
            why = "its verifier is gone; open it again"
            self.senders[index](Refused(itinerary.session, "unknown_session", why, step.after_s or 0.0))
        elif isinstance(step, Welcome):
            why = "another verifier serves it; open it again"
            self.senders[index](Refused(itinerary.session, "unknown_session", why))
        elif isinstance(step, Verdict | Refused):
            self.senders[index](step)

    def _follow(self, index: int, address: str) -> None:
        self.redirects += 1
        wire = self._wires[index].get(address)
        if wire is not None and wire.welcome is not None:
            self._take(index, address, wire.welcome)
            return
        task = asyncio.ensure_future(self._reach(index, address))
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _reach(self, index: int, address: str) -> None:
        try:
            event: Welcome | Lost = await self._extend(index, address)
        except (UnavailableError, ConfigError, ProtocolError):
            event = LOST
        self._tell(index, address, event)

    def _broken(self, index: int, address: str | None, reason: str) -> None:
        if address is HOME:
            self._ended(reason)
        elif index in self._wires:
            self._wires[index].pop(address, None)
            self._tell(index, address, LOST)

    def _tell(self, index: int, address: str | None, event: Welcome | Lost) -> None:
        if self.clock is not None and not self._closing:
            self.clock.happen(lambda: self._take(index, address, event))

    def check(self) -> None:
        """Raises UnavailableError where a connection to the verifier has ended."""
        if self._problem:
            raise UnavailableError(f"the verifier closed a connection: {self._problem}")

    def _ended(self, reason: str) -> None:
        if not self._closing:
            self._problem = reason
            if self.clock is not None:
                self.clock.happen(self.check)
