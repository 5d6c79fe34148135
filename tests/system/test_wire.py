"""The session protocol by hand over a raw WebSocket: whatever is wrong is refused by code, and changes nothing."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from harness import Fleet, Peer, Process, opening
from waiting import eventually
from wisp.core.protocol.messages import MAX_FRAME, VERSION, Cancel, Draft, Hello, Message, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.engines.null import N_VOCAB, null_token

pytestmark = [pytest.mark.slow, pytest.mark.modelless]

TRUTH = [null_token(7, position) for position in range(20)]  # of sessions with seed 7


@pytest.fixture(scope="module")
def server(shared: Fleet) -> Process:
    return shared.serve("--park-s", "1", target="null", engine="null")


def test_the_welcome_says_what_the_verifier_is(server: Process) -> None:
    with Peer(server.url) as peer:
        w = peer.welcome
    assert (w.version, w.model, w.n_vocab, w.engine, w.mode, w.park_s) == (
        1,
        "null",
        N_VOCAB,
        "null",
        "exact",
        1.0,
    )


WRONG: dict[str, tuple[Message | bytes | str, str]] = {
    "noise": (b"\x00\xff\x13", "malformed"),
    "nothing": (b"", "malformed"),
    "text": ("hello", "malformed"),
    "unknown message": (msgspec.msgpack.encode(["frobnicate", 1]), "malformed"),
    "wrong types": (msgspec.msgpack.encode(["draft", "session-1", "one", 0, []]), "malformed"),
    "a verdict": (Verdict("session-1", 1, 0, 0, []), "malformed"),
    "deep nesting": (b"\x91" * 100_000 + b"\x00", "malformed"),
    "a huge count": (b"\xdd\xff\xff\xff\xff", "malformed"),
    "a second hello": (Hello(VERSION), "out_of_turn"),
    "draft of nobody": (Draft("nobody-here", 1, 0, [1]), "unknown_session"),
    "oversized draft": (Draft("session-1", 1, 1, [1] * 65), "oversized"),
    "out of vocabulary": (Draft("session-1", 1, 1, [N_VOCAB]), "out_of_vocabulary"),
    "negative token": (Draft("session-1", 1, 1, [-1]), "out_of_vocabulary"),
    "base beyond": (Draft("session-1", 1, 9, [1]), "unknown_base"),
    "negative base": (Draft("session-1", 1, -1, [1]), "unknown_base"),
    "old round": (Draft("session-1", -3, 0, [1]), "out_of_turn"),
    "same epoch": (opening("session-1"), "stale_epoch"),
    "other prompt": (opening("session-1", epoch=1, prompt=[9]), "conflict"),
    "other history": (opening("session-1", epoch=1, committed=[(TRUTH[0] + 1) % 256]), "conflict"),
    "short id": (opening("x"), "malformed"),
    "empty prompt": (opening("session-2", prompt=[]), "malformed"),
    "prompt out of vocabulary": (opening("session-2", prompt=[1, 999]), "out_of_vocabulary"),
    "prompt too long": (opening("session-2", prompt=[1] * 5000), "context_length_exceeded"),
    "too many tokens": (opening("session-2", max_tokens=5000), "context_length_exceeded"),
    "no tokens": (opening("session-2", max_tokens=0), "context_length_exceeded"),
    "bad temperature": (opening("session-2", sampling=Sampling(temperature=-1)), "malformed"),
    "not a number": (opening("session-2", sampling=Sampling(temperature=float("nan"))), "malformed"),
    "committed is all": (opening("session-2", committed=TRUTH), "malformed"),
    "too many logprobs": (opening("session-2", logprobs=21), "malformed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_frame_is_refused_and_the_session_goes_on(server: Process, name: str) -> None:
    frame, code = WRONG[name]
    with Peer(server.url) as peer:
        assert peer.open("session-1").tokens == TRUTH[:1]
        peer.say(frame)
        refused = peer.refused()
        assert refused.code == code
        assert refused.message
        peer.say(Draft("session-1", 1, 1, TRUTH[1:4]))
        verdict = peer.verdict()
        assert (verdict.accepted, verdict.tokens) == (3, TRUTH[1:5])
        peer.say(Cancel("session-1"))


def test_a_repeated_draft_gets_the_same_verdict_and_a_cancelled_session_is_gone(server: Process) -> None:
    with Peer(server.url) as peer:
        peer.open("session-3")
        draft = Draft("session-3", 1, 1, [TRUTH[1], 0])
        peer.say(draft)
        first = peer.verdict()
        peer.say(draft)
        assert peer.verdict() == first
        peer.say(Cancel("session-3"))
        peer.say(Draft("session-3", 2, 3, []))
        assert peer.refused().code == "unknown_session"


def test_sessions_resume_on_another_connection(server: Process) -> None:
    with Peer(server.url) as old, Peer(server.url) as new:
        old.open("session-4", draft=TRUTH[:2])
        verdict = new.open("session-4", epoch=1, committed=TRUTH[:1])
        assert verdict.tokens == TRUTH[1:3]  # what was committed while the edge did not hear it
        old.say(Draft("session-4", 9, 3, []))
        assert old.refused().code == "unknown_session"
        new.say(Draft("session-4", 1, 3, TRUTH[3:6]))
        assert new.verdict().accepted == 3
        new.say(Cancel("session-4"))


def closed_with(peer: Peer) -> int | None:
    """The close code; nothing more is said before."""
    with pytest.raises(ConnectionClosed):
        peer.hear()
    return peer.socket.close_code


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (Hello(VERSION + 1), "version_mismatch"),
        (Hello(VERSION, "0" * 64), "vocabulary_mismatch"),
        (opening("session-5"), "out_of_turn"),
        (b"\xc1", "malformed"),
        ("hello", "malformed"),
    ],
    ids=["version", "vocabulary", "no hello", "noise", "text"],
)
def test_a_wrong_greeting_is_refused_and_the_connection_closed(
    server: Process, frame: Message | bytes | str, code: str
) -> None:
    with Peer(server.url, hello=None) as peer:
        peer.say(frame)
        refused = peer.refused()
        assert (refused.code, refused.fatal) == (code, True)
        assert closed_with(peer) == 4400


def test_a_frame_above_the_limit_ends_the_connection_and_nothing_else(server: Process) -> None:
    with Peer(server.url) as good, Peer(server.url) as bad:
        good.open("session-6")
        bad.open("session-7")
        with suppress(ConnectionClosed):  # perhaps while it is still being sent
            bad.say(bytes(MAX_FRAME + 1))
        with pytest.raises(ConnectionClosed):
            bad.hear()
        # The client may still be sending when the server closes, and then sees a reset instead of the reason.
        assert bad.socket.close_code in (1009, 1006)
        good.say(Draft("session-6", 1, 1, TRUTH[1:3]))
        assert good.verdict().accepted == 2
        assert good.open("session-7", epoch=1, committed=TRUTH[:1], draft=TRUTH[1:2]).accepted == 1
        for session in ("session-6", "session-7"):
            good.say(Cancel(session))


def test_nothing_is_left_behind(server: Process) -> None:
    def left() -> bool:
        m = server.metrics()
        names = ("num_requests_running", "num_requests_parked", "kv_cache_usage_perc", "edge_connections")
        return all(m[f"wisp:{name}"] == 0 for name in names)

    eventually(left)
    m = server.metrics()
    assert m['wisp:request_refused_total{code="out_of_vocabulary"}'] >= 3
    assert m["wisp:engine_errors_total"] == 0
    assert "Traceback" not in server.log()
