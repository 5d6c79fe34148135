"""Timing steps on any target engine.

One slot is filled by pieces of a prompt and copied into the others; a step is then timed again and again from the same
cached tokens, since an engine drops all tokens beyond a slice's `start`. Repeats go round over all steps of a level, so
that a spell of noise falls on many steps a little and not on one. Drafts are the target's own next tokens, found
beforehand: an engine may stop at the first token that it rejects, and a step is to be timed whole. A step's time is the
median of its repeats without outliers; a step with disagreeing repeats is left out, and counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median

from wisp.calibrate.profile.grid import Cell
from wisp.core.errors import ConfigError, EngineError
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.engines.base import TargetEngine
from wisp.progress import Tell

TOO_FEW = 12  # steps: no fit from fewer
FEWEST = 3  # repeats
LONGEST_DRAFT = 16  # tokens, with the one before it; slices of more are pieces of prompts
DISAGREE = 0.25  # relative spread from which repeats disagree


@dataclass
class Timed:
    """A step and its repeats, ms."""

    cell: Cell
    times: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """The median of the repeats that are within three spreads of their middle."""
        middle, spread = median(self.times), self.spread
        return median(t for t in self.times if abs(t - middle) <= 3.0 * spread * middle + 1e-9)

    @property
    def spread(self) -> float:
        """Relative: as large as a standard deviation, but deaf to outliers."""
        middle = median(self.times)
        return 1.4826 * median(abs(t - middle) for t in self.times) / middle


@dataclass
class Measured:
    """Steps with their times; steps left out because repeats disagreed; whether time ran out; duration in s."""

    steps: list[Timed]
    left_out: list[Timed]
    cut_short: bool
    seconds: float

    @property
    def noise(self) -> float:
        """The machine's: the median spread of repeats."""
        return median(t.spread for t in (*self.steps, *self.left_out))


class Bench:
    """An engine under the clock: steps are timed by `timer`, limits kept by `now`, both in seconds."""

    def __init__(
        self,
        engine: TargetEngine,
        *,
        now: Callable[[], float] = time.perf_counter,
        timer: Callable[[], float] | None = None,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self._now = now
        self._timer = timer or now
        self._random = random.Random(seed)
        ids = engine.info.n_vocab - 1
        self._vocabulary = [i for i in range(min(ids, 4096)) if i not in engine.info.eos]
        self._filled = 0  # tokens of a prompt in slot 0
        self._text: list[int] = []  # a token, and the target's text after it

    def measure(
        self, cells: Sequence[Cell], repeats: int, limit_s: float, tell: Tell = lambda *_: None
    ) -> Measured:
        """Time every cell `repeats` times; with less time than that takes, fewer times and then fewer cells.

        Raises ConfigError where time did not suffice for a fit.
        """
        began = self._now()
        self._warm_up(cells)
        levels = [list(level) for _, level in groupby(cells, key=lambda c: c.cached)]
        done: list[Timed] = []
        cut = False
        for i, level in enumerate(levels):
            # A level gets an equal share of the time that is left.
            left = limit_s - (self._now() - began)
            until = self._now() + left / (len(levels) - i)
            timed = [Timed(cell) for cell in level]
            self._random.shuffle(timed)
            for at, step in enumerate(self._rounds(timed, repeats, until)):
                if at == 0:
                    self._run(step.cell)  # the first of a level is not counted
                step.times.append(self._run(step.cell) * 1e3)
                tell("timing steps", len(done) * repeats + at + 1, len(cells) * repeats)
            cut = cut or any(len(t.times) < repeats for t in timed)
            done += timed
        enough = [t for t in done if len(t.times) >= min(repeats, FEWEST)]
        steady = [t for t in enough if t.spread <= DISAGREE]
        if len(steady) < TOO_FEW:
            raise ConfigError(
                f"only {len(steady)} of {len(cells)} steps could be timed in {limit_s:.0f} s; a fit needs "
                f"{TOO_FEW}: allow more with --limit-s, or take --quick, fewer slots or a shorter context"
            )
        return Measured(steady, [t for t in enough if t.spread > DISAGREE], cut, self._now() - began)

    def _rounds(self, timed: list[Timed], repeats: int, until: float) -> Iterator[Timed]:
        """Every step of a level, again and again. Filling slots counts towards the level's time. Steps that the first
        round does not get to in its share of the time are given up, so that the others have their repeats."""
        self._fill(timed[0].cell.cached, max(t.cell.slices for t in timed), until)
        if self._filled == timed[0].cell.cached:
            drafts = (t.cell.new for t in timed if t.cell.new <= LONGEST_DRAFT)
            self._foretell(self._filled, max(drafts, default=1))
        first = self._now() + (until - self._now()) / FEWEST
        for step in timed:
            if self._now() > first:
                break
            yield step
        for repeat in range(1, repeats):
            for step in (t for t in timed if t.times):
                if self._now() > until and repeat >= FEWEST:
                    return
                yield step

    def _warm_up(self, cells: Sequence[Cell]) -> None:
        """Smallest and largest steps on empty slots: buffers are allocated, code and weights are read."""
        empty = sorted((c for c in cells if c.cached == 0), key=lambda c: c.load.new)
        self._foretell(0, LONGEST_DRAFT)
        for cell in (*empty[:1], *empty[-1:], *empty[:1]):
            self._run(cell)
        self._filled = 0

    def _fill(self, tokens: int, slots: int, until: float) -> None:
        """Let the first `slots` slots hold `tokens` tokens."""
        piece = max(1, min(self.engine.info.step_tokens, 512))
        while self._filled < tokens:
            n = min(piece, tokens - self._filled)
            self._checked([Slice(0, 0, self._filled, self._tokens(n), sample=False)])
            self._filled += n
            if self._now() > until:  # too long for this machine: the level is given up
                return
        for slot in range(1, slots if tokens else 0):
            self.engine.copy(Copy(0, slot, tokens))

    def _foretell(self, cached: int, tokens: int) -> None:
        """Decode the text that drafts are made of. All slots hold the same, so it is the same in all."""
        self._text = self._tokens(1)
        while len(self._text) < tokens:
            n = len(self._text) - 1
            [result] = self._checked([Slice(0, 0, cached + n, self._text[-1:], position=n)])
            self._text += result.tokens

    def _run(self, cell: Cell) -> float:
        """Seconds that a step took."""
        n, new, cached, chunk = cell
        batch = []
        for i in range(n):
            if new <= LONGEST_DRAFT:
                batch.append(Slice(i, i, cached, self._text[:new], n_draft=new - 1))
            else:
                batch.append(Slice(i, i, cached, self._tokens(new), sample=False))
        if chunk:
            batch.append(Slice(n, n, cached, self._tokens(chunk), sample=False))
        started = self._timer()
        self._checked(batch)
        return self._timer() - started

    def _checked(self, batch: list[Slice]) -> list[SliceResult]:
        results = self.engine.run(batch)
        for result in results:
            if result.error:
                raise EngineError(f"the engine could not run a step of the profile: {result.error}")
        return results

    def _tokens(self, n: int) -> list[int]:
        return self._random.choices(self._vocabulary, k=n)
