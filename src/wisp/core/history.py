"""What followed the same words before: drafts without a model, from the texts of earlier and present sessions.

A *text* is what one session has read and said: its prompt and its answer. An index has, for each run of GRAM tokens,
where it was said last. The tokens that followed there are the guess at what follows now. How far the two places agree
backwards is the *match*: the longer it is, the more of the guess comes true.

Whoever must not learn of another's texts has a history of their own, so that nobody's guess is made of another
customer's words. All histories together hold a bounded number of tokens, and the more histories there are, the fewer.
The one that was extended least recently goes first.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

GRAM = 2  # tokens that must agree for a match; with 3, two thirds of what is gained on recorded texts
LONGEST = 16  # tokens; a longer match says no more
HALF = 4.0  # tokens of a match behind which half of the guesses come true, before any was seen; as on recorded texts
MOST = 0.98  # the largest estimate of an acceptance
RATE = 0.04  # smoothing of an acceptance, per token
EACH = 12  # tokens that take the memory of a history beside its tokens: 1.3 KB. Else many tiny ones took 142 MB, not 30

K = TypeVar("K", bound=Hashable)
_AT = 32  # bits of a place that count tokens; those above name the text
_MASK = (1 << _AT) - 1


class Match(NamedTuple):
    """`tokens` followed before; `length` tokens before them agree, LONGEST at most."""

    tokens: list[int]
    length: int


class Acceptance:
    """Share of guessed tokens that come true if those before them do, by the length of the match before the token.

    It is learnt from every match, whether somebody proposed its tokens or not.
    """

    __slots__ = ("_shares",)

    def __init__(self) -> None:
        self._shares = [MOST * length / (length + HALF) for length in range(LONGEST + 1)]

    def of(self, length: int) -> float:
        """Of the token behind a match of `length` tokens: more than 0, less than 1."""
        return self._shares[length if length < LONGEST else LONGEST]

    def learn(self, match: Match, then: Sequence[int]) -> None:
        """The tokens `then` came."""
        shares, length = self._shares, match.length
        for guessed, came in zip(match.tokens, then, strict=False):
            shares[length] += RATE * ((MOST if guessed == came else 0.0) - shares[length])
            if guessed != came:
                break
            length = min(length + 1, LONGEST)


class History:
    """Texts that may be guessed from each other, by name: numbers below 2^31. `held`: their tokens."""

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.held = 0
        self._texts: dict[int, array[int]] = {}  # oldest first
        # Hash of GRAM tokens -> the place behind them, where they were said last
        self._index: dict[int, int] = {}

    def extend(self, name: int, tokens: array[int], known: int) -> None:
        """The text `name` is now `tokens`. The first `known` of them are nothing new: it had them, or another has."""
        text = self._texts.get(name)
        if text is None:
            text = self._texts[name] = tokens[max(0, known - LONGEST) : known]
            self.held += len(text)
        first, place = max(len(text), GRAM), name << _AT
        text += tokens[known:]
        self.held += len(tokens) - known
        if len(text) > first:
            places = range(place + first, place + len(text))
            self._index.update(zip(_hashes(text, first), places, strict=True))

    def find(self, name: int, tokens: array[int], most: int) -> Match | None:
        """Up to `most` tokens that may follow the text `name`, which is `tokens` or ends in them. None if its last GRAM
        tokens are new here."""
        n = len(tokens)
        place = self._index.get(hash(tuple(tokens[-GRAM:])), -1) if n >= GRAM else -1
        said, at = self._texts.get(place >> _AT), place & _MASK
        if said is None:
            return None
        length, longest = 0, min(LONGEST, at, n)
        while length < longest and said[at - 1 - length] == tokens[n - 1 - length]:
            length += 1
        if length < GRAM:
            return None  # other tokens with the same hash
        follow = said[at : at + most].tolist()
        if place >> _AT == name:  # a text that repeats itself goes on in the guess
            period = len(said) - at
            while len(follow) < most:
                follow.append(follow[-period])
        return Match(follow, length)

    def drop_oldest(self) -> None:
        """Forget the oldest text."""
        name = next(iter(self._texts))
        text, index = self._texts.pop(name), self._index
        self.held -= len(text)
        for gram in _hashes(text, GRAM):
            if index.get(gram, -1) >> _AT == name:
                del index[gram]


class Histories(Generic[K]):
    """A history for each of those whose texts are kept apart; `most` tokens in all, and EACH fewer for each but one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0  # tokens
        self._known: dict[K, History] = {}  # least recently extended first

    def __iter__(self) -> Iterator[K]:
        return iter(self._known)

    def of(self, whose: K) -> History | None:
        """The history of these; None if they have none."""
        return self._known.get(whose)

    def extend(self, whose: K, name: int, tokens: array[int], known: int) -> None:
        """See `History.extend`. For want of room others lose theirs, and after that its own oldest texts go."""
        histories = self._known
        history = histories.pop(whose, None) or History()
        histories[whose] = history
        before = history.held
        history.extend(name, tokens, known)
        self.held += history.held - before
        while self.held + EACH * (len(histories) - 1) > self.most:
            oldest = next(iter(histories))
            if oldest == whose:
                before = history.held
                history.drop_oldest()
                self.held -= before - history.held
            else:
                self.held -= histories.pop(oldest).held

    def drop(self, whose: Iterable[K]) -> None:
        """Forget all that these have said."""
        for each in whose:
            if (history := self._known.pop(each, None)) is not None:
                self.held -= history.held


def _hashes(text: array[int], first: int) -> list[int]:
    """Of the GRAM tokens before each place from `first` on: GRAM or later."""
    part = text[first - GRAM : -1].tolist()
    return list(map(hash, zip(*(part[i:] for i in range(GRAM)), strict=False)))
