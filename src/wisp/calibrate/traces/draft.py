"""Phases 2 and 3 of recording: the drafter along the target's text, and on its own beyond each rejection.

Phase 2 reads prompt and text in wide batches and takes the logits of every generated position. In phase 3 each
rejected proposal becomes a branch: the true prefix is shared (cells of a unified KV pool belong to many sequences
at once), and all branches go on together, a row each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wisp.calibrate.traces.format import OffPath
from wisp.calibrate.traces.statistics import COLUMNS, statistics
from wisp.core.protocol.sampling import Sampling, target_token
from wisp.core.verify.kv import common_prefix
from wisp.engines.llama.context import Context, Logits, Tokens
from wisp.engines.llama.model import Model

ROWS = 128  # of a batch in phase 2
LINES = 8  # texts held at once; more would make the pool, and with it attention, larger
BRANCHES = 48  # continued at once

Report = Callable[[float], None]


@dataclass
class Line:
    """A text, and the drafter's proposals along it.

    draft:   proposal at each position of `text`
    signals: statistics of each, shape [columns]
    off:     by position of a rejected proposal
    """

    prompt: list[int]
    text: list[int]
    sampling: Sampling
    draft: list[int] = field(default_factory=list)
    signals: list[Logits] = field(default_factory=list)
    off: dict[int, OffPath] = field(default_factory=dict)


@dataclass
class _Branch:
    """The drafter's own continuation after the proposal at `position` of the line in `slot`."""

    line: Line
    slot: int
    position: int
    tokens: list[int] = field(default_factory=list)
    signals: list[Logits] = field(default_factory=list)
    over: bool = False


class DraftRecorder:
    """A drafter, opened for recording.

    n_vocab:     ids from here on are never proposed
    line_tokens: most tokens of a prompt and its text together
    depth:       length of an off-path continuation, tokens

    Raises ModelError if the model cannot be loaded.
    """

    def __init__(self, path: Path, *, n_vocab: int, line_tokens: int, depth: int, threads: int) -> None:
        self._model = Model(path)
        self._n_vocab = min(n_vocab, self._model.n_vocab)
        self._depth = depth
        self._eos = self._model.eos
        self._context = Context(
            self._model,
            slots=LINES + BRANCHES,
            slot_tokens=line_tokens + depth,
            rows=ROWS,
            threads=threads,
            unified=True,
            flash="auto",
            offload=True,
        )

    @property
    def description(self) -> str:
        return self._model.description

    def follow(self, lines: Sequence[Line], report: Report = lambda share: None) -> None:
        """Fills in `draft`, `signals` and `off` of every line. Lines of one prompt are best next to each other."""
        for first in range(0, len(lines), LINES):
            some = lines[first : first + LINES]
            self._context.clear()
            self._read(some)
            self._along(some)
            report((first + 0.4 * len(some)) / len(lines))
            branches = list(self._branches(some))
            for start in range(0, len(branches), BRANCHES):
                self._continue(branches[start : start + BRANCHES])
            report((first + len(some)) / len(lines))

    def close(self) -> None:
        self._model.close()

    # -- phase 2

    def _read(self, lines: Sequence[Line]) -> None:
        """All but the last token of each prompt. The prefix shared with the line before is copied."""
        held: list[int] = []
        for slot, line in enumerate(lines):
            tokens = line.prompt[:-1]
            common = common_prefix(held, tokens)
            if slot:
                self._context.copy(slot - 1, slot, common)
            for first in range(common, len(tokens), ROWS):
                self._context.add(slot, first, np.array(tokens[first : first + ROWS], np.int32), 0)
                self._context.decode()
            held = tokens

    def _along(self, lines: Sequence[Line]) -> None:
        """Proposal and statistics at every position."""
        room = ROWS
        asked: list[tuple[Line, int]] = []
        for slot, line in enumerate(lines):
            feed = np.array([line.prompt[-1], *line.text[:-1]], np.int32)
            start = len(line.prompt) - 1
            done = 0
            while done < len(feed):
                piece = feed[done : done + room]
                self._context.add(slot, start + done, piece, len(piece))
                asked += [(line, done + i) for i in range(len(piece))]
                done += len(piece)
                room -= len(piece)
                if room == 0:
                    self._take(asked)
                    asked, room = [], ROWS
        if asked:
            self._take(asked)

    def _take(self, asked: list[tuple[Line, int]]) -> None:
        logits = self._context.decode()
        for (line, position), row in zip(asked, logits, strict=True):
            token, values = self._choose(row, line.sampling, position)
            line.draft.append(token)
            line.signals.append(values)

    # -- phase 3

    def _branches(self, lines: Sequence[Line]) -> Iterator[_Branch]:
        for slot, line in enumerate(lines):
            for position, (token, proposal) in enumerate(zip(line.text, line.draft, strict=True)):
                if token != proposal:
                    yield _Branch(line, slot, position, over=proposal in self._eos)

    def _continue(self, branches: list[_Branch]) -> None:
        """Each branch to its end, `depth` tokens at most."""
        for slot, branch in enumerate(branches, LINES):
            self._context.copy(branch.slot, slot, len(branch.line.prompt) + branch.position)
        for _ in range(self._depth):
            going = [(slot, branch) for slot, branch in enumerate(branches, LINES) if not branch.over]
            if not going:
                break
            for slot, branch in going:
                self._context.add(slot, *_next_row(branch), 1)
            for (_, branch), row in zip(going, self._context.decode(), strict=True):
                position = branch.position + 1 + len(branch.tokens)
                token, values = self._choose(row, branch.line.sampling, position)
                branch.tokens.append(token)
                branch.signals.append(values)
                branch.over = token in self._eos
        for slot, branch in enumerate(branches, LINES):
            self._context.drop(slot)
            signals = np.array(branch.signals, np.float32).reshape(-1, len(COLUMNS))
            branch.line.off[branch.position] = OffPath(np.array(branch.tokens, np.int32), signals)

    def _choose(self, logits: Logits, sampling: Sampling, position: int) -> tuple[int, Logits]:
        row = logits[: self._n_vocab]
        token = target_token(row, sampling, position)
        return token, statistics(row, token, sampling, position)


def _next_row(branch: _Branch) -> tuple[int, Tokens]:
    """(place, token) of the row to evaluate next: the rejected proposal, or the last continuation."""
    last = branch.tokens[-1] if branch.tokens else branch.line.draft[branch.position]
    return len(branch.line.prompt) + branch.position + len(branch.tokens), np.array([last], np.int32)
