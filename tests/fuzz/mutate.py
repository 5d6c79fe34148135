"""Inputs near valid ones. A structure (what msgpack or JSON says, or the lines of a text) is changed in a few places
and written; some of what is written then has its bytes changed, too.

Only the path to a change is copied, so that an input costs a few microseconds. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

# What decoders, counters and bounds are known to trip over.
NUMBERS = (
    0, 1, -1, 2, 7, 8, 20, 63, 64, 65, 127, 128, 255, 256, 257, 1000, 4096, 65535, 65536, 1 << 20,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
    -(1 << 31), -(1 << 63), 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 5e-324, 1e18, 1e300, float("inf"),
    float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", "a", "a" * 7, "a" * 8, "a" * 64, "a" * 65, "a" * 300, " ", "\n", "\x00", "a\nb", "\x1b[2J", "é", "\u2028", "😀",
    "\U0010ffff", "<|im_end|>", "</think>", "{}", "[", '{"a": 1}', "null", "true", "NaN", "1", "-1", "1e999",
    "../../x", "%s%n", "{{ 7 * 7 }}", "0x10", "١",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [0, 1, 2], [[0, 1], [2]])
LEAVES: tuple[Any, ...] = NUMBERS + TEXTS + OTHERS
BYTES = (
    b"", b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc1", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b'"',
    b"\\", b"\\ud800", b"[", b"]", b"{", b"}", b",", b":", b"NaN", b"1e999", b"-", b"9" * 30, b"9" * 5000,
    b"[" * 2000, b'{"a":' * 2000, b"\x91" * 2000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"\xff" * 8, b"\x00" * 8,
)  # fmt: skip


class Mutator:
    """Endless inputs from `examples`, each of which `write` can write."""

    def __init__(
        self,
        examples: Sequence[Any],
        write: Callable[[Any], bytes],
        seed: str,
        *,
        spare: Sequence[Any] = (),
        torn: float = 0.2,
    ) -> None:
        """spare: values to put in, besides those that decoders trip over, and parts of other examples. torn: share of
        inputs whose bytes are changed as well."""
        self._examples = list(examples)
        self._write = write
        self._torn = torn
        self._chance = chance = random.Random(seed)
        self._random = chance.random
        self._spare = [*LEAVES, *spare, *(part for e in self._examples for part in _parts(e, 3))]
        self._pieces = [*BYTES, *(bytes(write(e)) for e in self._examples)]

    def value(self) -> Any:
        """A changed example, before it is written."""
        value = self._pick(self._examples)
        for _ in range(1 + int(3 * self._random() ** 3)):
            value = self._changed(value)
        return value

    def input(self) -> bytes:
        """A changed example, written. What cannot be written is left out for another."""
        while True:
            try:
                data = self._write(self.value())
            except (OverflowError, TypeError, ValueError, UnicodeError, RecursionError):
                continue
            return self._bent(data) if self._random() < self._torn else data

    def _pick(self, items: Sequence[Any]) -> Any:
        return items[int(self._random() * len(items))]

    def _changed(self, value: Any) -> Any:
        """A copy with one change, somewhere."""
        kind = type(value)
        if kind is list and value and self._random() < 0.85:
            return self._in_list(value)
        if kind is dict and value and self._random() < 0.85:
            return self._in_dict(value)
        if self._random() < 0.5:
            return self._pick(self._spare)
        if kind is int:
            return value + self._pick((-1, 1, 2, -value, 256))
        if kind is float:
            return value * self._pick((-1.0, 2.0, 1e9, 1e-9))
        if kind is str:
            at = int(self._random() * (len(value) + 1))
            piece = self._pick(TEXTS)
            return value[:at] + piece + value[at + self._pick((0, 0, 1, 3)) :]
        if kind is bytes:
            return self._bent(value)
        return self._pick(self._spare)

    def _in_list(self, value: list[Any]) -> list[Any]:
        copy = value.copy()
        at = int(self._random() * len(copy))
        how = self._random()
        if how < 0.7:
            copy[at] = self._changed(copy[at])
        elif how < 0.76:
            del copy[at]
        elif how < 0.84:
            copy.insert(at, self._pick(self._spare))
        elif how < 0.9:
            other = int(self._random() * len(copy))
            copy[at], copy[other] = copy[other], copy[at]
        elif how < 0.96:
            copy[at:at] = [copy[at]] * self._pick((1, 2, 8, 100))
        else:
            del copy[at:]
        return copy

    def _in_dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        copy = value.copy()
        name = self._pick(list(copy))
        how = self._random()
        if how < 0.8:
            copy[name] = self._changed(copy[name])
        elif how < 0.88:
            del copy[name]
        elif how < 0.94:
            copy[self._pick(TEXTS)] = self._pick(self._spare)
        else:
            copy[self._pick(list(copy))] = copy[name]
        return copy

    def _bent(self, data: bytes) -> bytes:
        """With one to three changes of its bytes."""
        for _ in range(1 + int(3 * self._random() ** 2)):
            at = int(self._random() * (len(data) + 1))
            how = self._random()
            if how < 0.35 and at < len(data):
                flipped = data[at] ^ (1 << int(8 * self._random()))
                data = data[:at] + bytes((flipped,)) + data[at + 1 :]
            elif how < 0.5:
                data = data[:at]
            elif how < 0.75:
                data = data[:at] + self._pick(BYTES) + data[at + self._pick((0, 0, 1, 4, 8)) :]
            elif how < 0.9:
                data = data[:at] + data[at + int(16 * self._random()) :]
            else:
                other = self._pick(self._pieces)
                data = data[:at] + other[int(self._random() * (len(other) + 1)) :]
        return data


def _parts(value: Any, depth: int) -> list[Any]:
    """What is in a structure, down to a depth: to be put elsewhere."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    deeper = [part for item in inner for part in _parts(item, depth - 1)] if depth else []
    return [*(item for item in inner if not isinstance(item, bytes)), *deeper]


def lines_of(text: str) -> list[str]:
    """A text as a structure: its lines."""
    return text.split("\n")


def write_lines(value: Any) -> bytes:
    """The text again, whatever has become of its lines."""
    if not isinstance(value, list):
        return str(value).encode("utf-8", "surrogatepass")
    return "\n".join(str(line) for line in value).encode("utf-8", "surrogatepass")
