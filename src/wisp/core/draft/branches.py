"""Branches: what an edge drafts for other outcomes of the draft that is in flight.

    in flight    a b c          the bet: all of it is accepted     -> chain          a b c d e f
                                b is rejected, the target says B   -> branch (1, B)  x y

A branch begins with the drafter's second choice in the place of a token, and goes on with what the drafter proposes
behind it. It is sent with the draft made ahead. If the target says these tokens, the verifier goes on along the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from wisp.core.draft.chain import Chain
from wisp.core.draft.policies import Odds
from wisp.core.protocol.messages import Branch


class Guess:
    """A branch: the first `at` tokens of the chain are right, then comes `tokens[0]`, then the others.

    chance:  that the draft in flight turns out so
    odds, p: the policy's judgement of the tokens behind the first; others: second choices in their places
    full:    it is not drafted any further; ended: its last token ends the text
    worth:   how many tokens behind the first are worth verifying; sent: how many the verifier has
    """

    __slots__ = ("at", "chance", "ended", "full", "odds", "others", "p", "sent", "tokens", "worth")

    def __init__(self, at: int, token: int, chance: float) -> None:
        self.at = at
        self.chance = chance
        self.tokens = [token]
        self.odds: list[Odds] = []
        self.p: list[float] = []
        self.others: list[int | None] = []
        self.full = self.ended = False
        self.worth = self.sent = 0

    @property
    def right(self) -> float:
        """The chance that all of it is right."""
        return self.chance * prod(self.p)

    def add(self, token: int, odds: Odds, other: int | None, *, ends: bool) -> None:
        """Guess `token`; nothing follows it if it `ends` the text."""
        self.tokens.append(token)
        self.odds.append(odds)
        self.p.append(odds.p)
        self.others.append(other)
        self.ended = ends


class Branches:
    """The branches of the draft in flight.

    growing: the one that the draft engine is at; None: it is at the chain
    sent:    branches that were sent, in all
    taken:   branches that the text went along, in all: sent ones, and ones that were still here
    """

    __slots__ = ("growing", "guesses", "sent", "taken")

    def __init__(self) -> None:
        self.guesses: list[Guess] = []
        self.growing: Guess | None = None
        self.sent = self.taken = 0

    def clear(self) -> int:
        """The draft is not in flight any more. Returns how many tokens were drafted and never sent."""
        unsent = sum([len(guess.p) - guess.sent for guess in self.guesses])
        self.guesses, self.growing = [], None
        return unsent

    def best(
        self, chain: Chain, flight: int, second: float, most: int, room: int, longest: int
    ) -> Guess | None:
        """The branch whose next token is likeliest to be of use. It may be a new one; None: there is none.

        flight:  tokens of the chain that are verified next
        second:  how often a correction is the drafter's second choice
        most:    branches that the verifier takes
        room:    tokens that the text may still have, but for its last; longest: tokens of a branch
        """
        best, chance, begun = None, 0.0, set()
        for guess in self.guesses:
            begun.add(guess.at)
            n = len(guess.tokens)
            if not guess.full and n < longest and guess.at + n < room and (right := guess.right) > chance:
                best, chance = guess, right
        if len(self.guesses) >= most:
            return best
        before = 1.0
        for at in range(min(flight + 1, len(chain.p), room - 1)):
            p, token = chain.p[at], chain.others[at]
            here = before * (1.0 - p) * second
            if token is not None and here > chance and at not in begun:
                best, chance = Guess(at, token, here), here
            before *= p
        return best

    def following(self, agreed: int, new: Sequence[int]) -> Guess | None:
        """The branch that the committed tokens `new` follow, the first `agreed` of which are the chain's."""
        rest = new[agreed:]
        for guess in self.guesses:
            if guess.at == agreed and len(guess.tokens) > len(rest) and guess.tokens[: len(rest)] == rest:
                return guess
        return None

    def to_send(self) -> list[Branch]:
        """All that is worth verifying, the likeliest first; empty if the verifier has all of it."""
        if all(guess.worth <= guess.sent for guess in self.guesses):
            return []
        ready = sorted((g for g in self.guesses if g.worth), key=lambda g: -g.chance)
        for guess in ready:
            self.sent += not guess.sent
            guess.sent = guess.worth
        return [Branch(g.at, g.tokens[0], g.tokens[1 : 1 + g.sent]) for g in ready]
