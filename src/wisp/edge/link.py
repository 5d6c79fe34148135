"""The edge's connection to its verifier: one WebSocket, many sessions, kept up for as long as the process lives.

When it breaks, every session is told, and told again when it is back; what to do about it is theirs
(`core.drafter`). Reconnecting backs off exponentially, with jitter, so that a restarted verifier is not
stormed by a fleet.

Where the server is a front, it redirects sessions to other addresses. Each of these gets one more link, which
many sessions share; it is tried once, and when it ends its sessions go back to the front (`edge.backend`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from wisp import __version__
from wisp.core.errors import ConfigError, ProtocolError, RequestError, UnavailableError
from wisp.core.messages import (
    MAX_FRAME,
    SUBPROTOCOL,
    VERSION,
    Hello,
    Message,
    Redirect,
    Refused,
    Verdict,
    Welcome,
    check_welcome,
    decode_from_cloud,
    encode,
)

log = logging.getLogger("wisp.link")

SESSION_PATH = "/v1/sessions"
BACKOFF_S = (0.05, 5.0)  # first and longest wait between attempts
HANDSHAKE_S = 10.0
IDLE_S = 30.0  # a link to a redirected address is kept this long after its last session
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*):[0-9]{1,5}")


class Lost:
    """Told to sessions when the connection breaks."""


LOST = Lost()
FromLink = Welcome | Verdict | Refused | Redirect | Lost
Listener = Callable[[FromLink], None]


class VerifierLink:
    """Keeps one connection to `server`. Sessions register a listener and `send`."""

    def __init__(
        self,
        server: str,
        api_key: str | None = None,
        *,
        fingerprint: str = "",
        give_up_s: float = 30.0,
        once: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`fingerprint`: of the draft model's vocabulary, "" if there is none. Raises ConfigError for a bad URL.

        once: try to connect a single time, and end with the connection.
        """
        self.url = _websocket_url(server)
        self.api_key = _checked(api_key)
        self.fingerprint = fingerprint
        self.give_up_s = give_up_s
        self.welcome: Welcome | None = None  # while connected
        self.lost_at = time.monotonic()  # when it was last lost, or first tried
        self.problem: str = ""  # why it is not connected
        self.fatal: RequestError | None = None  # trying again will not help
        self.reconnects = 0
        self.once = once
        self.ended = False  # a link of one attempt has had it
        self.redirects = Redirects(self._redirected)
        self._tls = tls
        self._closing = False
        self._changed = asyncio.Event()
        self._listeners: dict[str, Listener] = {}
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect, on the running event loop."""
        self._task = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Close the connection, and those to redirected addresses, and stop trying."""
        self._closing = True
        await self.redirects.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def connected(self) -> Welcome:
        """Wait for a verifier. Raises UnavailableError after `give_up_s` without one, or what is fatal."""
        while self.welcome is None:
            if self.fatal is not None:
                raise self.fatal
            remaining = self.lost_at + self.give_up_s - time.monotonic()
            if remaining <= 0:
                raise self.gave_up()
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), remaining)
            except TimeoutError:
                continue
        return self.welcome

    def gave_up(self) -> UnavailableError:
        """The error for those who have waited long enough."""
        return UnavailableError(
            f"no verifier at {self.url} for {self.give_up_s:g} s ({self.problem or 'no answer'}); "
            "is `wisp serve` running there?"
        )

    def listen(self, session: str, listener: Listener) -> None:
        """Messages for `session`, and every loss and return of the connection, go to `listener`."""
        self._listeners[session] = listener

    def unlisten(self, session: str) -> None:
        """The session is over, or elsewhere."""
        self._listeners.pop(session, None)
        if self.once and not self._listeners and self._task is not None and not self.ended:
            asyncio.get_running_loop().call_later(IDLE_S, self._end_if_idle)

    def send(self, message: Message) -> None:
        """Send, if connected; otherwise drop it: sessions open again when the connection is back."""
        if self.welcome is not None:
            self._out.put_nowait(encode(message))

    def _end_if_idle(self) -> None:
        if not self._listeners and self._task is not None:
            self._closing = True
            self._task.cancel()

    def _redirected(self, address: str) -> VerifierLink:
        url = redirected_url(self.url, address)
        return VerifierLink(url, self.api_key, fingerprint=self.fingerprint, once=True)

    # --- the connection

    async def _keep_connected(self) -> None:
        wait = BACKOFF_S[0]
        while not self.ended:
            try:
                welcomed = await self._one_connection()
                wait = BACKOFF_S[0] if welcomed else wait
            except (OSError, TimeoutError, WebSocketException, ProtocolError) as error:
                self._note(error)
                if self.welcome is not None:
                    wait = BACKOFF_S[0]
            finally:
                self.ended = self.once
                self._lose()
            if self.ended:
                return
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(wait * 2, BACKOFF_S[1])

    async def _one_connection(self) -> bool:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        async with connect(
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
            first = decode_from_cloud(await asyncio.wait_for(socket.recv(decode=False), HANDSHAKE_S))
            if not isinstance(first, Welcome):
                raise ProtocolError(
                    getattr(first, "code", "malformed"), getattr(first, "message", "no welcome")
                )
            check_welcome(first)
            self._out = asyncio.Queue()
            self._gain(first)
            writer = asyncio.create_task(self._write(socket))
            try:
                async for frame in socket:
                    self._dispatch(frame)
            finally:
                writer.cancel()
            return True

    async def _write(self, socket: ClientConnection) -> None:
        while True:
            await socket.send(await self._out.get())

    def _dispatch(self, frame: str | bytes) -> None:
        message = decode_from_cloud(frame if isinstance(frame, bytes) else b"\xc1")
        if isinstance(message, Refused) and not message.session:
            log.warning("the verifier refused a frame: %s (%s)", message.message, message.code)
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
            self.lost_at = time.monotonic()
            level = logging.DEBUG if self._closing else logging.WARNING
            log.log(level, "connection to %s lost: %s", self.url, self.problem or "closed by the verifier")
        self._tell(LOST)

    def _tell(self, event: FromLink) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in list(self._listeners.values()):
            listener(event)

    def _note(self, error: Exception) -> None:
        """Remember why, and whether trying again can help."""
        before = self.problem
        self.problem = str(error) or type(error).__name__
        self.fatal = None
        if isinstance(error, InvalidStatus) and error.response.status_code in (401, 403):
            self.problem = (error.response.body or b"").decode("utf-8", "replace") or "the key was refused"
            message = f"the verifier refused our key: {self.problem}; set WISP_API_KEY"
            self.fatal = RequestError(502, message, code="verifier_unauthorized", type="server_error")
        elif isinstance(error, ProtocolError) and error.code in ("version_mismatch", "vocabulary_mismatch"):
            self.fatal = RequestError(502, str(error), code=error.code, type="server_error")
        if self.problem != before:
            log.log(
                logging.ERROR if self.fatal else logging.WARNING,
                "no verifier at %s: %s",
                self.url,
                self.problem,
            )


class Redirects:
    """Links to the addresses that a front names: one each, for as long as sessions use it. `make` may raise
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
        """End all of them."""
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))


def redirected_url(url: str, address: str) -> str:
    """The session socket at another host and port, by the same scheme. Raises ProtocolError if `address` is none."""
    if not _ADDRESS.fullmatch(address):
        raise ProtocolError("malformed", f"the front redirected to {address!r}, which is not HOST:PORT")
    parts = urlsplit(url)
    host = parts.hostname or ""
    own = f"[{host}]" if ":" in host else host
    netloc = own + address if address[0] == ":" else address
    return urlunsplit((parts.scheme, netloc, SESSION_PATH, "", ""))


def _checked(key: str | None) -> str | None:
    """The key without white space around it. Raises ConfigError if it cannot stand in a header."""
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError("the API key in WISP_API_KEY has characters that no key has; set it again")
    return key or None


def is_local(url: str) -> bool:
    """A proxy from the environment has no business with a verifier on this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _websocket_url(server: str) -> str:
    parts = urlsplit(server if "://" in server else f"http://{server}")
    schemes = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
    if parts.scheme not in schemes or not parts.hostname:
        raise ConfigError(f"server {server!r} is not an address such as http://127.0.0.1:8100")
    path = parts.path.rstrip("/").removesuffix(SESSION_PATH).removesuffix("/v1") + SESSION_PATH
    return urlunsplit((schemes[parts.scheme], parts.netloc, path, "", ""))


def http_url(server: str, path: str) -> str:
    """The HTTP address of `path` on the same server."""
    parts = urlsplit(_websocket_url(server))
    scheme = "https" if parts.scheme == "wss" else "http"
    return urlunsplit((scheme, parts.netloc, parts.path.removesuffix(SESSION_PATH) + path, "", ""))
