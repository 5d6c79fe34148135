"""A session's guesses on the edge, and its rounds in flight."""

from __future__ import annotations

import msgspec

from wisp.core.draft.policies import Odds


class Flight(msgspec.Struct):
    """A draft on its way: `drafted` tokens sent at `sent_ms`, with the verdict expected at `due_ms`.

    alone: no other draft was in flight when it was sent, so that its time is that of a round
    base:  committed tokens that it builds on
    """

    round: int
    drafted: int
    sent_ms: float
    due_ms: float
    alone: bool = True
    base: int = 0


class Chain:
    """Guesses at what follows the committed tokens, in order. The first `sent` of them are in flight.

    odds:   the policy's judgement of each
    p:      their probabilities alone, as policies read them
    others: the drafter's second choice in the place of each, if it has one
    dry:    there is nothing more to propose until the next verdict
    ended:  the last one is an end of sequence, which nothing follows
    wasted: tokens that were guessed and never sent, in all
    """

    __slots__ = ("dry", "ended", "odds", "others", "p", "sent", "tokens", "wasted")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.odds: list[Odds] = []
        self.p: list[float] = []
        self.others: list[int | None] = []
        self.sent = 0
        self.dry = self.ended = False
        self.wasted = 0

    def add(self, token: int, odds: Odds, *, ends: bool, other: int | None = None) -> None:
        """Guess `token`; nothing follows it if it `ends` the text."""
        self.tokens.append(token)
        self.odds.append(odds)
        self.p.append(odds.p)
        self.others.append(other)
        self.ended = ends

    def agreed(self, new: list[int]) -> int:
        """How many of the committed tokens `new` were guessed, up to the first that was not."""
        tokens, n = self.tokens, 0
        most = min(len(new), len(tokens))
        while n < most and new[n] == tokens[n]:
            n += 1
        return n

    def settle(self, new: list[int], answered: int) -> bool:
        """Keep what lies beyond the committed tokens `new`, if they were guessed; nothing otherwise. Were they?

        answered: tokens of the chain that were verified, or will be
        """
        tokens = self.tokens
        n = len(tokens)
        if not n:
            self.ended = False
            return True
        gone = min(len(new), n)
        right = tokens[:gone] == new[:gone]
        if not right:
            gone = n
            self.wasted += max(0, n - answered)
        del tokens[:gone], self.odds[:gone], self.p[:gone], self.others[:gone]
        self.sent = max(0, self.sent - gone)
        self.ended = self.ended and n > gone
        return right

    def follow(
        self, tokens: list[int], odds: list[Odds], others: list[int | None], sent: int, *, ended: bool
    ) -> None:
        """These are the guesses from now on."""
        self.tokens, self.odds, self.others, self.sent = tokens, odds, others, sent
        self.p = [each.p for each in odds]
        self.ended, self.dry = ended, False


class Rounds:
    """What was asked of the verifier, and has not been answered.

    number:   of the last Open or Draft
    serve:    what it asked for
    flights:  at most two drafts: the second was sent ahead
    began_ms: when this round's clock started, at the last verdict
    unasked:  tokens that came since then without having been asked for
    """

    __slots__ = ("began_ms", "flights", "number", "serve", "unasked")

    def __init__(self, *, serve: bool) -> None:
        self.number = -1
        self.serve = serve
        self.flights: list[Flight] = []
        self.began_ms = 0.0
        self.unasked = 0

    def landed(self, number: int) -> Flight | None:
        """The flight that a verdict answers; those before it were replaced by it."""
        for i, flight in enumerate(self.flights):
            if flight.round == number:
                del self.flights[: i + 1]
                return flight
        return None
