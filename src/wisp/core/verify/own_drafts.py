"""Drafts of the verifier's own, for sessions that have none: what followed the same words in an earlier text.

They come from the history of API key and salt (`core.history`). A session gets one where its edge cannot draft, has
nothing to propose, or is not there in time. A wrong one costs its rows, and changes no text.

How likely a token is to be accepted is learnt by the length of the match, for each history. Tokens are proposed while
the chance that all of them are accepted exceeds the congestion price: what a row costs others, in tokens. So where rows
are dear, or texts do not repeat, little or nothing is proposed. With two steps in flight, a session with a draft cannot
be decoded ahead: its draft must be expected to gain more than that loses (`InFlight.loss`).
"""

from __future__ import annotations

from collections.abc import Mapping

from wisp.core.history import Histories
from wisp.core.verify.admission import KeyLimits
from wisp.core.verify.batching import BatchingPolicy
from wisp.core.verify.batching.simple import FOR_PROMPTS
from wisp.core.verify.events import Limits
from wisp.core.verify.kv import Sharers
from wisp.core.verify.rounds import OwnDraft
from wisp.core.verify.session import Session

MOST = 16  # tokens of a draft, at most
DEAR = 0.3  # a price from which none is made: it would be 1 % more tokens/s at most, and each answer 1 to 3 % slower
PRICE_RATE = 0.05  # its smoothing, per step


class OwnDrafts:
    """Makes them. `proposed`, `accepted`: draft tokens verified so far, and how many of them agreed."""

    def __init__(self, limits: Limits, policy: BatchingPolicy) -> None:
        # Policies that preempt have a price, and cut drafts before anyone loses KV for them.
        self.on = limits.history_tokens > 0 and policy.preempts
        self.histories = Histories[Sharers](limits.history_tokens)
        self.proposed = self.accepted = 0
        self._policy = policy
        self._eos = limits.eos
        self._rows = limits.step_tokens - limits.step_tokens // FOR_PROMPTS
        self._most = 0  # tokens of a draft, so that those of all sessions fit into a step
        self._least = 0.0  # tokens that a draft must gain: what is lost as its session is not decoded ahead
        self._price = 0.0  # smoothed: a step with a prompt in it says little of the next
        self._revoked: set[str] = set()

    def step(self, sessions: int, loss: float) -> None:
        """A step is about to be planned, for at most so many sessions. loss: see `InFlight.loss`."""
        self._most = min(MOST, self._rows // max(1, sessions) - 1)
        self._least = loss
        self._price += PRICE_RATE * (self._policy.price - self._price)

    def find(self, s: Session, chosen: int = 0) -> OwnDraft | None:
        """What to propose behind the chain of `s`, where that is worth its rows.

        chosen: tokens behind the chain that steps in flight are choosing. They are no gain of the draft.
        """
        price = self._policy.price
        history = self.histories.of(s.params.sharers) if self.on and self._price < DEAR else None
        if history is None or self._most <= 0:
            return None
        match = history.find(s.handle, s.progress.chain, min(self._most, s.remaining - 1))
        s.progress.match = match
        if match is None:
            return None
        acceptance, length = history.acceptance, match.length
        chance, gain, n = 1.0, 0.0, 0
        for token in match.tokens:
            chance *= acceptance.of(length + n)
            if chance <= price:
                break
            n += 1
            gain += chance - price if n > chosen else 0.0
            if token in self._eos and not s.params.ignore_eos:
                break  # nothing follows it
        if gain <= self._least * (1 + chosen):
            return None
        return OwnDraft(match.tokens[:n], acceptance.of(length))

    def committed(self, s: Session, tokens: list[int]) -> None:
        """The prompt of `s` has been read, and its chain has grown by `tokens`."""
        if not self.on or s.key in self._revoked:
            return
        progress, sharers = s.progress, s.params.sharers
        if progress.match is not None:
            history = self.histories.of(sharers)
            if history is not None:
                history.acceptance.learn(progress.match, tokens)
            progress.match = None
        # What was reused of the prompt is in an earlier text.
        known = progress.known if progress.known >= 0 else progress.reused or 0
        self.histories.extend(sharers, s.handle, progress.chain, known)
        progress.known = len(progress.chain)

    def verified(self, n_draft: int, accepted: int) -> None:
        """Of a draft with so many tokens, so many were accepted."""
        self.proposed += n_draft
        self.accepted += accepted

    def limits_changed(self, before: Mapping[str, KeyLimits], after: Mapping[str, KeyLimits]) -> None:
        """The keys that have limits were these, and are those now. Whoever is not among them any more is forgotten."""
        self._revoked = (self._revoked | (before.keys() - after.keys())) - after.keys()
        self.histories.drop([sharers for sharers in self.histories if sharers[0] in self._revoked])
