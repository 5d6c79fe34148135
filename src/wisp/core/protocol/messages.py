"""The protocol `wisp.v1`: what edge and cloud say to each other.

A tagged union of msgspec structs, packed as msgpack arrays, one message a WebSocket frame. Only token ids
cross the wire: no text, no probabilities of drafts. Fields are only ever added at the end, with defaults,
so that a peer of the same version skips what it does not know.

    edge  -> cloud   Hello, then Open, Draft, Cancel
    cloud -> edge    Welcome, then Verdict, Refused, Redirect

`base` counts generated tokens of the session: 0 is the first token after the prompt. `round` grows by one
per draft and is the idempotency key. Every Open and every Draft is answered by one Verdict or one Refused,
unless a later round replaced it first; in server mode more Verdicts come unasked. A front, which has several
verifiers behind it, answers each Open with a Redirect or a Refused and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated

import msgspec

from wisp.core.errors import ProtocolError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.protocol.step import TokenLogprob

VERSION = 1
SUBPROTOCOL = "wisp.v1"
REFUSAL_HEADER = "x-wisp-error"  # of an HTTP refusal: this is a WISP server's own, by this code
DIGESTS_SINCE = "0.2.0"  # the first release whose peers say which model a text is of
MAX_FRAME = (
    4 << 20
)  # bytes that an edge takes; a prompt of a million tokens fits, an attack on memory does not
TOKEN_BYTES = 5  # of a token id at most
FRAME_EXTRA = 1 << 18  # bytes for all of an Open that is not prompt or committed tokens, with much to spare

# What edges make up is short, since it is remembered: printable ASCII without blanks.
SessionId = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{8,64}\Z")]
Salt = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,64}\Z")]
Address = Annotated[str, msgspec.Meta(max_length=264)]  # HOST:PORT, as it was given


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages."""


# --- edge to cloud


class Hello(Message, frozen=True, tag="hello"):
    """First frame. `fingerprint` is the vocabulary that the edge will use, "" if it has none yet.

    `redirects`: the edge knows what to do with a Redirect. A front refuses those that do not.
    """

    version: int
    fingerprint: str = ""
    client: str = ""
    redirects: bool = False


class Open(Message, frozen=True, tag="open"):
    """Start a session, or resume it on a new connection or another verifier (then `epoch` is larger).

    The first draft rides along as `round`; `draft` may be empty. `committed` are generated tokens that the
    edge already has. `serve`: after answering, go on decoding without drafts until the next one comes.
    `logprobs`: None, or how many alternatives to report per token. `max_tokens` counts from the start of
    the session, `committed` included. `avoid` is the address of a Redirect that the edge could not follow.
    `salt` stands for whom the edge serves: of one API key's sessions, only those of one salt share prefixes.
    `digest` is that of the Welcome for whose model the session began: no other may go on with what is committed.
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


class Draft(Message, frozen=True, tag="draft"):
    """`tokens` guess what follows the first `base` generated tokens; in-flight guesses are restated."""

    session: SessionId
    round: int
    base: int
    tokens: list[int]
    serve: bool = False


class Cancel(Message, frozen=True, tag="cancel"):
    """The edge wants no more of this session."""

    session: SessionId


# --- cloud to edge


class Welcome(Message, frozen=True, tag="welcome"):
    """Second frame. What the verifier is, and what it will take.

    `digest` stands for all that decides its text: weights, engine, build, mode. Equal digests write equal texts.
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
    max_frame: int = MAX_FRAME  # bytes of the longest frame that it takes


class Verdict(Message, frozen=True, tag="verdict"):
    """All that is committed from `base` on: the first `accepted` of `tokens` agreed with the draft of `round`.

    `finish`: "" (goes on), "stop" (end of sequence) or "length". `logprobs` has one entry per token where
    they were asked for. Times are milliseconds: in the queue, and in the engine. `price` is what one more
    draft token costs others, in committed tokens (0 while the server keeps up).
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


class Refused(Message, frozen=True, tag="refused"):
    """What was asked will not be done, and the session is as it was (unless `fatal`: then it is over).

    `session` is "" when the connection as a whole is refused. `retry_after` is seconds, 0 for "do not". `round` is
    that of the last Open or Draft which is meant; -1: the sender does not say.
    """

    session: str
    code: str
    message: str
    retry_after: float = 0.0
    fatal: bool = False
    round: int = -1


class Redirect(Message, frozen=True, tag="redirect"):
    """Say the same Open to the verifier at `address`, and whatever follows in this session, too.

    `address` is "HOST:PORT", or ":PORT" on the host that sent this. Scheme and key stay as they were, so that
    nobody is redirected from TLS to plain text. When that verifier is lost or shuts down, open here again.
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
    """One frame."""
    return _encoder.encode(message)


def decode_edge_message(frame: bytes) -> EdgeMessage:
    """The message in a frame from an edge. Raises ProtocolError("malformed")."""
    try:
        return _edge_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("malformed", f"not a {SUBPROTOCOL} message from an edge: {error}") from None


def decode_server_message(frame: bytes) -> ServerMessage:
    """The message in a frame from a verifier. Raises ProtocolError("malformed")."""
    try:
        return _server_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("malformed", f"not a {SUBPROTOCOL} message from a verifier: {error}") from None


def frame_limit(context: int) -> int:
    """Bytes that a verifier takes in a frame: an Open that fills its context of so many tokens, and no more."""
    return FRAME_EXTRA + TOKEN_BYTES * context


def check_hello(hello: Hello, fingerprint: str, model: str) -> None:
    """Do both sides speak the same language? Raises ProtocolError."""
    if hello.version != VERSION:
        message = f"this verifier speaks version {VERSION} of the protocol, the edge {hello.version}"
        raise ProtocolError("version_mismatch", f"{message}; install the same release on both")
    if hello.fingerprint and hello.fingerprint != fingerprint:
        raise ProtocolError(
            "vocabulary_mismatch",
            f"the edge's vocabulary {hello.fingerprint[:12]} is not that of {model} ({fingerprint[:12]}); "
            "draft with a model of the same family, or with ngram or none",
        )


def check_welcome(welcome: Welcome) -> None:
    """Does the verifier say which model it runs? Raises ProtocolError."""
    if not welcome.digest:
        message = (
            f"the verifier of {welcome.model} does not say which weights it runs, so no answer can be resumed"
        )
        raise ProtocolError("version_mismatch", f"{message}; install WISP {DIGESTS_SINCE} or later there")


def check_digest(open_: Open, digest: str) -> None:
    """May a verifier with this digest go on with the session? Raises ProtocolError("model_changed")."""
    if open_.digest == digest or not (open_.digest or open_.committed):
        return
    if not open_.digest:
        message = "this edge does not say which model wrote what is committed, so nothing may be added to it"
        raise ProtocolError("model_changed", f"{message}; install WISP {DIGESTS_SINCE} or later there")
    raise ProtocolError("model_changed", MODEL_CHANGED)


def vocabulary_fingerprint(pieces: Iterable[tuple[int, bytes]]) -> str:
    """Hash of id -> bytes over real tokens, ascending by id; padding entries are the caller's to leave out."""
    digest = hashlib.sha256()
    for token, data in pieces:
        digest.update(token.to_bytes(4, "little"))
        digest.update(len(data).to_bytes(4, "little"))
        digest.update(data)
    return digest.hexdigest()
