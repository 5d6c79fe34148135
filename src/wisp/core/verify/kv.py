"""Which session's KV lives in which slot: longest-prefix reuse, parking, eviction. Pure bookkeeping.

An engine has `slots` sequences of `slot_tokens` each, and `kv_tokens` in all. A slot is *owned* by a live
session or is a *leftover*: the tokens of an ended session, kept because a follow-up turn may begin with them.
A KV cache is only a cache: any slot may be taken from anyone, at the price of computing it again.

Who comes is placed without a look at every slot: those that nobody owns are kept apart, and a prefix is looked for
among slots whose tokens begin like it.

Prefixes are shared only within one API key and, of an edge that serves several customers, within one salt: across
them, the time to the first token would tell one customer what another has asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

import msgspec

Sharers = tuple[str, str]  # API key and salt: those whose sessions may share prefixes
COPY_FROM = 16  # tokens; a shorter common prefix is computed again rather than copied

Tokens = array  # of ids, four bytes each: in lists of long prompts they take nine times as much


def packed(ids: Iterable[int]) -> Tokens[int]:
    """Token ids as they are kept: equal only to their like, so pack what is to be compared."""
    return array("I", ids)


class Slot(msgspec.Struct):
    """`tokens` are those whose KV is valid, in order; `owner` is a session handle or None."""

    index: int
    tokens: Tokens[int] = msgspec.field(default_factory=lambda: packed(()))
    owner: int | None = None
    key: Sharers = ("", "")
    used: float = 0.0  # time of last use


class SlotAssignment(msgspec.Struct, frozen=True):
    """Where a session's KV goes: `start` tokens are there already, after a copy from `copy_from` if >= 0."""

    slot: int
    start: int
    copy_from: int
    evicted: int | None  # session that lost its KV, if any


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix, by bisection on slice equality (compares at C speed)."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class KvPool:
    """Slots of one engine. Never does I/O; `evictable` tells which owners may lose theirs now."""

    def __init__(self, slots: int, slot_tokens: int, kv_tokens: int) -> None:
        self.slot_tokens = slot_tokens
        self.kv_tokens = kv_tokens
        self.slots = [Slot(i) for i in range(slots)]
        self.held = 0  # tokens in all slots, leftovers included
        self._empty = [
            (0.0, i) for i in range(slots)
        ]  # nobody's, and hold nothing: a heap of (last use, slot)
        self._left: dict[int, Slot] = {}  # leftovers
        self._beginnings: dict[tuple[Sharers, int], set[int]] = {}  # key and first token -> slots

    def acquire(
        self,
        now: float,
        session: int,
        key: Sharers,
        chain: Tokens[int],
        evictable: Callable[[int], bool],
    ) -> SlotAssignment | None:
        """A slot for `session` whose tokens are `chain`; None if every slot is owned and busy.

        At least the last token of `chain` is left to compute, so that there is a row to choose from.
        """
        victim = self._victim(evictable)
        if victim is None:
            return None
        source, shared = self._longest_prefix(key, chain[:-1])
        copy_from, start = -1, 0
        if source is victim:
            start = shared
        elif source is not None and source.owner is None and shared >= len(source.tokens) // 2:
            victim, start = source, shared  # a former turn of this chat: go on in its slot
        elif source is not None and shared >= COPY_FROM:
            copy_from, start = source.index, shared
        evicted = victim.owner
        if evicted is None and self._left.pop(victim.index, None) is None:
            heappop(self._empty)  # it was the first of them
        self._set(victim, chain[:start], key)
        victim.owner, victim.used = session, now
        return SlotAssignment(victim.index, start, copy_from, evicted)

    def fit(self, new_tokens: int, keep: Callable[[int], bool]) -> list[int] | None:
        """Make room for `new_tokens` more. Leftovers go first, oldest first, then owners that `keep` not.

        Returns the sessions evicted, or None (nothing done) if there can be no room.
        """
        if self.clear(new_tokens):
            return []
        if self.obtainable(keep) < new_tokens:
            return None
        for slot in list(self._left.values()):
            self.drop(slot.index)
        evicted = []
        owned = (s for s in self.slots if s.owner is not None and s.tokens and not keep(s.owner))
        for slot in sorted(owned, key=_oldest):
            if new_tokens <= self.unused:
                break
            assert slot.owner is not None
            evicted.append(slot.owner)
            self.drop(slot.index)
        return evicted

    def clear(self, new_tokens: int) -> bool:
        """Make room for `new_tokens` more by dropping leftovers, oldest first. False (nothing done) if that will not
        do."""
        if new_tokens <= self.unused:
            return True
        if new_tokens > self.free:
            return False
        for slot in sorted(self._left.values(), key=_oldest):
            self.drop(slot.index)
            if new_tokens <= self.unused:
                break
        return True

    @property
    def unused(self) -> int:
        """Tokens that nobody holds."""
        return self.kv_tokens - self.held

    @property
    def free(self) -> int:
        """Tokens that no session holds."""
        return self.unused + sum([len(s.tokens) for s in self._left.values()])

    def obtainable(self, keep: Callable[[int], bool]) -> int:
        """Tokens that `fit` could make room for."""
        owned = (s for s in self.slots if s.owner is not None and not keep(s.owner))
        return self.free + sum(len(s.tokens) for s in owned)

    def record(self, now: float, slot: int, tokens: Iterable[int]) -> None:
        """The slot now holds the KV of exactly `tokens`."""
        self._set(self.slots[slot], packed(tokens), self.slots[slot].key)
        self.slots[slot].used = now

    def grow(self, now: float, slot: int, tokens: Tokens[int]) -> None:
        """The slot now holds the KV of `tokens` too, behind what it held. Costs nothing for what it held."""
        held = self.slots[slot]
        held.used = now
        if not held.tokens:
            self._set(held, tokens[:], held.key)
        elif tokens:
            self.held += len(tokens)
            held.tokens += tokens

    def touch(self, now: float, slot: int) -> None:
        """The slot takes part in a step."""
        self.slots[slot].used = now

    def release(self, slot: int, *, keep: bool) -> None:
        """The owner is done. `keep` leaves the tokens for a follow-up turn."""
        free = self.slots[slot]
        if free.owner is None and slot not in self._left:
            return  # already, and nothing left
        free.owner = None
        if not keep:
            self._set(free, packed(()), free.key)
        if free.tokens:
            self._left[slot] = free
        else:
            self._left.pop(slot, None)
            heappush(self._empty, (free.used, slot))

    def drop(self, slot: int) -> None:
        """Forget what the slot holds, and its owner."""
        self.release(slot, keep=False)

    @property
    def owned_tokens(self) -> int:
        """KV tokens of live sessions."""
        return sum(len(s.tokens) for s in self.slots if s.owner is not None)

    @property
    def owned_slots(self) -> int:
        """Slots of live sessions."""
        return len(self.slots) - len(self._left) - len(self._empty)

    def _set(self, slot: Slot, tokens: Tokens[int], key: Sharers) -> None:
        self.held += len(tokens) - len(slot.tokens)
        if slot.tokens:
            beginning = (slot.key, slot.tokens[0])
            self._beginnings[beginning].remove(slot.index)
            if not self._beginnings[beginning]:
                del self._beginnings[beginning]
        if tokens:
            self._beginnings.setdefault((key, tokens[0]), set()).add(slot.index)
        slot.tokens, slot.key = tokens, key

    def _victim(self, evictable: Callable[[int], bool]) -> Slot | None:
        """The slot to give away: an empty one, else the oldest leftover, else the oldest evictable owner's."""
        if self._empty:
            return self.slots[self._empty[0][1]]
        if self._left:
            return min(self._left.values(), key=_oldest)
        idle = (s for s in self.slots if s.owner is not None and evictable(s.owner))
        return min(idle, key=_oldest, default=None)

    def _longest_prefix(self, key: Sharers, chain: Tokens[int]) -> tuple[Slot | None, int]:
        best: Slot | None = None
        shared = 0
        alike = self._beginnings.get((key, chain[0]), ()) if chain else ()
        for slot in map(self.slots.__getitem__, sorted(alike)):
            tokens = slot.tokens
            if len(tokens) <= shared:
                continue
            if shared < len(chain) and tokens[shared] == chain[shared]:  # else it cannot be longer
                n = common_prefix(tokens, chain)
                if n > shared:
                    best, shared = slot, n
            elif best is not None and slot.owner is None and tokens[:shared] == chain[:shared]:
                best = slot
        return best, shared


def _oldest(slot: Slot) -> tuple[float, int]:
    return slot.used, slot.index
