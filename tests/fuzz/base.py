"""What is fuzzed, as data, and what must hold of any reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.mutate import Mutator

Reader = Callable[[bytes], object]
LONGEST_ERROR = 1000  # characters: errors go into logs and over the wire


@dataclass(frozen=True)
class FuzzTarget:
    """What is fuzzed.

    examples, write: see `Mutator`. reader: made with a folder of its own. declared: what it may raise
    slow_s: of a core, for one input. count, quick: inputs of a full run, and of `make test`
    native: may end the process, so the input is kept beside it. memory_mb: what one input may add to the peak
    """

    name: str
    examples: Callable[[], Sequence[Any]]
    write: Callable[[Any], bytes]
    reader: Callable[[Path], Reader]
    declared: tuple[type[Exception], ...]
    count: int
    quick: int
    slow_s: float = 0.5
    native: bool = False
    torn: float = 0.2
    memory_mb: int = 100

    def mutator(self, seed: str) -> Mutator:
        """Its inputs."""
        return Mutator(self.examples(), self.write, seed, torn=self.torn)


class BrokenPromise(AssertionError):
    """A reader took an input, or refused it, in a way that it must not."""


def must(holds: object, what: str) -> None:
    """Raises BrokenPromise."""
    if not holds:
        raise BrokenPromise(what)


def sane(error: Exception) -> None:
    """An error's text may hold what the peer sent, but neither all of it nor what a terminal obeys."""
    text = str(error)
    must(len(text) <= LONGEST_ERROR, f"the error has {len(text)} characters: {text[:200]!r}")
    must(text.isprintable(), f"the error cannot be printed: {text[:200]!r}")
