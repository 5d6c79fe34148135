"""What a verifier takes from an edge: the limits of an Open, of a Draft, and of token ids in any message."""

from __future__ import annotations

from wisp.core.errors import ProtocolError
from wisp.core.protocol.messages import MAX_BRANCHES, Draft, Open, check_digest
from wisp.core.protocol.slo import LONGEST_MS
from wisp.core.verify.events import Limits


def check_open(limits: Limits, o: Open) -> None:
    """Raises ProtocolError for an Open that this verifier cannot serve. Changes nothing."""
    check_digest(o, limits.digest)
    if not o.prompt:
        raise ProtocolError("malformed", "the prompt is empty")
    if len(o.prompt) + 1 > limits.slot_tokens:
        message = f"the prompt has {len(o.prompt)} tokens; the context is {limits.slot_tokens}"
        raise ProtocolError("context_length_exceeded", message)
    if not 1 <= o.max_tokens <= limits.slot_tokens - len(o.prompt):
        most = limits.slot_tokens - len(o.prompt)
        raise ProtocolError("context_length_exceeded", f"max_tokens must be between 1 and {most} here")
    if len(o.committed) >= o.max_tokens or (o.logprobs is not None and not 0 <= o.logprobs <= 20):
        raise ProtocolError("malformed", "committed must be shorter than max_tokens, logprobs at most 20")
    ended = not o.ignore_eos and not limits.eos.isdisjoint(o.committed)
    if ended or not set(o.sampling.stops).isdisjoint(o.committed):
        raise ProtocolError("malformed", "committed contains an end of sequence: that session is over")
    if o.slo is not None and not (0.0 <= o.slo.ttft_ms <= LONGEST_MS and 0.0 <= o.slo.tpot_ms <= LONGEST_MS):
        raise ProtocolError(
            "malformed", f"an SLO's targets are up to {LONGEST_MS:.0e} milliseconds, 0 for none"
        )
    if problem := o.sampling.problem():
        raise ProtocolError("malformed", f"{problem[0]} {problem[1]}")
    if o.sampling.constraints is not None and max(o.sampling.constraints.ids(), default=0) >= limits.n_vocab:
        message = f"a constraint names ids outside this model's vocabulary of {limits.n_vocab}"
        raise ProtocolError("out_of_vocabulary", message)
    check_tokens(limits, "prompt", o.prompt, limits.slot_tokens)
    check_tokens(limits, "committed", o.committed, limits.slot_tokens)
    check_tokens(limits, "draft", o.draft, limits.max_draft)


def check_draft(limits: Limits, draft: Draft) -> None:
    """Raises ProtocolError for a draft, or branches of it, that this verifier does not take."""
    check_tokens(limits, "draft", draft.tokens, limits.max_draft)
    if len(draft.branches) > MAX_BRANCHES:
        message = f"a draft has {len(draft.branches)} branches; at most {MAX_BRANCHES} are taken"
        raise ProtocolError("oversized", message)
    for branch in draft.branches:
        if not 0 <= branch.accepted <= len(draft.tokens):
            n = len(draft.tokens)
            raise ProtocolError(
                "malformed", f"a branch begins behind token {branch.accepted} of a draft of {n} tokens"
            )
        check_tokens(limits, "a branch", [branch.token, *branch.tokens], limits.max_draft)


def check_tokens(limits: Limits, what: str, tokens: list[int], most: int) -> None:
    """Raises ProtocolError if there are more than `most`, or if one is outside the vocabulary."""
    if len(tokens) > most:
        raise ProtocolError("oversized", f"{what} has {len(tokens)} tokens; at most {most} are taken")
    if tokens and not (min(tokens) >= 0 and max(tokens) < limits.n_vocab):
        message = f"{what} has ids outside this model's vocabulary of {limits.n_vocab}"
        raise ProtocolError("out_of_vocabulary", message)
