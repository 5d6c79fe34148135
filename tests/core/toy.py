"""A model of nothing: the next token is a hash of the tokens that the KV slot *really* holds.

So any mistake in the bookkeeping of slots, prefixes, rollbacks or copies changes the text, as it would with a
real model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from wisp.core.errors import EngineError
from wisp.core.protocol.edits import Edit, Tracker
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import NO_TOKEN, NOT_FINITE, Copy, Slice, SliceResult, TokenLogprob
from wisp.engines.constraining import SlotTrackers, constrained

N_VOCAB = 50
EOS = 49


def toy_token(context: Sequence[int], sampling: Sampling, position: int, edit: Edit | None = None) -> int:
    """The target's token after `context`. End of sequence only if 7 comes three times in four."""
    if edit is not None:
        token = toy_token(context, msgspec.structs.replace(sampling, constraints=None), position)
        return constrained(token, edit, sampling.seed, position, N_VOCAB)
    if list(context[-4:]).count(7) >= 3 and EOS not in sampling.barred(position):
        return EOS
    data = bytes(context[-6:]) + len(context).to_bytes(4, "little") + sampling.seed.to_bytes(8, "little")
    return hashlib.blake2b(data, digest_size=2).digest()[0] % (N_VOCAB - 1)


def toy_text(
    prompt: Sequence[int], sampling: Sampling, max_tokens: int, *, ignore_eos: bool = False
) -> list[int]:
    """The target alone, one token at a time."""
    out: list[int] = []
    while len(out) < max_tokens:
        context = [*prompt, *out]
        out.append(toy_token(context, sampling, len(out), edit_afresh(context, sampling, len(out))))
        if (out[-1] == EOS and not ignore_eos) or out[-1] in sampling.stops:
            break
    return out


def edit_afresh(context: Sequence[int], sampling: Sampling, position: int) -> Edit | None:
    """What constraints make of the place after `context`, by a tracker that has seen nothing else."""
    if sampling.constraints is None or not sampling.constraints.choosing:
        return None
    return next(Tracker(sampling, None).edits(context, position, ()))


class ToyEngine:
    """Runs slices and keeps each slot's tokens, as a KV cache would."""

    def __init__(self, slots: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.rows = 0  # tokens fed in all
        self.constraints = SlotTrackers()
        self.poison = -1  # a token whose weights are NaN
        self.failure = ""  # of the next step as a whole

    def copy(self, copy: Copy) -> None:
        assert len(self.held[copy.source]) >= copy.tokens
        self.held[copy.target] = self.held[copy.source][: copy.tokens]

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        assert len({s.slot for s in batch}) == len(batch)
        if self.failure:
            error, self.failure = self.failure, ""
            self.held = [[] for _ in self.held]
            raise EngineError(error)
        return [self._run(s) for s in batch]

    def _run(self, s: Slice) -> SliceResult:
        held = self.held[s.slot]
        assert s.start <= len(held), "the verifier believes in KV that is not there"
        assert 0 <= s.n_draft < len(s.tokens)
        self.rows += len(s.tokens)
        solid = len(s.tokens) - s.n_draft
        chain = held[: s.start] + s.tokens[:solid]
        if self.poison in chain:
            self.held[s.slot] = []
            return SliceResult(s.session, error=NO_TOKEN, code=NOT_FINITE)
        tokens: list[int] = []
        if s.sample:
            edits = self.constraints.edits(s)
            for i in range(s.n_draft + 1):
                edit = next(edits) if edits is not None else None
                tokens.append(toy_token(chain, s.sampling, s.position + i, edit))
                if i == s.n_draft or tokens[i] != s.tokens[solid + i]:
                    break
                chain.append(tokens[i])
        self.held[s.slot] = chain
        entries = [TokenLogprob(t, -float(t)) for t in tokens] if s.logprobs is not None else []
        return SliceResult(s.session, max(len(tokens) - 1, 0), tokens, entries)
