"""Text is a function of the tokens: against a slow reference, and however tokens are grouped."""

from __future__ import annotations

import codecs
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from api_fakes import ByteTokenizer
from wisp.api.backend import Committed
from wisp.api.output import Output
from wisp.api.text import TextStream
from wisp.core.protocol.step import TokenLogprob


def run(
    pieces: list[bytes], stop: list[str], takes: list[bool] | None = None
) -> tuple[list[str], TextStream]:
    """Push all pieces; take text after those that `takes` marks (after all, by default)."""
    stream = TextStream(pieces.__getitem__, stop)
    parts: list[str] = []
    for token in range(len(pieces)):
        stopped = stream.push(token)
        if takes is None or takes[token % len(takes)]:
            parts.append(stream.take())
        if stopped:
            break
    stream.end()
    return [*parts, stream.take()], stream


def reference(pieces: list[bytes], stop: list[str]) -> tuple[str, int]:
    """(text, tokens that count), by trying everything."""
    text = b"".join(pieces).decode("utf-8", "replace")
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - len(max(found, key=len))], consumed(pieces, end)
    return text, len(pieces)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"b", b"ab", b"aab"]), max_size=12),
    st.sampled_from(["a", "ab", "aa", "abab"]),
    st.integers(0, 14),
)
def test_stop_strings_count_from_the_least_number_of_tokens_on(
    pieces: list[bytes], stop: str, min_tokens: int
) -> None:
    stream = TextStream(pieces.__getitem__, [stop], min_tokens)
    parts = []
    for token in range(len(pieces)):
        stopped = stream.push(token)
        parts.append(stream.take())
        if stopped:
            break
    stream.end()
    text = b"".join(pieces).decode()
    free = len(b"".join(pieces[:min_tokens]))
    ends = [end for end in range(free + 1, len(text) + 1) if text[:end].endswith(stop)]
    assert "".join(parts) + stream.take() == (text[: ends[0] - len(stop)] if ends else text)
    assert stream.stopped == bool(ends)


def consumed(pieces: list[bytes], chars: int) -> int:
    for n in range(1, len(pieces) + 1):
        if len(codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces[:n]))) >= chars:
            return n
    return len(pieces)


text_bytes = st.text(alphabet="abé€😀", max_size=12).map(str.encode)
any_pieces = st.lists(
    st.one_of(text_bytes, st.binary(max_size=3), st.sampled_from([b"a", b"b", b"ab"])), max_size=12
)
split_pieces = st.tuples(text_bytes, st.integers(1, 3)).map(
    lambda x: [x[0][i : i + x[1]] for i in range(0, len(x[0]), x[1])]
)
stops = st.lists(st.text(alphabet="abé€😀\ufffd", min_size=1, max_size=4), max_size=4)


@settings(max_examples=400, deadline=None)
@given(st.one_of(any_pieces, split_pieces), stops, st.lists(st.booleans(), min_size=1, max_size=5))
def test_streamed_text_is_the_reference_text(pieces: list[bytes], stop: list[str], takes: list[bool]) -> None:
    parts, stream = run(pieces, stop, takes)
    text, tokens = reference(pieces, stop)
    assert "".join(parts) == text
    assert stream.tokens == tokens
    assert stream.released == len(text)


@settings(max_examples=200, deadline=None)
@given(split_pieces)
def test_offsets_say_where_each_token_begins(pieces: list[bytes]) -> None:
    _, stream = run(pieces, [])
    data = b"".join(pieces)
    start = 0
    for piece, offset in zip(pieces, stream.offsets, strict=True):
        assert offset == len(data[:start].decode("utf-8", "ignore"))
        start += len(piece)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=20), stops, st.sets(st.integers(1, 19)), st.sampled_from(["stop", "length"]))
def test_grouping_changes_nothing(data: bytes, stop: list[str], cuts: set[int], finish: str) -> None:
    tokens = [*data, *([256] if finish == "stop" else [])]
    if not tokens:
        return
    edges = [0, *sorted(c for c in cuts if c < len(tokens)), len(tokens)]
    groups = [tokens[a:b] for a, b in itertools.pairwise(edges)]
    assert outcome(groups, stop, finish) == outcome([tokens], stop, finish)


def outcome(groups: list[list[int]], stop: list[str], finish: str) -> tuple[object, ...]:
    output = Output(ByteTokenizer(), stop, logprobs=True)
    text, entries = "", []
    for i, group in enumerate(groups):
        end = finish if i == len(groups) - 1 else ""
        delta = output.add(Committed(group, [TokenLogprob(t, -1.0) for t in group], finish=end), 1.0)
        text += delta.text
        entries += delta.entries
        assert all(e.offset <= len(text) for e in entries)
        if delta.finish:
            return text, entries, output.tokens, delta.finish
    raise AssertionError("no finish")


def test_a_character_in_several_tokens_is_shown_whole() -> None:
    parts, _ = run([b"\xe2", b"\x82", b"\xac", b"!"], [])
    assert parts == ["", "", "€", "!", ""]


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    parts, _ = run([b"a", b"\xe2\x82"], [])
    assert parts == ["a", "", "\ufffd"]


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    parts, stream = run([b"one\n", b"\nU", b"ser:", b" more"], ["\n\nUser:"])
    assert parts == ["one", "", "", ""]
    assert (stream.stopped, stream.tokens) == (True, 3)


def test_held_back_text_is_released_once_it_is_no_stop_string() -> None:
    parts, stream = run([b"a\n", b"\n", b"b"], ["\n\nUser:"])
    assert parts == ["a", "", "\n\nb", ""]
    assert not stream.stopped


def test_the_stop_string_that_is_complete_first_wins() -> None:
    parts, stream = run([b"abcd"], ["abcd", "bc"])
    assert "".join(parts) == "a"
    assert stream.stopped
