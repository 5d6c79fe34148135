"""A target without weights whose every token depends on all that its slot really holds, and drafters for it.

So any slip in the bookkeeping of slots, prefixes, rollbacks or copies changes the text, as it would with a real model.
`salt` stands for the weights: targets of another salt write other texts, and have another digest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from wisp.core.draft.signals import Signal
from wisp.core.errors import EngineDeadError, EngineError
from wisp.core.protocol.edits import Edit, Tracker
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import NO_TOKEN, NOT_FINITE, Copy, Slice, SliceResult, TokenLogprob
from wisp.engines.base import EngineInfo, Proposal, StepQueue
from wisp.engines.constraining import SlotTrackers, constrained
from wisp.engines.identity import engine_digest
from wisp.engines.in_order import OneAtATime
from wisp.engines.plain import NumberTokenizer

N_VOCAB = 256
EOS = 255
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def begun(salt: int) -> int:
    """The state of a target of these weights that has read nothing."""
    return (salt + 1) * _GOLDEN & _MASK


def read(state: int, token: int) -> int:
    """The state once it has read `token`, too."""
    state = (state ^ token) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ state >> 29


def says(state: int, sampling: Sampling, position: int, edit: Edit | None = None) -> int:
    """The target's token in this state, at generated `position`. One in fifty ends the text."""
    mixed = (state ^ sampling.seed * _GOLDEN) * 0x94D049BB133111EB & _MASK
    mixed ^= mixed >> 31
    token = EOS if mixed % 50 == 0 else (mixed >> 8) % EOS
    if edit is not None:
        return constrained(token, edit, sampling.seed, position, N_VOCAB)
    if position < sampling.min_tokens and token in sampling.barred(position):
        return (mixed >> 8) % EOS
    return token


def edit_afresh(context: Sequence[int], sampling: Sampling, position: int) -> Edit | None:
    """What constraints make of the place after `context`, by a tracker that has seen nothing else."""
    if sampling.constraints is None or not sampling.constraints.choosing:
        return None
    return next(Tracker(sampling, None).edits(list(context), position, ()))


class Text:
    """The target alone: the text of a prompt, one token at a time, written as far as it is asked for."""

    def __init__(
        self, salt: int, prompt: Sequence[int], sampling: Sampling, most: int, *, ignore_eos: bool
    ) -> None:
        self.prompt, self.most = list(prompt), most
        self._sampling = sampling.ending(() if ignore_eos else (EOS,))
        self._ends = {*(() if ignore_eos else (EOS,)), *sampling.stops}
        self.tokens: list[int] = []
        self.whole = False
        self._state = begun(salt)
        for token in prompt:
            self._state = read(self._state, token)

    def upto(self, n: int) -> list[int]:
        """At least its first `n` tokens, or all there are."""
        while len(self.tokens) < n and not self.whole:
            position = len(self.tokens)
            edit = edit_afresh([*self.prompt, *self.tokens], self._sampling, position)
            token = says(self._state, self._sampling, position, edit)
            self.tokens.append(token)
            self._state = read(self._state, token)
            self.whole = token in self._ends or len(self.tokens) == self.most
        return self.tokens

    @property
    def finish(self) -> str:
        """Why it ends, once it is whole."""
        return "stop" if self.tokens[-1] in self._ends else "length"


class InjectedError(EngineError):
    """A failure made for testing, which the log need not explain."""

    injected = True


class InjectedDeath(EngineDeadError):
    """The same, for good."""

    injected = True


class HashTarget:
    """TargetEngine. `failing`: faults of the next steps."""

    def __init__(self, salt: int, slots: int, slot_tokens: int, kv_tokens: int, step_tokens: int) -> None:
        self.salt = salt
        self.constraints = SlotTrackers()
        self._info = EngineInfo(
            engine="hash",
            model="hash",
            mode="exact",
            n_vocab=N_VOCAB,
            eos=frozenset({EOS}),
            slots=slots,
            slot_tokens=slot_tokens,
            kv_tokens=kv_tokens,
            step_tokens=step_tokens,
            digest=digest_of(salt),
        )
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._states: list[list[int]] = [[begun(salt)] for _ in range(slots)]  # after each token held
        self.failing: list[str] = []
        self.closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    def copy(self, copy: Copy) -> None:
        if len(self.held[copy.source]) < copy.tokens:
            raise EngineError(f"slot {copy.source} does not hold {copy.tokens} tokens")
        self.held[copy.target] = self.held[copy.source][: copy.tokens]
        self._states[copy.target] = self._states[copy.source][: copy.tokens + 1]

    def queue(self, depth: int) -> StepQueue:
        return OneAtATime(self, depth)

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        if len({s.slot for s in batch}) != len(batch):
            raise EngineError("two slices of one batch use the same slot")
        failing = self.failing.pop(0) if self.failing else ""
        if failing == "step":
            for slot in range(len(self.held)):
                self._empty(slot)
            raise InjectedError("a failure made for testing")
        if failing == "dead":
            raise InjectedDeath("a death made for testing")
        results = [self._run(s) for s in batch]
        if failing in ("slice", "nan"):
            first = batch[0]
            self._empty(first.slot)
            results[0] = (
                SliceResult(first.session, error=NO_TOKEN, code=NOT_FINITE)
                if failing == "nan"
                else SliceResult(first.session, error="a failure made for testing")
            )
        return results

    def close(self) -> None:
        self.closed = True

    def _empty(self, slot: int) -> None:
        self.held[slot] = []
        del self._states[slot][1:]

    def _run(self, s: Slice) -> SliceResult:
        held, states = self.held[s.slot], self._states[s.slot]
        if not 0 <= s.start <= len(held):
            raise EngineError(f"slot {s.slot} holds {len(held)} tokens, not {s.start}")
        if s.start + len(s.tokens) > self._info.slot_tokens:
            raise EngineError(f"{s.start + len(s.tokens)} tokens do not fit into a slot")
        solid = len(s.tokens) - s.n_draft
        del held[s.start :], states[s.start + 1 :]
        state = states[-1]
        for token in s.tokens[:solid]:
            state = read(state, token)
            held.append(token)
            states.append(state)
        tokens: list[int] = []
        if s.sample:
            edits = self.constraints.edits(s)
            for i in range(s.n_draft + 1):
                token = says(state, s.sampling, s.position + i, next(edits) if edits is not None else None)
                tokens.append(token)
                if i == s.n_draft or token != s.tokens[solid + i]:
                    break
                state = read(state, token)
                held.append(token)
                states.append(state)
        entries = [TokenLogprob(t, -float(t)) for t in tokens] if s.logprobs is not None else []
        return SliceResult(s.session, max(len(tokens) - 1, 0), tokens, entries)


def digest_of(salt: int) -> str:
    """The digest of a target of these weights."""
    return engine_digest("hash", salt=salt)


def tokenizer() -> NumberTokenizer:
    """That of all hash targets."""
    return _TOKENIZER


_TOKENIZER = NumberTokenizer(N_VOCAB, frozenset({EOS}))


class HashDraft:
    """DraftEngine that knows the target, and is right so often. `broken`: calls that fail from now on."""

    name = "hash"

    def __init__(self, salt: int, right: float, rng: random.Random) -> None:
        self._salt, self._right, self._rng = salt, right, rng
        self.broken = 0

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        if self.broken:
            self.broken -= 1
            raise InjectedError("a drafter that fails for testing")
        chance = self._rng.random()
        if chance < 0.02:
            return None
        state = begun(self._salt)
        for token in context:
            state = read(state, token)
        right, guess = says(state, sampling, position, edit), self._rng.randrange(N_VOCAB)
        if chance > self._right:
            return Proposal(guess, Signal(confidence=0.4), other=right if guess % 2 else None)
        return Proposal(right, Signal(confidence=0.9), other=guess)

    def forget(self, session: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""
