"""The session protocol: frames, what an edge makes of a verifier's, and addresses in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from fuzz.base import FuzzTarget, Reader, must, sane
from messages import OPEN
from wisp.core.draft.drafter import Drafter
from wisp.core.draft.policies import Fixed
from wisp.core.draft.signals import Signal
from wisp.core.draft.task import Action, Reopen, Task
from wisp.core.errors import ConfigError, ProtocolError, RequestError
from wisp.core.protocol.messages import (
    Branch,
    Cancel,
    Draft,
    Hello,
    Message,
    Open,
    Redirect,
    Refused,
    Verdict,
    Welcome,
    check_verdict,
    check_welcome,
    decode_edge_message,
    decode_server_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Committed, TokenLogprob, TopLogprob
from wisp.edge.address import redirected_url, session_url

EDGE_MESSAGES: tuple[Message, ...] = (
    Hello(1, "ab", "wisp/1", True),
    Open("session1", 1, [5, 6, 7], Sampling(seed=7), 40),
    OPEN,
    Open("session3", 2, [1] * 30, Sampling(), 9, 1, [2] * 5, [3] * 4, True),
    Draft("session1", 7, 2, [3, 4], True),
    Draft("session2", 1, 0, [9] * 12, branches=[Branch(2, 5, [7, 8]), Branch(12, 1, [])]),
    Cancel("session1"),
)  # fmt: skip
WELCOME = Welcome(1, "m", "f" * 64, 300, [256], 512, 8, "llama.cpp", "exact", 60.0, "d", 1 << 20)
SERVER_MESSAGES: tuple[Message, ...] = (
    WELCOME,
    Verdict("session1", 1, 2, 1, [3, 4], "stop", [TokenLogprob(3, -0.5, [TopLogprob(1, -0.25)])], 0.5, 1.0, 0.1, 3),
    Verdict("session1", 0, 0, 0, [65]),
    Refused("session1", "overloaded", "later", 1.0, True, 7),
    Refused("", "malformed", "what"),
    Redirect("session1", "10.0.0.1:8101"),
)  # fmt: skip


def plain(message: Message) -> Any:
    return msgspec.msgpack.decode(encode(message))


def frames(_: Path) -> Reader:
    readers = (decode_edge_message, decode_server_message)

    def read(data: bytes) -> None:
        for decode in readers:
            try:
                message = decode(data)
            except ProtocolError as error:
                sane(error)
                continue
            again = encode(message)
            must(encode(decode(again)) == again, "a message does not survive the wire")

    return read


MAX_TOKENS = 40


def verdicts(_: Path) -> Reader:
    """The drafter of a session hears what a frame says, in all phases."""

    def read(data: bytes) -> None:
        first = decode_server_message(data)
        if isinstance(first, Welcome):
            check_welcome(first)
        if isinstance(first, Verdict):
            check_verdict(first, 300)
        if not isinstance(first, Verdict | Refused):
            return
        for heard_before in (0, 1):
            drafter = Drafter(
                "session1", Task([1, 2, 3], Sampling(seed=1), MAX_TOKENS), Fixed(4), frozenset({256})
            )
            actions: list[Action] = drafter.connected(0.0, 8, "d")
            if heard_before:
                actions = drafter.verdict(1.0, Verdict("session1", 0, 0, 0, [65, 66]))
                while drafter.wants_token(1.0):
                    actions += drafter.proposed(1.0, 67, Signal(0.9, 0.1, 0.5))
            for _ in range(2):
                heard = drafter.refused(first) if isinstance(first, Refused) else drafter.verdict(2.0, first)
                check_actions(drafter, heard)
                if drafter.wants_token(2.0):
                    check_actions(drafter, drafter.proposed(2.0, 68, Signal(0.9, 0.1, 0.5)))

    return read


def check_actions(drafter: Drafter, actions: Sequence[Action]) -> None:
    must(len(drafter.committed) <= MAX_TOKENS, "a verifier wrote more than was asked for")
    for action in actions:
        if isinstance(action, Reopen):
            must(0.0 <= action.after_s <= 3600.0, f"an edge waits for {action.after_s} s")
        elif isinstance(action, Committed):
            must(0 <= action.accepted <= action.drafted, f"{action.accepted} of {action.drafted} accepted")


def addresses(_: Path) -> Reader:
    """Of a server as an operator gives it, and of a replica as a router names it."""

    def read(data: bytes) -> None:
        said = data.decode("utf-8", "replace")
        try:
            url = session_url(said)
            must(url.isprintable() and "@" not in urlsplit(url).netloc, f"{url!r} is no address")
        except ConfigError:
            pass
        url = redirected_url("wss://host:8100/v1/sessions", said)
        must(url.isprintable() and "@" not in urlsplit(url).netloc, f"{url!r} is no address")
        must(url.startswith("wss:"), "a redirect leads from TLS to plain text")

    return read


WIRE = (
    FuzzTarget(
        "frames",
        lambda: list(map(plain, EDGE_MESSAGES + SERVER_MESSAGES)),
        msgspec.msgpack.encode,
        frames,
        (),
        count=10_000_000,
        quick=30_000,
    ),
    FuzzTarget(
        "verdicts",
        lambda: list(map(plain, SERVER_MESSAGES)),
        msgspec.msgpack.encode,
        verdicts,
        (ProtocolError, RequestError),
        count=1_000_000,
        quick=6_000,
        torn=0.05,
    ),
    FuzzTarget(
        "addresses",
        lambda: ["host:8100", ":8101", "http://[::1]:8100/v1", "wss://example.org", "10.0.0.1:1"],
        lambda value: str(value).encode("utf-8", "replace"),
        addresses,
        (ProtocolError,),
        count=1_000_000,
        quick=3_000,
    ),
)
