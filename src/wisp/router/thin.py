"""Thin clients of a router, which is their edge.

An OpenAI client cannot be redirected (SDKs drop the key). So the router opens its session as an edge without a drafter
would. The session is placed by the same rules, moved in the same way when a replica dies, and cancelled when the client
leaves.
"""

from __future__ import annotations

import asyncio
import gzip
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import httpx

from wisp.api.backend import Committed, Generation, Target, check_sessions
from wisp.api.errors import refusal_error, shutting_down
from wisp.api.keys import on_behalf
from wisp.api.paths import REPLICAS_PATH
from wisp.core.draft.patience import BEAT_S, GIVE_UP_S, Patience
from wisp.core.draft.policies import Policies
from wisp.core.errors import ProtocolError, RequestError, UnavailableError, WispError
from wisp.core.protocol.messages import Cancel, Draft, Message, Open, Redirect, Refused, Verdict, Welcome
from wisp.core.verify.admission import Refusal
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import LOST, Listener, Redirects, VerifierLink, wait_for
from wisp.engines.base import Tokenizer
from wisp.engines.build import read_tokenizer
from wisp.engines.null import ByteTokenizer
from wisp.router.host import RouterHost


class LocalLink:
    """`edge.backend.Link` to the router in this process, for one key. Redirected sessions use real sockets."""

    def __init__(self, host: RouterHost, key: str, tls: ssl.SSLContext | None) -> None:
        self.reconnects = 0
        self.patience = Patience(GIVE_UP_S, time.monotonic())
        self.problem = ""
        self.fatal: RequestError | None = None
        self.redirects = Redirects(self._replica)
        self._host = host
        self._key = key
        self._tls = tls
        self._listeners: dict[str, Listener] = {}
        self._connection = host.attach(key, self._heard)
        self._open = host.here
        self._changed = asyncio.Event()
        self._attempt = 0
        self._beat()

    @property
    def welcome(self) -> Welcome | None:
        """While there is a replica."""
        return self._host.fleet.welcome if self._host.here else None

    async def connected(self) -> Welcome:
        """Wait for a replica. Raises UnavailableError."""
        while (welcome := self.welcome) is None:
            if self._host.draining:
                raise shutting_down()
            await wait_for(self._changed, self.patience, self.gave_up)
        return welcome

    def gave_up(self) -> UnavailableError:
        """The error of a session that has waited long enough."""
        return UnavailableError(f"no replica is up since {GIVE_UP_S:g} s; see {REPLICAS_PATH} and the log")

    def listen(self, session: str, listener: Listener) -> None:
        """Pass messages for `session`, and the first replica's coming and the last one's going, to `listener`."""
        self._listeners[session] = listener

    def unlisten(self, session: str) -> None:
        self._listeners.pop(session, None)

    def send(self, message: Message) -> None:
        if isinstance(message, Open | Draft | Cancel) and self.welcome is not None:
            self._host.receive(self._connection, message)

    def changed(self) -> None:
        welcome = self.welcome
        if self._open == (welcome is not None):
            return
        self._open = welcome is not None
        if welcome is None:
            self.patience.lost(time.monotonic())
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in list(self._listeners.values()):
            listener(welcome or LOST)

    def close(self) -> None:
        self._beats.cancel()

    def _beat(self) -> None:
        """Between two beats the router has looked at its replicas several times: that counts as an attempt."""
        self.patience.failed(self._attempt)
        self._attempt = self.patience.began(time.monotonic())
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _heard(self, message: Verdict | Refused | Redirect) -> None:
        listener = self._listeners.get(message.session)
        if listener is not None:
            listener(message)

    def _replica(self, address: str) -> VerifierLink:
        replica = self._host.fleet.at(address)
        if replica is None or replica.running is None:
            raise ProtocolError("malformed", f"the replica at {address} has just gone")
        return VerifierLink(
            replica.running.url, on_behalf(replica.token, self._key), once=True, tls=self._tls
        )


class RouterBackend:
    """`api.backend.Backend` on the replicas, with an edge without a drafter for each key."""

    def __init__(self, host: RouterHost, tls: ssl.SSLContext | None) -> None:
        self._host = host
        self._tls = tls
        self._links: dict[str, LocalLink] = {}
        self._edges: dict[str, EdgeBackend] = {}
        self._policies = Policies("fixed:1")  # made, never asked
        self.tokenizers = RouterTokenizers(host)

    @property
    def context(self) -> int:
        """Tokens of the replicas' context; 0 while none is up."""
        return self._edge("").context

    async def target(self) -> Target:
        if self._host.draining:
            raise shutting_down()
        return await self._edge("").target()

    def admit(self, key: str) -> None:
        try:
            self._host.admit(key)
        except Refusal as refusal:
            raise refusal_error(refusal) from None

    @contextmanager
    def together(self, generations: Sequence[Generation]) -> Iterator[list[Generation]]:
        """Around all work on one request: see `api.backend.together`."""
        check_sessions(generations, self._host.admission.limits.get(generations[0].key))
        yield list(generations)

    def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        return self._edge(generation.key).generate(generation)

    def changed(self) -> None:
        for link in self._links.values():
            link.changed()

    async def close(self) -> None:
        for link in self._links.values():
            link.close()
        await asyncio.gather(*(link.redirects.close() for link in self._links.values()))
        for edge in self._edges.values():
            edge.close()

    def _edge(self, key: str) -> EdgeBackend:
        if key not in self._edges:
            link = self._links[key] = LocalLink(self._host, key, self._tls)
            self._edges[key] = EdgeBackend(link, self.tokenizers, None, self._policies)
        return self._edges[key]


class RouterTokenizers:
    """The target's tokenizer, from the first replica that is up: loaded for the router, and as a blob for edges."""

    def __init__(self, host: RouterHost) -> None:
        self._host = host
        self._blobs: dict[str, bytes] = {}
        self._loaded: dict[str, Tokenizer] = {}
        self._lock = asyncio.Lock()

    async def blob(self, fingerprint: str) -> bytes:
        """Gzipped. Raises UnavailableError."""
        async with self._lock:
            if fingerprint not in self._blobs:
                try:
                    self._blobs[fingerprint] = await self._host.fleet.tokenizer(fingerprint)
                except httpx.HTTPError as error:
                    message = f"no replica gave the tokenizer ({error}); try again"
                    raise UnavailableError(message, retry_after=1.0) from None
            return self._blobs[fingerprint]

    async def get(self, fingerprint: str) -> Tokenizer:
        """Raises UnavailableError, and RequestError where a replica gave what is no tokenizer."""
        if fingerprint not in self._loaded:
            blob = await self.blob(fingerprint)
            try:
                self._loaded[fingerprint] = await asyncio.to_thread(_unpacked, blob)
            except (OSError, EOFError, zlib.error, WispError) as error:
                self._blobs.pop(fingerprint, None)  # the next replica may have a better one
                message = f"the tokenizer that a replica gave is of no use: {error}"
                raise RequestError(502, message, code="tokenizer_unavailable", type="server_error") from None
        return self._loaded[fingerprint]


def _unpacked(blob: bytes) -> Tokenizer:
    """Raises OSError, EOFError or zlib.error for what is not whole, WispError for what is no tokenizer."""
    return _load(gzip.decompress(blob))


def _load(data: bytes) -> Tokenizer:
    # Only the null engine may have nothing to say of its tokenizer
    return read_tokenizer(data) if data else ByteTokenizer()
