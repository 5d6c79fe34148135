"""The protocol `wisp.v1` between edge and server (a verifier or a router).

Messages are a tagged union of msgspec structs, packed as msgpack arrays, one per WebSocket frame. Only token ids cross
the wire: no text, and no probabilities of drafts. New fields are added at the end, with defaults; a peer of the same
version skips fields that it does not know.

    edge   -> server   Hello, then Open, Draft, Cancel
    server -> edge     Welcome, then Verdict, Refused, Redirect

`base` counts generated tokens of the session: 0 is the first token after the prompt. `round` grows by one per draft and
is the idempotency key. Every Open and every Draft is answered by one Verdict or one Refused, unless a later round has
replaced it. In server mode, Verdicts also come unasked. A router answers each Open with a Redirect or a Refused, and
sends nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Annotated

import msgspec

from wisp.core.errors import ProtocolError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import TokenLogprob

VERSION = 1
SUBPROTOCOL = "wisp.v1"
REFUSAL_HEADER = "x-wisp-error"  # in an HTTP refusal by a WISP server (and not by a proxy): the error code
DIGESTS_SINCE = "0.2.0"  # the first release whose peers send digests
# Bytes of the longest frame that an edge takes: enough for a million tokens, too little to exhaust its memory.
MAX_FRAME = 4 << 20
# Tokens in one draft, at most, where a verifier does not say otherwise. With 64, goodput in simulated overload was 5 %
# less, and hardly anything else changed.
MAX_DRAFT = 32
MAX_BRANCHES = 4  # in one draft, at most; simulated edges sent 1.1 on average
TOKEN_BYTES = 5  # of the longest token id
MOST_IDS = 1 << 31  # of a vocabulary or a context: no peer has more
FRAME_EXTRA = 1 << 18  # bytes of an Open besides prompt and committed tokens, amply
SAID = 300  # characters of a peer's words that an error repeats

# Names chosen by edges are kept in memory, so they are short: printable ASCII without blanks.
SessionId = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{8,64}\Z")]
Salt = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,64}\Z")]
Address = Annotated[str, msgspec.Meta(max_length=264)]  # HOST:PORT
Trace = Annotated[str, msgspec.Meta(max_length=55)]  # a `traceparent`


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages."""


# --- edge to server


class Hello(Message, frozen=True, tag="hello"):
    """First frame. `fingerprint` is that of the edge's vocabulary, "" if it has none yet.

    `redirects`: the edge follows a Redirect. A router refuses edges that do not.
    """

    version: int
    fingerprint: str = ""
    client: str = ""
    redirects: bool = False


class Device(msgspec.Struct, frozen=True, array_like=True):
    """What an edge has measured before this session, for operators; 0: unknown. Nothing is decided by it.

    draft_ms: one draft step. line_ms: the way to the verifier and back
    """

    draft_ms: float = 0.0
    line_ms: float = 0.0


class Open(Message, frozen=True, tag="open"):
    """Start a session, or resume it on a new connection or another verifier (then `epoch` is larger).

    round, draft: the first draft, which may be empty
    committed:    generated tokens that the edge already has
    serve:        server mode: after the answer, decode without drafts until the next one comes
    logprobs:     None, or how many alternatives to report per token
    max_tokens:   counts from the start of the session, `committed` included
    avoid:        the address of a Redirect that the edge could not follow
    salt:         one for each customer of the edge; prefixes are shared only within one API key and salt
    digest:       that of the Welcome with which the session began; no other model may continue it
    device:       what the edge knows of itself; None: nothing yet
    trace:        the `traceparent` of the request (W3C Trace Context); "": none. Nothing is decided by it
    """

    session: SessionId
    epoch: int
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    round: int = 0
    committed: list[int] = []
    draft: list[int] = []
    serve: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    slo: Slo | None = None
    avoid: Address = ""
    salt: Salt = ""
    digest: str = ""
    device: Device | None = None
    trace: Trace = ""


class Branch(msgspec.Struct, frozen=True, array_like=True):
    """A guess at another outcome of a draft: its first `accepted` tokens are right, then comes `token`, and then
    `tokens`."""

    accepted: int
    token: int
    tokens: list[int]


class Draft(Message, frozen=True, tag="draft"):
    """`tokens` are a guess at what follows the first `base` generated tokens; drafts in flight are repeated in it.

    branches: for other outcomes of the draft before it; at most `Welcome.max_branches`
    """

    session: SessionId
    round: int
    base: int
    tokens: list[int]
    serve: bool = False
    branches: list[Branch] = []


class Cancel(Message, frozen=True, tag="cancel"):
    """End the session."""

    session: SessionId


# --- server to edge


class Welcome(Message, frozen=True, tag="welcome"):
    """Second frame. The verifier's model and limits.

    `digest` covers everything that its text depends on: weights, engine, build, mode. Equal digests give equal texts.
    """

    version: int
    model: str
    fingerprint: str
    n_vocab: int
    eos: list[int]
    context: int  # most tokens of prompt + output
    max_draft: int
    engine: str = ""
    mode: str = ""
    park_s: float = 0.0  # how long a session outlives its connection
    digest: str = ""
    max_frame: int = MAX_FRAME  # bytes of the longest frame that the verifier takes
    max_branches: int = 0  # most branches of one draft; 0: the verifier knows none


class Verdict(Message, frozen=True, tag="verdict"):
    """The committed tokens from `base` on. The first `accepted` of them agreed with the draft of `round`.

    finish:   "" (goes on), "stop" (end of sequence) or "length"
    logprobs: one entry per token if asked for
    queue_ms, engine_ms: time in the queue and in the engine
    price:    congestion price: what one more draft token costs others, in tokens of this session (near 0 at low load)
    cached:   tokens of the prompt that were not read for this session, as their KV was there
    """

    session: str
    round: int
    base: int
    accepted: int
    tokens: list[int]
    finish: str = ""
    logprobs: list[TokenLogprob] = []
    queue_ms: float = 0.0
    engine_ms: float = 0.0
    price: float = 0.0
    cached: int = 0


class Refused(Message, frozen=True, tag="refused"):
    """A message is refused, and the session is unchanged (`fatal`: the session is over).

    session:     "" if the connection as a whole is refused
    retry_after: seconds; 0: do not retry
    round:       of the refused Open or Draft; -1: unknown
    """

    session: str
    code: str
    message: str
    retry_after: float = 0.0
    fatal: bool = False
    round: int = -1


class Redirect(Message, frozen=True, tag="redirect"):
    """Send the same Open, and all that follows in this session, to the verifier at `address`.

    `address` is "HOST:PORT", or ":PORT" on the host that sent this. Scheme and API key stay the same, so a connection
    with TLS never becomes one without. If that verifier is lost or shuts down, open the session here again.
    """

    session: str
    address: str


EdgeMessage = Hello | Open | Draft | Cancel
ServerMessage = Welcome | Verdict | Refused | Redirect

MODEL_CHANGED = (
    "the verifier's model is not the one that this answer was begun with (other weights, engine, build or settings); "
    "ask again"
)

_encoder = msgspec.msgpack.Encoder()
_edge_decoder: msgspec.msgpack.Decoder[EdgeMessage] = msgspec.msgpack.Decoder(EdgeMessage)
_server_decoder: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode_edge_message(frame: bytes) -> EdgeMessage:
    """The message in a frame from an edge. Raises ProtocolError("malformed")."""
    try:
        return _edge_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(
            "malformed", f"not a {SUBPROTOCOL} message from an edge: {_said(error)}"
        ) from None


def decode_server_message(frame: bytes) -> ServerMessage:
    """The message in a frame from a verifier. Raises ProtocolError("malformed")."""
    try:
        return _server_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"not a {SUBPROTOCOL} message from a verifier: {_said(error)}"
        raise ProtocolError("malformed", message) from None


def _said(error: Exception) -> str:
    """What a decoder says. It repeats the peer's words, and goes into logs: so in part, and as one printable line."""
    text = str(error)
    text = text if len(text) <= SAID else f"{text[:SAID]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def frame_limit(context: int) -> int:
    """Bytes of the longest frame that a verifier takes: an Open that fills its context of `context` tokens."""
    return FRAME_EXTRA + TOKEN_BYTES * context


def check_hello(hello: Hello, fingerprint: str, model: str) -> None:
    """Check version and vocabulary. Raises ProtocolError."""
    if hello.version != VERSION:
        message = f"this verifier speaks version {VERSION} of the protocol, the edge {hello.version}"
        raise ProtocolError("version_mismatch", f"{message}; install the same release on both")
    if hello.fingerprint and hello.fingerprint != fingerprint:
        raise ProtocolError(
            "vocabulary_mismatch",
            f"the edge's vocabulary {hello.fingerprint[:12]} is not that of {model} ({fingerprint[:12]}); "
            "draft with a model of the same family, or with ngram or none",
        )


def welcome_from(first: ServerMessage) -> Welcome:
    """The welcome, checked, that a verifier's first message has to be. Raises ProtocolError, with a refusal's code."""
    if not isinstance(first, Welcome):
        raise ProtocolError(getattr(first, "code", "malformed"), getattr(first, "message", "no welcome"))
    check_welcome(first)
    return first


def check_welcome(welcome: Welcome) -> None:
    """Check that the verifier sent a digest, and limits that can be. Raises ProtocolError."""
    if not welcome.digest:
        message = (
            f"the verifier of {welcome.model} does not say which weights it runs, so no answer can be resumed"
        )
        raise ProtocolError("version_mismatch", f"{message}; install WISP {DIGESTS_SINCE} or later there")
    w = welcome
    fits = (
        1 <= w.n_vocab <= MOST_IDS
        and 0 <= w.max_branches <= MOST_IDS
        and all(0 <= end < w.n_vocab for end in w.eos)
    )
    counts = 1 <= w.context <= MOST_IDS and 0 <= w.max_draft <= MOST_IDS and w.max_frame >= 1
    if not (fits and counts and 0.0 <= w.park_s < math.inf and w.model.isprintable()):
        raise ProtocolError("malformed", "the verifier's welcome has limits that no verifier has")


def check_verdict(verdict: Verdict, n_vocab: int) -> None:
    """Check what an edge computes with, for a vocabulary of `n_vocab` ids. Raises ProtocolError("malformed")."""
    v = verdict
    counts = v.base >= 0 and 0 <= v.accepted <= len(v.tokens) and v.cached >= 0
    times = 0.0 <= v.queue_ms < math.inf and 0.0 <= v.engine_ms < math.inf and 0.0 <= v.price < math.inf
    if not (counts and times and (not v.tokens or 0 <= min(v.tokens) <= max(v.tokens) < n_vocab)):
        message = (
            "the verifier sent a verdict with ids outside its vocabulary, or counts or times that cannot be"
        )
        raise ProtocolError("malformed", message)


def check_digest(open_: Open, digest: str) -> None:
    """Check that a verifier with this digest may continue the session. Raises ProtocolError("model_changed")."""
    if open_.digest == digest or not (open_.digest or open_.committed):
        return
    if not open_.digest:
        message = "this edge does not say which model wrote what is committed, so nothing may be added to it"
        raise ProtocolError("model_changed", f"{message}; install WISP {DIGESTS_SINCE} or later there")
    raise ProtocolError("model_changed", MODEL_CHANGED)


def vocabulary_fingerprint(pieces: Iterable[tuple[int, bytes]]) -> str:
    """Hash of (id, bytes) of all tokens, ascending by id. The caller leaves padding entries out."""
    digest = hashlib.sha256()
    for token, data in pieces:
        digest.update(token.to_bytes(4, "little"))
        digest.update(len(data).to_bytes(4, "little"))
        digest.update(data)
    return digest.hexdigest()
