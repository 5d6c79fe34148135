"""Scripts: the texts of target and drafter in a generation of any length, made of recorded traces.

A script is a function of a seed alone, so an emulated engine and an emulated device that share nothing else agree on
it. It strings together traces that the predictor was not trained on and ends, at a length drawn from the seed, with an
end-of-sequence token. With a stated acceptance, single positions are drawn instead: accepted ones with that
probability. Signals, and continuations after a rejected token, are the recorded ones. Second choices are not recorded:
whether one is the target's token is drawn for each position.

An emulated device need not evaluate the predictor token by token: its two features that depend on the run (depth in
the draft, acceptance of late) enter by their slopes, which are worked out once for all positions.
"""

from __future__ import annotations

import functools
import random
import sys
from bisect import bisect_left
from collections.abc import Sequence
from itertools import compress, count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wisp.calibrate.traces.format import OffPath, Trace, TraceSet, as_signal, trace_folder
from wisp.core.draft.predictor import Predictor, features
from wisp.core.draft.signals import Signal
from wisp.core.errors import ConfigError

# How often the target's token is the drafter's second choice where it is not the first, with a confidence in that of
# less than 0.3, and of more. Measured with Qwen2.5-Coder 0.5B and 1.5B along 48 of the recorded texts: 269 and 374
# positions, greedy and at T = 0.7.
UNSURE, SECOND_UNSURE, SECOND_SURE = 0.3, 0.38, 0.61
DEPTH, RECENT = 2, 0.8  # where slopes are taken
_OTHER_DEPTH, _OTHER_RECENT = 8, 0.55


class Foretold(Signal, frozen=True, array_like=True):
    """A recorded signal with the predictor's answer: log odds `z`, and slopes by log1p(depth) and by recent."""

    z: float = 0.0
    by_depth: float = 0.0
    by_recent: float = 0.0


class Foreteller(Predictor):
    """The predictor for `Foretold` signals."""

    def odds(self, signal: Signal, depth: int, recent: float, temperature: float) -> float:
        foretold: Foretold = signal  # type: ignore[assignment]  # a script's signals are
        by_depth = _LOG1P[depth] if depth < 256 else _LOG1P[255]
        return foretold.z + foretold.by_depth * by_depth + foretold.by_recent * (recent - RECENT)


_LOG1P: list[float] = (np.log1p(np.arange(256)) - np.log1p(DEPTH)).tolist()


class Library:
    """All positions of some traces, flat: the material of scripts.

    target, draft: by position; said: each draft with its signal. off: the drafter's continuation of each position where
    the two differ; seconds: those of these positions where the target's token is the drafter's second choice.
    """

    def __init__(self, traces: Sequence[Trace], predictor: Predictor) -> None:
        self.foreteller = Foreteller.from_dict(predictor.to_dict())
        self.target: list[int] = []
        self.draft: list[int] = []
        self.signals: list[Foretold] = []
        self.off: dict[int, list[tuple[int, Foretold]]] = {}
        self.pieces: list[range] = []  # a trace's positions, its end of sequence left out
        self.ends: list[int] = []  # positions of ends of sequence
        self.prompts: list[list[int]] = []  # of each trace
        parts = [t.signals for t in traces] + [t.off[i].signals for t in traces for i in sorted(t.off)]
        heat = [t.sampling.temperature for t in traces for _ in range(len(t))]
        heat += [t.sampling.temperature for t in traces for i in sorted(t.off) for _ in t.off[i].tokens]
        columns = traces[0].columns
        foretold = _foretell(predictor, columns, np.concatenate(parts), heat)
        at = sum(map(len, traces))
        for t in traces:
            first = len(self.target)
            self.target += t.target.tolist()
            self.draft += t.draft.tolist()
            self.prompts.append(t.prompt.tolist())
            stopped = t.finish == "stop"
            self.pieces.append(range(first, len(self.target) - stopped))
            if stopped:
                self.ends.append(len(self.target) - 1)
            for i in sorted(t.off):
                self.off[first + i] = _path(t.off[i], foretold[at:])
                at += len(t.off[i].tokens)
        self.signals = foretold[: len(self.target)]
        self.said = list(zip(self.draft, self.signals, strict=True))
        self.stops = frozenset(self.ends)
        self.eos = frozenset(self.target[i] for i in self.ends)
        self.seconds = frozenset(filter(self._second, self.off))
        inside = [p for piece in self.pieces for p in piece]
        self.agreed = [p for p in inside if p not in self.off]
        self.differed = [p for p in inside if p in self.off]

    def _second(self, position: int) -> bool:
        likely = SECOND_UNSURE if self.signals[position].confidence < UNSURE else SECOND_SURE
        return random.Random(f"second/{position}").random() < likely

    @property
    def acceptance(self) -> float:
        """Share of positions at which drafter and target agree."""
        return len(self.agreed) / (len(self.agreed) + len(self.differed))


def _path(off: OffPath, foretold: Sequence[Foretold]) -> list[tuple[int, Foretold]]:
    return list(zip(off.tokens.tolist(), foretold, strict=False))


def _foretell(
    predictor: Predictor, columns: tuple[str, ...], values: npt.NDArray[np.float32], heat: Sequence[float]
) -> list[Foretold]:
    signals = [as_signal(columns, row) for row in values]

    def logits(depth: int, recent: float) -> npt.NDArray[np.float64]:
        rows = [features(s, depth, recent, t) for s, t in zip(signals, heat, strict=True)]
        return predictor.logits(np.array(rows))

    base = logits(DEPTH, RECENT)
    by_depth = (logits(_OTHER_DEPTH, RECENT) - base) / (np.log1p(_OTHER_DEPTH) - np.log1p(DEPTH))
    by_recent = (logits(DEPTH, _OTHER_RECENT) - base) / (_OTHER_RECENT - RECENT)
    return [
        Foretold(s.confidence, s.entropy, s.margin, s.spread, s.lead, z=z, by_depth=d, by_recent=r)
        for s, z, d, r in zip(signals, base.tolist(), by_depth.tolist(), by_recent.tolist(), strict=True)
    ]


class Script:
    """One generation: `tokens` are the target's, the last an end of sequence. prompt: None if it is not
    known."""

    __slots__ = ("_departures", "library", "positions", "prompt", "tokens")

    def __init__(
        self, library: Library, positions: list[int], end: int, prompt: list[int] | None = None
    ) -> None:
        self.library = library
        self.prompt = prompt
        self.positions = [*positions, end]
        self.tokens = list(map(library.target.__getitem__, self.positions))
        # Positions at which the drafter differs; behind the last, nowhere.
        departs = map(library.off.__contains__, self.positions)
        self._departures = [*compress(count(), departs), sys.maxsize]

    def __len__(self) -> int:
        return len(self.tokens)

    def propose(self, base: int, guesses: int) -> tuple[int, Foretold] | None:
        """The drafter's proposal after `base` tokens of the text and so many guesses of its own."""
        library, departures, end = self.library, self._departures, base + guesses
        at = departures[bisect_left(departures, base)]
        if end <= at:
            return library.said[self.positions[end]] if end < len(self.tokens) else None
        path, depth = library.off[self.positions[at]], end - at - 1
        return path[depth] if depth < len(path) else None

    def second(self, base: int, guesses: int) -> int | None:
        """The target's token in the place of that proposal, if it is the drafter's second choice."""
        end = base + guesses
        if end < len(self.tokens) and self.positions[end] in self.library.seconds:
            departures = self._departures
            if departures[bisect_left(departures, base)] == end:
                return self.tokens[end]
        return None


class Scripts:
    """Scripts by seed.

    lengths:    fewest and most tokens of an answer, its end of sequence included; evenly between
    acceptance: None: as recorded; or the share of draft tokens that agree, each for itself
    """

    def __init__(
        self, library: Library, lengths: tuple[int, int] = (100, 300), acceptance: float | None = None
    ) -> None:
        self.library = library
        self.lengths = lengths
        self.acceptance = acceptance
        self._known: dict[int, Script] = {}

    def script(self, seed: int) -> Script:
        """The script of a seed. The last few thousand are remembered."""
        found = self._known.get(seed)
        if found is None:
            found = self._write(random.Random(seed))
            if len(self._known) >= 4096:
                del self._known[next(iter(self._known))]
            self._known[seed] = found
        return found

    def token(self, seed: int, position: int) -> int:
        """The target's token; the end of sequence again and again beyond the end."""
        tokens = self.script(seed).tokens
        return tokens[position] if position < len(tokens) else tokens[-1]

    def _write(self, source: random.Random) -> Script:
        library = self.library
        n = source.randint(*self.lengths) - 1
        positions: list[int] = []
        while len(positions) < n:
            if self.acceptance is None:
                positions += source.choice(library.pieces)
            else:
                pool = library.agreed if source.random() < self.acceptance else library.differed
                positions.append(source.choice(pool))
        return Script(library, positions[:n], source.choice(library.ends))


class Recorded(Scripts):
    """Traces as they are, each whole and behind its own prompt."""

    def _write(self, source: random.Random) -> Script:
        library = self.library
        i = source.randrange(len(library.prompts))
        piece = library.pieces[i]
        stopped = piece.stop in library.stops
        *positions, end = range(piece.start, piece.stop + stopped)
        return Script(library, positions, end, library.prompts[i])


def library(traces: Path, domain: str = "", *, greedy: bool = False) -> Library:
    """The traces of a folder that the shipped predictor was not trained on; of one `domain` if given, only greedy ones
    if told so. The same one for the same question. Raises ConfigError.
    """
    return _library(traces, domain, greedy)


@functools.lru_cache(maxsize=4)
def _library(traces: Path, domain: str, greedy: bool) -> Library:
    from wisp.engines.build import read_predictor

    found = [
        t
        for t in TraceSet.load(trace_folder(traces))
        if t.split != "train" and domain in ("", t.domain) and not (greedy and t.sampling.temperature)
    ]
    if not found:
        which = f"{'greedy ' if greedy else ''}trace{f' of {domain}' if domain else ''}"
        raise ConfigError(f"{traces} has no {which} that the predictor was not trained on")
    return Library(found, read_predictor())
