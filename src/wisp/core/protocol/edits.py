"""Constraints applied to logits, position by position along a draft.

`Tracker` belongs to one session. It keeps what the constraints count, and a grammar's state, in step with the tokens
that it is given: those it has seen and are there no longer are rolled back, the others are added. So it can be asked
about any history, and one that was lost is made again from the committed tokens.

`Edit` is the answer for one position: a few arrays, which `apply` carries out on logits. `engines.vllm.editing` does
the same to many rows at once on their device.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wisp.core.protocol.constraints import Grammar
from wisp.core.protocol.reasoning import ReasoningEnd
from wisp.core.protocol.sampling import FloatArray, Sampling

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint32]  # bit i % 32 of word i // 32: may id i be chosen? Ids beyond may not


class Matcher(Protocol):
    """The state of a grammar along a text."""

    def masks(self, before: Sequence[int], draft: Sequence[int]) -> list[Bits]:
        """Masks for the places after `before`, after `before + draft[:1]`, and so on: at least one, and none beyond
        the first draft token that the grammar does not allow. `before` may be any tokens. Raises GrammarError."""
        ...


class Matchers(Protocol):
    """Where matchers come from."""

    def matcher(self, grammar: Grammar) -> Matcher:
        """A fresh one. Raises GrammarError for a grammar that cannot be compiled."""
        ...

    def end(self, after: tuple[int, ...]) -> ReasoningEnd:
        """That of the reasoning before a grammar."""
        ...


class Edit(NamedTuple):
    """What constraints make of the logits of one position. Empty fields do nothing.

    mask, allowed:      only these may be chosen
    banned, early:      these may not: the end of a banned sequence, and what goes beyond the end of the reasoning; an
                        end of the text before `min_tokens`
    biased, biases:     ids, and what is added to each
    repeated, factor:   ids whose score is divided by `factor` if positive, else multiplied
    counted, penalties: ids, and what is subtracted from each
    """

    mask: Bits | None = None
    allowed: Ids | None = None
    banned: Ids | None = None
    early: Ids | None = None
    biased: Ids | None = None
    biases: Values | None = None
    repeated: Ids | None = None
    factor: float = 1.0
    counted: Ids | None = None
    penalties: Values | None = None

    def keeps(self, size: int) -> npt.NDArray[np.bool_]:
        """[size]: may each id be chosen? A restriction that would leave none is passed over."""
        keep = np.ones(size, np.bool_)
        for restriction in self._restrictions(size):
            left = keep & restriction
            if left.any():
                keep = left
        return keep

    def packed(self, size: int) -> Bits | None:
        """`keeps` as bits, zeros beyond `size`; None if nothing is restricted."""
        if self.mask is None and self.allowed is None and self.banned is None and self.early is None:
            return None
        bits = np.zeros((size + 31) // 32, np.uint32)
        some = np.packbits(self.keeps(size), bitorder="little")
        bits.view(np.uint8)[: some.size] = some
        return bits

    def _restrictions(self, size: int) -> Iterator[npt.NDArray[np.bool_]]:
        if self.mask is not None:
            bits = np.unpackbits(
                self.mask.view(np.uint8), bitorder="little", count=size
            )  # zeros beyond its end
            yield bits.view(np.bool_)
        if self.allowed is not None:
            yield _marked(size, self.allowed)
        if self.banned is not None:
            yield ~_marked(size, self.banned)
        if self.early is not None:
            yield ~_marked(size, self.early)

    def forced(self) -> int | None:
        """The only id that may be chosen, if there is just one."""
        if self.mask is not None:
            size = 32 * self.mask.size
        elif self.allowed is not None:
            size = int(self.allowed.max()) + 1
        else:
            return None
        keep = self.keeps(size)
        return int(np.argmax(keep)) if np.count_nonzero(keep) == 1 else None

    def allows(self, token: int) -> bool:
        """May it be chosen, as far as one id alone tells?"""
        mask, allowed = self.mask, self.allowed
        if mask is not None and not (token < 32 * mask.size and int(mask[token // 32]) >> (token % 32) & 1):
            return False
        if allowed is not None and token not in allowed:
            return False
        return not any(ids is not None and token in ids for ids in (self.banned, self.early))

    def apply(self, logits: FloatArray) -> Scores:
        """The scores [vocabulary] that the target's choice is made by. `logits` stay as they are.

        Each operation is in float64, its result rounded to float32.
        """
        scores = logits.astype(np.float32)
        size = scores.size
        scores[~self.keeps(size)] = -np.inf
        if self.biased is not None and self.biases is not None:
            known = self.biased < size  # a drafter may have fewer ids
            scores[self.biased[known]] += self.biases[known]
        if self.repeated is not None:
            ids = self.repeated[self.repeated < size]
            some = scores[ids].astype(np.float64)
            scores[ids] = np.where(some > 0.0, some / self.factor, some * self.factor)
        if self.counted is not None and self.penalties is not None:
            known = self.counted < size
            scores[self.counted[known]] -= self.penalties[known]
        return scores


def _marked(size: int, ids: Ids) -> npt.NDArray[np.bool_]:
    marks = np.zeros(size, np.bool_)
    marks[ids[ids < size]] = True
    return marks


class Tracker:
    """The constraints of one session. `matchers` None: its grammar is left out, as a drafter may."""

    def __init__(self, sampling: Sampling, matchers: Matchers | None) -> None:
        """Raises GrammarError."""
        constraints = sampling.constraints
        assert constraints is not None
        self.sampling = sampling
        self._constraints = constraints
        self._grammar = constraints.grammar if matchers is not None else None
        self._matcher = matchers.matcher(self._grammar) if matchers is not None and self._grammar else None
        self._banned: dict[int, dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for sequence in constraints.banned:
            self._banned[len(sequence) - 1][sequence[:-1]].append(sequence[-1])
        allowed, biases = constraints.allowed, constraints.logit_bias
        self._fixed = Edit(
            allowed=_ids(allowed) if allowed is not None else None,
            biased=_ids([token for token, _ in biases]) if biases else None,
            biases=np.array([bias for _, bias in biases], np.float64) if biases else None,
        )
        self._prompt: list[int] = []
        self._in_prompt = frozenset[int]()
        self._output: list[int] = []
        self._counts: Counter[int] = Counter()  # of the output
        self._end: ReasoningEnd | None = None
        if matchers is not None and self._grammar is not None and self._grammar.after:
            self._end = matchers.end(self._grammar.after)
        self._begin = None if self._end else 0  # tokens of the output before the grammar; None: not yet

    def edits(self, past: Sequence[int], position: int, draft: Sequence[int]) -> Iterator[Edit]:
        """One for each place after `past`, after `past + draft[:1]`, and so on; none beyond the first draft token that
        the grammar does not allow.

        past: the tokens so far: prompt (where anything asks for it) and all `position` generated ones.
        Raises GrammarError where the grammar takes more work than is allowed.
        """
        begun = len(past) - position
        self._sync(past[:begun], past[begun:])
        masks = self._masks(draft)
        for i in range(len(draft) + 1):
            if i:
                self._add(draft[i - 1])
            if i < masks.without:
                yield self._edit(None)
            elif i - masks.without < len(masks.bits):
                yield self._edit(masks.bits[i - masks.without])
            else:
                return

    def _masks(self, draft: Sequence[int]) -> _Masks:
        """The grammar's masks along a draft, in which the reasoning may end."""
        n, both = len(self._output), [*self._output, *draft]
        begin = self._begin
        if begin is None and self._end is not None:
            begin = next((i for i in range(n + 1, len(both) + 1) if self._end.reached(both, i)), None)
        if self._matcher is None or begin is None:
            return _Masks(len(draft) + 1, [])
        without = max(0, begin - n)
        masks = self._matcher.masks(both[begin : n + without], both[n + without :])
        return _Masks(without, masks)

    def _edit(self, mask: Bits | None) -> Edit:
        constraints, output = self._constraints, self._output
        early = self.sampling.barred(len(output))
        banned = [token for size in self._banned if size <= len(output) for token in self._banned_after(size)]
        if self._begin is None and self._end is not None:
            banned += self._end.barred(output)
        edit = self._fixed._replace(
            mask=mask, banned=_ids(banned) if banned else None, early=_ids(early) if early else None
        )
        if constraints.repetition_penalty != 1.0:
            seen = self._in_prompt | self._counts.keys()
            edit = edit._replace(repeated=_ids(seen), factor=constraints.repetition_penalty)
        if constraints.frequency_penalty or constraints.presence_penalty:
            counts = np.fromiter(self._counts.values(), np.float64, len(self._counts))
            penalties = constraints.frequency_penalty * counts + constraints.presence_penalty
            edit = edit._replace(counted=_ids(self._counts.keys()), penalties=penalties)
        return edit

    def _banned_after(self, size: int) -> list[int]:
        output = self._output
        return self._banned[size].get(tuple(output[len(output) - size :]), [])

    # -- keeping in step

    def _sync(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        if self._prompt != prompt:
            self._prompt, self._in_prompt = list(prompt), frozenset(prompt)
        mine = self._output
        keep = min(len(mine), len(output))
        if mine[:keep] != output[:keep]:
            keep = next(i for i in range(keep) if mine[i] != output[i])
        while len(mine) > keep:
            self._remove(mine.pop())
        for token in output[keep:]:
            self._add(token)

    def _add(self, token: int) -> None:
        self._output.append(token)
        self._counts[token] += 1
        if (
            self._begin is None
            and self._end is not None
            and self._end.reached(self._output, len(self._output))
        ):
            self._begin = len(self._output)

    def _remove(self, token: int) -> None:
        if self._end is not None and self._begin is not None and self._begin > len(self._output):
            self._begin = None
        self._counts[token] -= 1
        if not self._counts[token]:
            del self._counts[token]


class _Masks(NamedTuple):
    """`without`: the first so many positions have no mask; those after them have `bits`, as far as these reach."""

    without: int
    bits: list[Bits]


def _ids(tokens: Iterable[int]) -> Ids:
    return np.fromiter(tokens, np.int64)
