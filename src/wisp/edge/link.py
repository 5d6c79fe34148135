"""The edge's connection to its verifier: one WebSocket, many sessions, kept up for as long as the process lives.

When it breaks, and when it is back, every session is told (`core.draft.itinerary` says what follows). Reconnecting
backs off exponentially, with jitter, so that a fleet does not storm a restarted verifier.

A router redirects sessions to other addresses. Each address gets one more link, which many sessions share. That link
is tried once. When it ends, its sessions go back to the router.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Callable

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from wisp import __version__
from wisp.core.draft.patience import BEAT_S, GIVE_UP_S, Patience
from wisp.core.errors import ConfigError, ProtocolError, RequestError, UnavailableError
from wisp.core.protocol.messages import (
    MAX_FRAME,
    REFUSAL_HEADER,
    SUBPROTOCOL,
    VERSION,
    Hello,
    Message,
    Redirect,
    Refused,
    Verdict,
    Welcome,
    check_verdict,
    decode_server_message,
    encode,
    welcome_from,
)
from wisp.edge.address import is_local, redirected_url, session_url
from wisp.edge.answers import plain, reason, stranger

log = logging.getLogger("wisp.link")

BACKOFF_S = (0.05, 5.0)  # first and longest wait between attempts
HANDSHAKE_S = 10.0  # to connect, and as long again for the welcome
IDLE_S = 30.0  # a link to a redirected address is kept this long after its last session
# Faults of connections. Any other exception is a fault of this program, and is logged with its traceback
EXPECTED = (OSError, EOFError, WebSocketException, ProtocolError, ImportError)


class Lost:
    """Told to sessions when the connection breaks."""


LOST = Lost()
FromLink = Welcome | Verdict | Refused | Redirect | Lost
Listener = Callable[[FromLink], None]


async def wait_for(
    change: asyncio.Event, patience: Patience, gave_up: Callable[[], UnavailableError]
) -> None:
    """Return at the change, or when it is time to look again. Raises what `gave_up` makes once patience ends."""
    left_s = patience.left_s(time.monotonic())
    if not left_s:
        raise gave_up()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(left_s):
            await change.wait()


class VerifierLink:
    """Keeps one connection to `server`. Sessions register a listener and `send`."""

    def __init__(
        self,
        server: str,
        api_key: str | None = None,
        *,
        fingerprint: str = "",
        give_up_s: float = GIVE_UP_S,
        once: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`fingerprint`: of the draft model's vocabulary, "" if there is none. Raises ConfigError for a bad URL.

        once: try to connect a single time, and end with the connection.
        """
        self.url = session_url(server)
        self.api_key = _checked(api_key)
        self.fingerprint = fingerprint
        self.patience = Patience(give_up_s, time.monotonic())
        self.welcome: Welcome | None = None  # while connected
        self.problem: str = ""  # why it is not connected
        self.fatal: RequestError | None = None  # trying again will not help
        self.reconnects = 0
        self.once = once
        self.ended = False  # its one attempt is over
        self.redirects = Redirects(self._redirected)
        self._tls = tls
        self._closing = False
        self._changed = asyncio.Event()
        self._listeners: dict[str, Listener] = {}
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._beats: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to connect, on the running event loop."""
        self._task = asyncio.create_task(self._keep_connected())
        if not self.once:  # no session waits for such a link
            self._beat()

    async def close(self) -> None:
        """Close the connection, and those to redirected addresses, and stop trying."""
        self._closing = True
        if self._beats is not None:
            self._beats.cancel()
        await self.redirects.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def connected(self) -> Welcome:
        """Wait for a verifier. Raises UnavailableError when patience ends, RequestError if waiting cannot help."""
        while self.welcome is None:
            if self.fatal is not None:
                raise self.fatal
            await wait_for(self._changed, self.patience, self.gave_up)
        return self.welcome

    def gave_up(self) -> UnavailableError:
        """The error of a session that has waited long enough."""
        return UnavailableError(
            f"no verifier at {self.url} for {self.patience.give_up_s:g} s ({self.problem or 'no answer'}); "
            "is `wisp serve` running there?"
        )

    def listen(self, session: str, listener: Listener) -> None:
        """Pass messages for `session`, and each loss and return of the connection, to `listener`."""
        self._listeners[session] = listener

    def unlisten(self, session: str) -> None:
        """The session is over, or elsewhere."""
        self._listeners.pop(session, None)
        if self.once and not self._listeners and self._task is not None and not self.ended:
            asyncio.get_running_loop().call_later(IDLE_S, self._end_if_idle)

    def send(self, message: Message) -> None:
        """Send, if connected. Otherwise drop it: sessions open again when the connection is back.

        Raises RequestError for a message that is too long for the verifier: it would end the connection for all.
        """
        if self.welcome is None:
            return
        frame = encode(message)
        if len(frame) > self.welcome.max_frame:
            raise _too_long(len(frame), self.welcome.max_frame)
        self._out.put_nowait(frame)

    def _end_if_idle(self) -> None:
        if not self._listeners and self._task is not None:
            self._closing = True
            self._task.cancel()

    def _redirected(self, address: str) -> VerifierLink:
        url = redirected_url(self.url, address)
        return VerifierLink(url, self.api_key, fingerprint=self.fingerprint, once=True)

    def _beat(self) -> None:
        self.patience.beat(time.monotonic())
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    # --- the connection

    async def _keep_connected(self) -> None:
        wait = BACKOFF_S[0]
        while not self.ended:
            attempt = self.patience.began(time.monotonic())
            try:
                await self._one_connection()
            except Exception as error:  # of any kind: the link goes on, and says why it is not connected
                self._note(error)
            finally:
                self.ended = self.once
                if self.welcome is not None:
                    wait = BACKOFF_S[0]
                else:
                    self.patience.failed(attempt)
                self._lose()
            if self.ended:
                return
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(wait * 2, BACKOFF_S[1])

    async def _one_connection(self) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        async with _Connect(
            self.url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=headers,
            proxy=None if is_local(self.url) else True,
            ssl=self._tls or (True if self.url.startswith("wss") else None),
            compression=None,  # token ids do not compress enough to pay for it
            max_size=MAX_FRAME,
            open_timeout=HANDSHAKE_S,
            ping_interval=10,
            ping_timeout=20,
            close_timeout=1,
        ) as socket:
            await socket.send(encode(Hello(VERSION, self.fingerprint, f"wisp/{__version__}", True)))
            async with asyncio.timeout(HANDSHAKE_S):
                welcome = welcome_from(decode_server_message(await socket.recv(decode=False)))
            self._out = asyncio.Queue()
            self._gain(welcome)
            writer = asyncio.create_task(self._write(socket))
            try:
                async for frame in socket:
                    self._dispatch(frame)
            finally:
                writer.cancel()

    async def _write(self, socket: ClientConnection) -> None:
        while True:
            await socket.send(await self._out.get())

    def _dispatch(self, frame: str | bytes) -> None:
        message = decode_server_message(frame if isinstance(frame, bytes) else b"\xc1")
        if isinstance(message, Verdict) and self.welcome is not None:
            check_verdict(message, self.welcome.n_vocab)
        if isinstance(message, Refused) and not message.session:
            said = plain(f"{message.message} ({message.code})")
            log.warning("the verifier refused a frame: %s", said)
        elif isinstance(message, Verdict | Refused | Redirect):
            listener = self._listeners.get(message.session)
            if listener is not None:
                listener(message)

    def _gain(self, welcome: Welcome) -> None:
        log.info("connected to %s: %s, %s %s", self.url, welcome.model, welcome.engine, welcome.mode)
        self.welcome, self.problem, self.fatal = welcome, "", None
        self._tell(welcome)

    def _lose(self) -> None:
        if self.welcome is not None:
            self.welcome = None
            self.reconnects += 1
            self.patience.lost(time.monotonic())
            level = logging.DEBUG if self._closing else logging.WARNING
            log.log(level, "connection to %s lost: %s", self.url, self.problem or "closed by the verifier")
        self._tell(LOST)

    def _tell(self, event: FromLink) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in list(self._listeners.values()):
            listener(event)

    def _note(self, error: Exception) -> None:
        """Remember the reason, and whether another attempt can help."""
        before = self.problem
        self.problem = reason(error, self.url)
        self.fatal = None
        if isinstance(error, InvalidStatus):
            response = error.response
            code = response.headers.get(REFUSAL_HEADER)
            said = plain((response.body or b"").decode("utf-8", "replace"))
            self.problem = said if code else stranger(response.status_code, response.headers.get("location"))
            if code == "invalid_api_key":
                message = f"the verifier refused our key: {said}; set WISP_API_KEY"
                self.fatal = RequestError(502, message, code="verifier_unauthorized", type="server_error")
        elif isinstance(error, ProtocolError) and error.code in ("version_mismatch", "vocabulary_mismatch"):
            self.fatal = RequestError(502, str(error), code=error.code, type="server_error")
        if self.fatal is not None:  # what says how to mend it
            self.problem = str(self.fatal)
        if self.problem != before:
            log.log(
                logging.ERROR if self.fatal else logging.WARNING,
                "no verifier at %s: %s",
                self.url,
                self.problem,
                exc_info=None if isinstance(error, EXPECTED) else error,
            )


class _Connect(connect):
    """Follows no HTTP redirects: a sign-in page's may lead anywhere, and the key is for the address given only."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def _too_long(size: int, most: int) -> RequestError:
    message = (
        f"Prompt and answer take {size} bytes on the way to the verifier, which takes {most}. "
        "Please shorten the prompt."
    )
    return RequestError(400, message, code="context_length_exceeded", param="messages")


class Redirects:
    """Links to the addresses that a router names: one each, for as long as sessions use it. `make` may raise
    ProtocolError."""

    def __init__(self, make: Callable[[str], VerifierLink]) -> None:
        self._make = make
        self._links: dict[str, VerifierLink] = {}

    def link(self, address: str) -> VerifierLink:
        """A link to `address`, started; the session has to listen before anything else happens."""
        self._links = {a: link for a, link in self._links.items() if not link.ended}
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = self._make(address)
            link.start()
        return link

    async def close(self) -> None:
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))


def _checked(key: str | None) -> str | None:
    """The key without white space around it. Raises ConfigError if it cannot stand in a header."""
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError("the API key in WISP_API_KEY has characters that no key has; set it again")
    return key or None
