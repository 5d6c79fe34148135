"""A step of the target engine: slices in, results out.

A *slice* is one session's share of a step: tokens to feed at a place in a KV slot, of which the last `n_draft` are
draft tokens. This one shape covers a prefill chunk (`sample=False`), a decode (one token, `n_draft=0`), the
verification of a draft, and mixtures, such as the end of a prompt with a first draft behind it.

With `sample`, the engine chooses the target's own token (`core.protocol.sampling`) at each of the last `n_draft + 1`
rows. It accepts draft tokens while they agree and stops at the first that does not. The target's token there is the
correction; after a fully accepted draft it is the bonus token.
"""

from __future__ import annotations

import msgspec

from wisp.core.protocol.sampling import Sampling

ENGINE_ERROR = "engine_error"
NOT_FINITE = "logits_not_finite"
INVALID_GRAMMAR = "invalid_grammar"
NO_TOKEN = "the model computed a NaN or an infinity, from which no token can be chosen"  # and NOT_FINITE


class TopLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One alternative at a position. `logprob`: natural log, of the target before noise and truncation."""

    token: int
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The chosen token's log probability, and the `top` alternatives asked for (most likely first)."""

    token: int
    logprob: float
    top: list[TopLogprob] = []


class Slice(msgspec.Struct, frozen=True, array_like=True):
    """One session's share of a step.

    session:   opaque handle, echoed in the result
    slot:      KV slot to use, 0 <= slot < EngineInfo.slots
    start:     tokens of the slot to keep; those beyond are dropped before `tokens` are fed
    tokens:    at least one token id, at places start, start + 1, ...
    n_draft:   how many of the last `tokens` are draft tokens (0 <= n_draft < len(tokens))
    sample:    choose tokens at the last n_draft + 1 rows (False: prefill only)
    position:  index of the first chosen token among the session's generated tokens
    sampling:  parameters of the choice
    logprobs:  None, or how many alternatives to report with each chosen token (0 is allowed)
    past:      where `sampling` has constraints: the session's tokens before the first one to be chosen, from the first
               generated one on, or from the prompt's first on if its tokens count (`repetition_penalty`)
    after:     the step that chooses `tokens[0]`, its last token for this slot: a step before this one, which was not
               over when this one was planned. -1: `tokens` are all known
    """

    session: int
    slot: int
    start: int
    tokens: list[int]
    n_draft: int = 0
    sample: bool = True
    position: int = 0
    sampling: Sampling = Sampling()
    logprobs: int | None = None
    past: list[int] = []
    after: int = -1


class SliceResult(msgspec.Struct, frozen=True, array_like=True):
    """The result of a slice.

    accepted: how many draft tokens agreed with the target
    tokens:   the accepted draft tokens and one token more (correction or bonus); [] if `sample` was False
    logprobs: one entry per token of `tokens`, or [] if none were asked for
    error:    non-empty if this slice failed; its slot is then empty
    code:     of the error: ENGINE_ERROR may be retried, NOT_FINITE and INVALID_GRAMMAR would fail again

    The slot then holds start + len(slice.tokens) - n_draft + accepted tokens: all fed tokens that were not rejected.
    The last of `tokens` is not among them; the next slice feeds it.
    """

    session: int
    accepted: int = 0
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    error: str = ""
    code: str = ENGINE_ERROR


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Copy the KV of the first `tokens` tokens of slot `source` to slot `target`, in place of what that held.

    The copies of a step run in order and before its slices, since slices may shorten slots that copies read.
    """

    source: int
    target: int
    tokens: int


class Round(msgspec.Struct, frozen=True):
    """What a round took on its edge, in milliseconds.

    at_ms:     when its verdict was heard, since the session began
    draft_ms:  draft steps of the tokens that were sent. ahead: they ran while an earlier draft was in flight
    flight_ms: on the way there and back
    queue_ms, verify_ms: in the verifier's queue and engine
    steps:     draft steps since the round before, unused ones included
    price:     of a draft token, as of this verdict
    forced:    places, among the tokens that it committed, of draft tokens that a grammar left no choice for
    why:       why nothing was drafted ("": something was, or it was not its turn), a key of `edge.rounds.WHY`
    """

    at_ms: float
    draft_ms: float
    flight_ms: float
    queue_ms: float
    verify_ms: float
    drafted: int
    accepted: int
    steps: int = 0
    ahead: bool = False
    price: float = 0.0
    why: str = ""
    forced: list[int] = []


class Committed(msgspec.Struct, frozen=True):
    """New tokens of a session's output, in order.

    drafted, accepted: tokens of the answered draft, and how many agreed (0, 0 without a draft)
    from_draft:        the first so many of `tokens` came from the draft
    finish:            "" (goes on), "stop" (an end-of-sequence token, the last of `tokens`) or "length"
    round:             the round that committed them, where somebody asked to see rounds
    cached:            tokens of the prompt whose KV was there already
    """

    tokens: list[int]
    logprobs: list[TokenLogprob] = []
    drafted: int = 0
    accepted: int = 0
    from_draft: int = 0
    finish: str = ""
    round: Round | None = None
    cached: int = 0
