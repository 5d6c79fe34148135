"""Is exact mode exact for this model, on this machine? Random schedules against the reference decoder.

Several generations share a few slots the way sessions share a server: prompts fed in random chunks, drafts that are
right, wrong in the middle or absent, rollbacks, several slices a step, prefixes copied from slot to slot,
sessions evicted and resumed elsewhere, ended, and their slots used again. Every row of logits that a token was
chosen from is compared with the reference's, bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.kv import common_prefix
from wisp.engines.llama.context import Logits
from wisp.engines.llama.reference import reference_steps
from wisp.engines.llama.target import LlamaTarget, Mode


@dataclass
class Proof:
    """What was compared, and what was found.

    positions:  rows of logits compared (a position counts each time it is evaluated)
    differing:  of these, rows that are not equal in every bit
    largest:    largest difference of two logits
    wrong:      tokens that are not the reference's
    longest:    most tokens cached when a row was evaluated
    errors:     of slices that failed
    """

    positions: int = 0
    differing: int = 0
    largest: float = 0.0
    wrong: int = 0
    longest: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.positions > 0 and not (self.differing or self.wrong or self.errors)

    def compare(self, row: Logits, expected: Logits, cached: int) -> None:
        self.positions += 1
        self.longest = max(self.longest, cached)
        if not np.array_equal(row, expected):
            self.differing += 1
            self.largest = max(self.largest, float(np.abs(row - expected).max()))


@dataclass
class _Session:
    """One generation: its prompt, and what the reference says comes after it."""

    sampling: Sampling
    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    done: int = 0  # tokens generated so far
    slot: int = -1
    held: int = 0

    @property
    def known(self) -> list[int]:
        return self.prompt + self.answer[: self.done]


def prove_exact(
    model_path: str | Path,
    *,
    sessions: int = 6,
    prompt_tokens: tuple[int, int] = (2, 40),
    new_tokens: int = 24,
    slots: int = 3,
    threads: Sequence[int] = (1, 2),
    seed: int = 0,
    mode: Mode = "exact",
) -> Proof:
    """Runs the schedules, once for each number of `threads`; the reference runs once, on one thread.

    Prompts are random ids, of `prompt_tokens` (least, most) tokens; some begin like the one before. Evaluates about
    2 * sessions * (prompt + new) rows for the reference and 2 to 4 times `sessions * (prompt + new)` for each entry of
    `threads`. Raises ModelError, EngineError.
    """
    rng = random.Random(seed)
    plans = _plan(model_path, rng, sessions, prompt_tokens, new_tokens)
    proof = Proof()
    for count in threads:
        engine = LlamaTarget(
            model_path,
            mode=mode,
            slots=slots,
            slot_tokens=prompt_tokens[1] + new_tokens + 8,
            threads=count,
        )
        try:
            for plan in plans:
                plan.done, plan.held, plan.slot = 0, 0, -1
            _Schedule(engine, list(plans), rng, proof).run()
        finally:
            engine.close()
    return proof


def check_build(model_path: str | Path) -> str:
    """The quick version, for `wisp doctor`: what is wrong with this build of llama.cpp, or "".

    Two slots with rollbacks and a copied prefix agree with token-by-token decoding (see `selfcheck`). Takes under a
    second with a tiny model. Raises ModelError, EngineError.
    """
    engine = LlamaTarget(model_path, slots=2, slot_tokens=64)
    engine.close()
    return "; ".join(engine.info.notes)


def _plan(
    path: str | Path, rng: random.Random, sessions: int, prompt_tokens: tuple[int, int], new_tokens: int
) -> list[_Session]:
    from wisp.engines.llama.model import Model

    model = Model(path, vocab_only=True)
    n_vocab = model.n_vocab
    model.close()
    plans: list[_Session] = []
    for number in range(sessions):
        prompt = [rng.randrange(n_vocab) for _ in range(rng.randint(*prompt_tokens))]
        if plans and rng.random() < 0.6:
            shared = plans[-1].prompt[: rng.randint(1, len(plans[-1].prompt))]
            prompt[: len(shared)] = shared[: len(prompt)]
        sampling = Sampling() if number % 3 == 0 else Sampling(temperature=1.0, top_p=0.95, seed=number)
        plan = _Session(sampling, prompt)
        steps = reference_steps(path, prompt, sampling)
        for _, step in zip(range(new_tokens), steps, strict=False):
            plan.answer.append(step.token)
            plan.logits.append(step.logits)
        del steps  # frees the reference's model
        plans.append(plan)
    return plans


class _Schedule:
    """Drives one engine through all sessions, choosing at random what each step does."""

    def __init__(
        self, engine: LlamaTarget, sessions: list[_Session], rng: random.Random, proof: Proof
    ) -> None:
        self._engine, self._rng, self._proof = engine, rng, proof
        self._waiting = sessions
        self._free = list(range(engine.info.slots))
        self._active: list[_Session] = []

    def run(self) -> None:
        while self._waiting or self._active:
            while self._waiting and self._free:
                self._place(self._waiting.pop(0))
            chosen = [s for s in self._active if self._rng.random() < 0.7] or self._active[:1]
            work = [self._slice(session) for session in chosen]
            results, logits = self._engine.observe(work)
            for session, item, result in zip(chosen, work, results, strict=True):
                rows = {place: row for (slot, place), row in logits.items() if slot == item.slot}
                self._commit(session, item, result, rows)
                if session.done >= len(session.answer):
                    self._leave(session)
                elif self._rng.random() < 0.06:  # evicted: it will start again, in any slot
                    self._leave(session)
                    self._waiting.append(session)

    def _place(self, session: _Session) -> None:
        session.slot = self._free.pop(self._rng.randrange(len(self._free)))
        session.held = 0
        self._active.append(session)

    def _leave(self, session: _Session) -> None:
        self._active.remove(session)
        self._free.append(session.slot)

    def _slice(self, session: _Session) -> Slice:
        rng, known = self._rng, session.known
        start = session.held
        if start == 0:
            start = self._copy_prefix(session)
        elif rng.random() < 0.15:
            start -= rng.randint(0, min(6, start))
        start = min(start, len(known) - 1)
        feed = known[start:]
        if len(feed) > 1 and rng.random() < 0.5:
            chunk = feed[: rng.randint(1, min(20, len(feed) - 1))]
            return Slice(0, session.slot, start, chunk, sample=False)
        # All that is known, or up to an earlier position once more, and a draft.
        again = rng.randint(0, min(3, session.done, len(feed) - 1))
        position = session.done - again
        feed = feed[: len(feed) - again]
        draft = session.answer[position : position + rng.choice((0, 0, 1, 2, 3, 5, 6, 7, 8, 12))]
        if draft and rng.random() < 0.5:
            draft[rng.randrange(len(draft))] = rng.randrange(self._engine.info.n_vocab)
        return Slice(0, session.slot, start, feed + draft, len(draft), True, position, session.sampling)

    def _copy_prefix(self, session: _Session) -> int:
        """Copies a prefix from an active session that begins alike; returns its tokens, or 0."""
        for other in self._active:
            if other is not session and other.held:
                common = common_prefix(other.known[: other.held], session.known)
                if common:
                    tokens = self._rng.randint(1, common)
                    self._engine.copy(Copy(other.slot, session.slot, tokens))
                    return tokens
        return 0

    def _commit(self, session: _Session, item: Slice, result: SliceResult, rows: dict[int, Logits]) -> None:
        if result.error:
            self._proof.errors.append(result.error)
            session.held = 0
            return
        session.held = item.start + len(item.tokens) - item.n_draft + result.accepted
        expected = session.answer[item.position :][: len(result.tokens)]
        self._proof.wrong += sum(a != b for a, b in zip(result.tokens, expected, strict=False))
        for place, row in rows.items():
            position = place - (len(session.prompt) - 1)
            if position < len(session.logits):
                self._proof.compare(row, session.logits[position], place)
        if item.sample:
            session.done = min(len(session.answer), max(session.done, item.position + len(result.tokens)))
