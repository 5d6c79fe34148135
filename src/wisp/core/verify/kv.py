"""The KV cache: which session has which slot, prefix reuse, eviction. Bookkeeping only.

An engine has `slots` slots of `slot_tokens` tokens each, and `kv_tokens` in all. A slot is *owned* by a live session,
is empty, or is a *leftover*: it keeps the tokens of an ended session, since a follow-up turn may begin with them. KV
is only a cache. Any slot may be taken from any session; its KV is then computed again.

A slot is found without a look at all of them: empty slots and leftovers are kept apart, and prefixes are searched for
only among slots with the same first token.

Prefixes are shared only within one API key and one salt (an edge has a salt for each of its customers). Otherwise the
time to the first token would tell one customer what another has asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

import msgspec

Sharers = tuple[str, str]  # API key and salt: sessions with the same ones may share prefixes
COPY_FROM = 16  # tokens; a shorter common prefix is computed again and not copied

Tokens = array  # of token ids, four bytes each: a list takes nine times as much for long prompts


def packed(ids: Iterable[int]) -> Tokens[int]:
    """Token ids in compact form. An array never equals a list: pack both sides before comparing."""
    return array("I", ids)


class Slot(msgspec.Struct):
    """tokens: those with valid KV, in order. owner: a session handle, or None."""

    index: int
    tokens: Tokens[int] = msgspec.field(default_factory=lambda: packed(()))
    owner: int | None = None
    key: Sharers = ("", "")
    used: float = 0.0  # time of last use


class SlotAssignment(msgspec.Struct, frozen=True):
    """The slot of a session. `start` tokens have KV there, after a copy from slot `copy_from` (-1: no copy)."""

    slot: int
    start: int
    copy_from: int
    evicted: int | None  # the session that lost its KV, if any


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
    """The slots of one engine."""

    def __init__(self, slots: int, slot_tokens: int, kv_tokens: int) -> None:
        self.slot_tokens = slot_tokens
        self.kv_tokens = kv_tokens
        self.slots = [Slot(i) for i in range(slots)]
        self.held = 0  # tokens in all slots, leftovers included
        self.reserved = 0  # more that steps in flight may add
        self._empty = [(0.0, i) for i in range(slots)]  # a heap of (last use, slot)
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
        """A slot for `session`, whose tokens are `chain`. None if all slots are owned and no owner is `evictable`.

        The KV of at least the last token is left to compute: its row of logits is needed to choose the next token.
        """
        victim = self._victim(evictable)
        if victim is None:
            return None
        source, shared = self._longest_prefix(key, chain[:-1])
        copy_from, start = -1, 0
        if source is victim:
            start = shared
        elif source is not None and source.owner is None and shared >= len(source.tokens) // 2:
            victim, start = source, shared  # an earlier turn of this chat: continue in its slot
        elif source is not None and shared >= COPY_FROM:
            copy_from, start = source.index, shared
        evicted = victim.owner
        if evicted is None and self._left.pop(victim.index, None) is None:
            heappop(self._empty)  # the victim was the first one
        self._set(victim, chain[:start], key)
        victim.owner, victim.used = session, now
        return SlotAssignment(victim.index, start, copy_from, evicted)

    def at_hand(self, key: Sharers, chain: Tokens[int]) -> int:
        """How many of the tokens need not be computed if a session gets a slot now."""
        _, shared = self._longest_prefix(key, chain[:-1])
        return shared if shared >= COPY_FROM else 0

    def fit(self, new_tokens: int, keep: Callable[[int], bool]) -> list[int] | None:
        """Free KV for `new_tokens` more: leftovers first, then owners except those that `keep` names.

        Within each, least recently used first. Returns the evicted sessions, or None (and changes nothing) if that is
        not enough.
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
        """Free KV for `new_tokens` more by dropping leftovers, least recently used first.

        Returns False (and changes nothing) if that is not enough.
        """
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
        """Tokens of free KV, without leftovers."""
        return self.kv_tokens - self.held - self.reserved

    @property
    def free(self) -> int:
        """Tokens of free KV, leftovers included."""
        return self.unused + sum([len(s.tokens) for s in self._left.values()])

    def obtainable(self, keep: Callable[[int], bool]) -> int:
        """Tokens that `fit` could free, those free already included."""
        owned = (s for s in self.slots if s.owner is not None and not keep(s.owner))
        return self.free + sum(len(s.tokens) for s in owned)

    def record(self, now: float, slot: int, tokens: Iterable[int]) -> None:
        """The slot now holds the KV of exactly `tokens`."""
        self._set(self.slots[slot], packed(tokens), self.slots[slot].key)
        self.slots[slot].used = now

    def grow(self, now: float, slot: int, tokens: Tokens[int]) -> None:
        """The slot now holds the KV of `tokens`, too, behind its former tokens. Time does not depend on the latter."""
        held = self.slots[slot]
        held.used = now
        if not held.tokens:
            self._set(held, tokens[:], held.key)
        elif tokens:
            self.held += len(tokens)
            held.tokens += tokens

    def release(self, slot: int, *, keep: bool) -> None:
        """The owner has ended. `keep`: keep the tokens for a follow-up turn."""
        free = self.slots[slot]
        if free.owner is None and slot not in self._left:
            return  # released before, and empty
        free.owner = None
        if not keep:
            self._set(free, packed(()), free.key)
        if free.tokens:
            self._left[slot] = free
        else:
            self._left.pop(slot, None)
            heappush(self._empty, (free.used, slot))

    def drop(self, slot: int) -> None:
        self.release(slot, keep=False)

    @property
    def owned_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.slots if s.owner is not None)

    @property
    def owned_slots(self) -> int:
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
        """The slot to give away: an empty one, else the oldest leftover, else that of the oldest evictable owner."""
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
            if shared < len(chain) and tokens[shared] == chain[shared]:  # otherwise its match is no longer
                n = common_prefix(tokens, chain)
                if n > shared:
                    best, shared = slot, n
            elif best is not None and slot.owner is None and tokens[:shared] == chain[:shared]:
                best = slot
        return best, shared


def _oldest(slot: Slot) -> tuple[float, int]:
    return slot.used, slot.index
