"""The text of the target alone, and the comparison of a session's output with it.

The reference (`engines.llama.reference`) decodes one sequence, one token at a time, once per prompt and sampling;
cases with the same prompt and sampling share it. In exact mode only equality passes. In fast mode kernels round
differently from batch to batch, so the first token that differs counts as a *tie* where noise no larger than the
engine's measured `flip_gap` could have chosen it, and as a mismatch otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from wisp.api.text import TextStream
from wisp.core.protocol.sampling import FloatArray, Sampling, gumbels
from wisp.core.protocol.slo import Slo
from wisp.engines.constraining import Compiler
from wisp.engines.llama.reference import edit_afresh, reference_steps, reference_tokens

_OUT = -1e9  # instead of minus infinity, with which there is no reckoning


class Case(msgspec.Struct, frozen=True):
    """One generation to be compared with the reference.

    drafter:   e.g. "model", "wrong", or "serve" (the verifier decodes by itself)
    drafting:  the drafting policy
    script:    the reference's tokens from position 0 on, beyond `max_tokens` where it goes on
    constraint: its name, "" without
    after:     start once the case of that number has ended (its next turn), -1: at any time
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    script: list[int]
    constraint: str = ""
    drafter: str = "model"
    drafting: str = "fixed:4"
    batching: str = "continuous"
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    after: int = -1
    slo: Slo | None = None


class Outcome(msgspec.Struct, frozen=True):
    """The output of a session. `whole` is False if its user cancelled it; `problem`: why it failed."""

    tokens: list[int]
    finish: str
    text: str
    whole: bool = True
    problem: str = ""


class Finding(msgspec.Struct, frozen=True):
    """A difference. `gap`: how far, in logits, noise would have had to move the reference (inf: no token)."""

    case: int
    what: str
    position: int = -1
    expected: int = -1
    got: int = -1
    gap: float = float("inf")
    tie: bool = False


class Reference:
    """The target alone. Answers are cached by (prompt, sampling, ignore_eos)."""

    def __init__(
        self,
        path: Path,
        eos: frozenset[int],
        *,
        exact: bool,
        length: int,
        threads: int,
        grammars: Compiler | None = None,
    ) -> None:
        """`length`: tokens to decode for each prompt, unless a sequence ends before."""
        self.grammars = grammars
        self.path, self.eos, self.exact, self.length, self.threads = path, eos, exact, length, threads
        self._known: dict[tuple[tuple[int, ...], Sampling, bool], list[int]] = {}

    def prepare(self, sampling: Sampling) -> None:
        """Compile its grammar, which is followed afresh at each position."""
        if self.grammars is not None and sampling.constraints is not None and sampling.constraints.grammar:
            self.grammars.compile(sampling.constraints.grammar)

    def tokens(self, prompt: Sequence[int], sampling: Sampling, *, ignore_eos: bool = False) -> list[int]:
        """Up to `length` tokens, the last an end of sequence if there is one (unless ignored)."""
        key = (tuple(prompt), sampling, ignore_eos)
        if key not in self._known:
            eos = (frozenset[int]() if ignore_eos else self.eos) | frozenset(sampling.stops)
            self._known[key] = reference_tokens(
                self.path,
                prompt,
                sampling,
                self.length,
                eos,
                exact=self.exact,
                threads=self.threads,
                matchers=self.grammars,
            )
        return self._known[key]

    def logits(self, prompt: Sequence[int], sampling: Sampling, position: int) -> FloatArray:
        """Of one generated position, after constraints. Decodes everything before it once more: for reports, not for
        loops."""
        options = {"exact": self.exact, "threads": self.threads, "matchers": self.grammars}
        steps = reference_steps(self.path, prompt, sampling, **options)  # type: ignore[arg-type]
        said = list(islice(steps, position + 1))
        steps.close()  # type: ignore[attr-defined]
        before = [*prompt, *(step.token for step in said[:-1])]
        edit = edit_afresh(sampling, self.grammars, before, position)
        if edit is None:
            return said[-1].logits
        return np.maximum(edit.apply(said[-1].logits), _OUT)


class Judge:
    """Compares outcomes with the reference."""

    def __init__(self, reference: Reference, piece: Callable[[int], bytes], flip_gap: float) -> None:
        self.reference, self.piece, self.flip_gap = reference, piece, flip_gap

    def expected(self, case: Case) -> Outcome:
        """The reference's tokens, cut by end of sequence, `max_tokens` and stop strings, as a server would."""
        tokens = case.script[: case.max_tokens]
        ended = bool(tokens) and (
            (tokens[-1] in self.reference.eos and not case.ignore_eos) or tokens[-1] in case.sampling.stops
        )
        stream = TextStream(self.piece, case.stop)
        for token in tokens:
            if stream.push(token):
                break
        stopped = stream.stopped
        stream.end()
        finish = "stop" if ended or stopped else "length"
        return Outcome(tokens[: stream.tokens], finish, stream.take())

    def compare(self, case: Case, outcome: Outcome) -> Finding | None:
        """The difference from the reference, or None."""
        if outcome.problem:
            return Finding(case.number, outcome.problem)
        expected = self.expected(case)
        for i, (want, got) in enumerate(zip(expected.tokens, outcome.tokens, strict=False)):
            if want != got:
                return self._differing(case, i, want, got)
        n, most = len(outcome.tokens), len(expected.tokens)
        if n > most or (outcome.whole and n < most):
            return Finding(case.number, f"{n} tokens instead of {most}", min(n, most))
        if not outcome.whole:
            return None
        if outcome.finish != expected.finish:
            return Finding(case.number, f"finished by {outcome.finish!r} instead of {expected.finish!r}", n)
        if outcome.text != expected.text:
            return Finding(case.number, f"text ends {outcome.text[-20:]!r}, not {expected.text[-20:]!r}", n)
        return None

    def _differing(self, case: Case, position: int, want: int, got: int) -> Finding:
        logits = self.reference.logits(case.prompt, case.sampling, position)
        gap = flip_distance(logits, case.sampling, position, got)
        tie = gap <= self.flip_gap
        return Finding(case.number, "another token", position, want, got, gap, tie)


def flip_distance(logits: FloatArray, sampling: Sampling, position: int, token: int) -> float:
    """How far logits would have to move against each other for `token` to be chosen at `position`.

    Every rival with a better score (seeded noise included) must be caught up with, or fall out of the nucleus;
    and the token itself must be in it. Covers temperature and top-p, which is what cases use.
    """
    z = logits.astype(np.float64)
    if sampling.greedy:
        return float(z.max() - z[token])
    scores = z + sampling.temperature * gumbels(sampling.seed, position, np.arange(z.size))
    margin = sampling.temperature * _nucleus_margin(z / sampling.temperature, sampling.top_p)
    rivals = np.minimum(np.maximum(scores - scores[token], 0.0), np.maximum(margin, 0.0))
    rivals[token] = 0.0
    return max(float(rivals.max()), -float(margin[token]), 0.0)


def _nucleus_margin(z: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.float64]:
    """For each id, how clearly it is in the nucleus (positive) or out of it, in log-odds.

    An id is in if the likelier ones weigh less than top_p. Moving logits by d against each other moves
    the log-odds of a weight by d at most.
    """
    margin = np.full(z.size, np.inf)
    if top_p >= 1.0:
        return margin
    weights = np.exp(z - z.max())
    order = np.lexsort((np.arange(z.size), -z))
    before = np.cumsum(weights[order]) - weights[order]
    share = np.clip(before / weights.sum(), 0.0, 1.0 - 1e-12)
    with np.errstate(divide="ignore"):
        margin[order] = np.log(top_p / (1.0 - top_p)) - np.log(share / (1.0 - share))
    return margin
