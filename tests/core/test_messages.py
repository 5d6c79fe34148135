"""The wire format is pinned: other releases send these bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages import OPEN, TRACE
from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import (
    DIGESTS_SINCE,
    FRAME_EXTRA,
    VERSION,
    Branch,
    Cancel,
    Draft,
    Hello,
    Message,
    Open,
    Redirect,
    Refused,
    ServerMessage,
    Verdict,
    Welcome,
    check_hello,
    check_verdict,
    check_welcome,
    decode_edge_message,
    decode_server_message,
    encode,
    frame_limit,
    vocabulary_fingerprint,
    welcome_from,
)
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import TokenLogprob, TopLogprob

GOLDEN: dict[str, Message] = {
    "95a568656c6c6f01a26162a163c3": Hello(1, "ab", "c", True),
    "93a87265646972656374a173a53a38313031": Redirect("s", ":8101"),
    "97a56472616674a873657373696f6e3107" + "02" + "920304" + "c3" + "9193" + "0105" + "9106": Draft(
        "session1", 7, 2, [3, 4], True, [Branch(1, 5, [6])]
    ),
    "92a663616e63656ca873657373696f6e31": Cancel("session1"),
    "97a772656675736564a173a163a16dcb3ff0000000000000c207": Refused("s", "c", "m", 1.0, False, 7),
}
BARE_OPEN = (
    "9da46f70656ea873657373696f6e3101910595cb3fe000000000000001cb3fd0000000000000cb0000000000000000"
    "09040291069107c2c30392cb3ff0000000000000cb4000000000000000"
)
GOLDEN |= {
    "dc0012a46f70656ea873657373696f6e3101910598cb3fe000000000000001cb3fd0000000000000cb00000000000000"
    "000902910398919207cbbfe0000000000000cb3ff0000000000000cbbff0000000000000cb3ff8000000000000929201"
    "029103920405910693a57265676578a2612b920809040291069107c2c30392cb3ff0000000000000cb40000000000000"
    "00a23a31a66f662d6f6e65a16492cb3fe0000000000000cb3ff0000000000000d937" + TRACE.encode().hex(): OPEN,
    "9ea777656c636f6d6501a16da1660a91024008a96c6c616d612e637070a56578616374cb404e000000000000a164cd100004": Welcome(
        1, "m", "f", 10, [2], 64, 8, "llama.cpp", "exact", 60.0, "d", 4096, 4
    ),
}
UNCONSTRAINED_OPEN = (
    "dc0010a46f70656ea873657373696f6e3101910597cb3fe000000000000001cb3fd0000000000000cb00000000000000"
    "0009029103040291069107c2c30392cb3ff0000000000000cb4000000000000000a23a31a66f662d6f6e65a164"
)
EARLIER: dict[str, Message] = {  # frames of releases with fewer fields
    "94a568656c6c6f01a26162a163": Hello(1, "ab", "c"),
    "96a56472616674a873657373696f6e3107" + "02" + "920304" + "c3": Draft("session1", 7, 2, [3, 4], True),
    "9da777656c636f6d6501a16da1660a91024008a96c6c616d612e637070a56578616374cb404e000000000000a164cd1000": Welcome(
        1, "m", "f", 10, [2], 64, 8, "llama.cpp", "exact", 60.0, "d", 4096
    ),
    "96a772656675736564a173a163a16dcb3ff0000000000000c2": Refused("s", "c", "m", 1.0, False),
    UNCONSTRAINED_OPEN: msgspec.structs.replace(
        OPEN, sampling=Sampling(0.5, 1, 0.25, 0.0, 9, 2, (3,)), device=None, trace=""
    ),
    BARE_OPEN: msgspec.structs.replace(
        OPEN, sampling=Sampling(0.5, 1, 0.25, 0.0, 9), avoid="", salt="", digest="", device=None, trace=""
    ),
    "dc0010a46f70656ea873657373696f6e3101910598cb3fe000000000000001cb3fd0000000000000cb00000000000000"
    "000902910398919207cbbfe0000000000000cb3ff0000000000000cbbff0000000000000cb3ff8000000000000929201"
    "029103920405910693a57265676578a2612b920809040291069107c2c30392cb3ff0000000000000cb40000000000000"
    "00a23a31a66f662d6f6e65a164": msgspec.structs.replace(OPEN, device=None, trace=""),
    "dc0011a46f70656ea873657373696f6e3101910598cb3fe000000000000001cb3fd0000000000000cb00000000000000"
    "000902910398919207cbbfe0000000000000cb3ff0000000000000cbbff0000000000000cb3ff8000000000000929201"
    "029103920405910693a57265676578a2612b920809040291069107c2c30392cb3ff0000000000000cb40000000000000"
    "00a23a31a66f662d6f6e65a16492cb3fe0000000000000cb3ff0000000000000": msgspec.structs.replace(
        OPEN, trace=""
    ),
    "9ba777656c636f6d6501a16da1660a91024008a96c6c616d612e637070a56578616374cb404e000000000000": Welcome(
        1, "m", "f", 10, [2], 64, 8, "llama.cpp", "exact", 60.0
    ),
}
VERDICT = Verdict(
    "s", 1, 2, 1, [3, 4], "stop", [TokenLogprob(3, -0.5, [TopLogprob(1, -0.25)])], 0.5, 1.0, 0.0
)
WELCOME = Welcome(1, "m", "f", 10, [2], 64, 8, "llama.cpp", "exact", 60.0, "d")


@pytest.mark.parametrize(("frame", "message"), GOLDEN.items())
def test_golden_frames(frame: str, message: Message) -> None:
    assert encode(message).hex() == frame
    decode = (
        decode_server_message if isinstance(message, Refused | Redirect | Welcome) else decode_edge_message
    )
    assert decode(bytes.fromhex(frame)) == message


@pytest.mark.parametrize(("frame", "message"), EARLIER.items())
def test_frames_of_earlier_releases_are_understood(frame: str, message: Message) -> None:
    decode = decode_server_message if isinstance(message, Refused | Welcome) else decode_edge_message
    assert decode(bytes.fromhex(frame)) == message


def test_every_message_survives_the_wire() -> None:
    assert decode_edge_message(encode(OPEN)) == OPEN
    assert decode_server_message(encode(VERDICT)) == VERDICT
    assert decode_server_message(encode(WELCOME)) == WELCOME


def test_shorter_and_longer_messages_are_understood() -> None:
    """A peer of the same version may know fewer fields, or more."""
    fields = msgspec.msgpack.decode(encode(Draft("session1", 7, 2, [3])))
    older = msgspec.msgpack.encode(fields[:5])
    newer = msgspec.msgpack.encode([*fields, "something new"])
    assert decode_edge_message(older) == decode_edge_message(newer) == Draft("session1", 7, 2, [3])


@given(st.binary(max_size=60))
def test_garbage_is_refused_as_malformed(frame: bytes) -> None:
    for decode in (decode_edge_message, decode_server_message):
        with contextlib.suppress(ProtocolError):  # any other exception fails
            decode(frame)


def test_wrong_direction_and_wrong_types_are_refused() -> None:
    with pytest.raises(ProtocolError, match="from an edge"):
        decode_edge_message(encode(VERDICT))
    with pytest.raises(ProtocolError, match="from a verifier"):
        decode_server_message(encode(OPEN))
    bad = msgspec.msgpack.encode(["draft", "session1", 1, 0, ["not a token"]])
    with pytest.raises(ProtocolError, match=r"Expected `int`"):
        decode_edge_message(bad)


@pytest.mark.parametrize(
    "name", ["", "seven..", "x" * 65, "x" * 1_000_000, "with a blank", "line-end\n", "grün-gelb"]
)
def test_a_session_has_a_short_plain_name_in_every_message(name: str) -> None:
    """Names are remembered, logged and counted: no door lets others in."""
    for message in (msgspec.structs.replace(OPEN, session=name), Draft(name, 1, 0, []), Cancel(name)):
        with pytest.raises(ProtocolError, match=r"\{8,64\}.*\[1\]"):
            decode_edge_message(encode(message))


@pytest.mark.parametrize("name", ["x" * 8, "x" * 64, "!~:/.-_#"])
def test_names_of_8_to_64_plain_characters_are_taken(name: str) -> None:
    assert decode_edge_message(encode(Cancel(name))) == Cancel(name)


@pytest.mark.parametrize(
    ("field", "text"), [("avoid", "x" * 265), ("salt", "x" * 65), ("salt", "with a blank")]
)
def test_other_names_chosen_by_edges_are_short_too(field: str, text: str) -> None:
    with pytest.raises(ProtocolError, match="64"):
        decode_edge_message(encode(msgspec.structs.replace(OPEN, **{field: text})))


def test_fingerprint_tells_vocabularies_apart() -> None:
    plain = vocabulary_fingerprint([(0, b"a"), (1, b"bc")])
    assert plain == vocabulary_fingerprint(iter([(0, b"a"), (1, b"bc")]))
    assert plain != vocabulary_fingerprint([(0, b"ab"), (1, b"c")])
    assert plain != vocabulary_fingerprint([(0, b"a"), (2, b"bc")])


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_edge_message(b"\x91\xa2\xff\xfe")


def test_a_peer_of_another_version_is_told_to_install_the_same_release() -> None:
    with pytest.raises(ProtocolError, match="install the same release") as refused:
        check_hello(Hello(VERSION + 1, "f"), "f", "m")
    assert refused.value.code == "version_mismatch"
    check_hello(Hello(VERSION, "f"), "f", "m")


def test_an_edge_with_another_vocabulary_is_refused_and_one_without_any_is_not() -> None:
    with pytest.raises(ProtocolError, match="not that of the-model") as refused:
        check_hello(Hello(VERSION, "other"), "f", "the-model")
    assert refused.value.code == "vocabulary_mismatch"
    check_hello(Hello(VERSION), "f", "the-model")


def test_a_verifier_must_say_which_weights_it_runs() -> None:
    check_welcome(WELCOME)
    with pytest.raises(ProtocolError, match=DIGESTS_SINCE) as refused:
        check_welcome(msgspec.structs.replace(WELCOME, digest=""))
    assert refused.value.code == "version_mismatch"


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (Refused("", "overloaded", "full"), "overloaded"),
        (Verdict("session-1", 0, 0, 0, [1]), "malformed"),
        (msgspec.structs.replace(WELCOME, digest=""), "version_mismatch"),
    ],
)
def test_a_verifier_begins_with_a_welcome_that_is_in_order(first: ServerMessage, code: str) -> None:
    assert welcome_from(WELCOME) is WELCOME
    with pytest.raises(ProtocolError) as refused:
        welcome_from(first)
    assert refused.value.code == code


def test_the_longest_open_of_a_context_fits_its_frame() -> None:
    context, token = 1000, 2**31 - 1
    longest = Open("x" * 64, 1, [token] * (context // 2), Sampling(), 1, committed=[token] * (context // 2))
    assert len(encode(longest)) <= frame_limit(context) < len(encode(longest)) + FRAME_EXTRA


@pytest.mark.parametrize("decode", [decode_edge_message, decode_server_message])
@pytest.mark.parametrize("word", ["x" * 5000, "open\nopen", "\x1b[2J", "\u2028"])
def test_an_error_repeats_a_peers_words_in_part_and_as_one_printable_line(
    decode: Callable[[bytes], object], word: str
) -> None:
    with pytest.raises(ProtocolError) as malformed:
        decode(msgspec.msgpack.encode([word, 1]))
    assert len(str(malformed.value)) < 500
    assert str(malformed.value).isprintable()


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_vocab": 0},
        {"n_vocab": 1 << 40},
        {"eos": [10]},
        {"eos": [-1]},
        {"context": 0},
        {"context": 1 << 62},
        {"max_draft": -1},
        {"max_branches": -1},
        {"max_frame": 0},
        {"park_s": float("nan")},
        {"park_s": -1.0},
        {"model": "two\nlines"},
    ],
)
def test_a_welcome_has_limits_that_can_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="limits that no verifier has") as refused:
        check_welcome(msgspec.structs.replace(WELCOME, **wrong))
    assert refused.value.code == "malformed"


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": -1},
        {"accepted": -1},
        {"accepted": 3},
        {"tokens": [3, 10]},
        {"tokens": [-1, 4]},
        {"queue_ms": float("nan")},
        {"engine_ms": float("inf")},
        {"price": -1.0},
        {"cached": -1},
    ],
)
def test_a_verdict_has_ids_counts_and_times_that_can_be(wrong: dict[str, object]) -> None:
    check_verdict(VERDICT, 10)
    with pytest.raises(ProtocolError, match="that cannot be") as refused:
        check_verdict(msgspec.structs.replace(VERDICT, **wrong), 10)
    assert refused.value.code == "malformed"
