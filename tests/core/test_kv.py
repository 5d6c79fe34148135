"""KV slots: reuse, eviction, leftovers."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from wisp.core.verify.kv import KvPool, SlotAssignment, common_prefix, packed


class Pool(KvPool):
    """A pool that takes lists, and an API key alone."""

    def acquire(  # type: ignore[override]
        self, now: float, session: int, key: str, chain: list[int], evictable: Callable[[int], bool]
    ) -> SlotAssignment | None:
        return super().acquire(now, session, (key, ""), packed(chain), evictable)

    def grow(self, now: float, slot: int, tokens: list[int]) -> None:  # type: ignore[override]
        super().grow(now, slot, packed(tokens))


def never(session: int) -> bool:
    return False


def unless(idle: set[int]) -> Callable[[int], bool]:
    """Which sessions are busy: all but those."""
    return lambda session: session not in idle


def test_common_prefix_by_bisection() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert common_prefix([1, 2, 3], [1, 9, 3]) == 1
    assert common_prefix([9], [1]) == 0


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_agrees_with_a_loop(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_a_follow_up_turn_goes_on_in_the_slot_of_the_last() -> None:
    pool = Pool(2, 100, 200)
    first = pool.acquire(0.0, 1, "", [1, 2, 3], never)
    assert first is not None
    assert (first.slot, first.start, first.copy_from) == (0, 0, -1)
    pool.record(1.0, 0, [1, 2, 3, 4, 5])
    pool.release(0, keep=True)
    again = pool.acquire(2.0, 2, "", [1, 2, 3, 4, 5, 6], never)
    assert again is not None
    assert (again.slot, again.start, again.copy_from) == (0, 5, -1)


def test_the_last_token_is_always_computed_again() -> None:
    pool = Pool(1, 100, 100)
    pool.acquire(0.0, 1, "", [1, 2, 3], never)
    pool.record(0.0, 0, [1, 2, 3])
    pool.release(0, keep=True)
    again = pool.acquire(1.0, 2, "", [1, 2, 3], never)
    assert again is not None
    assert again.start == 2


def test_a_long_prefix_of_a_busy_session_is_copied() -> None:
    pool = Pool(3, 100, 300)
    system = list(range(20))
    pool.acquire(0.0, 1, "", [*system, 50], never)
    pool.record(0.0, 0, [*system, 50])
    placed = pool.acquire(1.0, 2, "", [*system, 60, 61], never)
    assert placed is not None
    assert (placed.slot, placed.start, placed.copy_from) == (1, 20, 0)
    short = pool.acquire(2.0, 3, "", [0, 1, 99], never)
    assert short is not None
    assert (short.start, short.copy_from) == (0, -1)


def test_prefixes_are_not_shared_between_keys() -> None:
    pool = Pool(2, 100, 200)
    pool.acquire(0.0, 1, "alice", list(range(30)), never)
    pool.record(0.0, 0, list(range(30)))
    placed = pool.acquire(1.0, 2, "bob", list(range(31)), never)
    assert placed is not None
    assert (placed.start, placed.copy_from) == (0, -1)


def test_empty_slots_go_first_then_leftovers_then_evictable_owners() -> None:
    pool = Pool(2, 100, 200)
    pool.acquire(0.0, 1, "", [1, 1], never)
    pool.record(0.0, 0, [1])
    pool.acquire(1.0, 2, "", [2, 2], never)
    pool.record(1.0, 1, [2])
    assert pool.acquire(2.0, 3, "", [3, 3], never) is None
    pool.release(1, keep=True)
    leftover = pool.acquire(3.0, 3, "", [3, 3], lambda s: s == 1)
    assert leftover is not None
    assert (leftover.slot, leftover.evicted) == (1, None)
    evicting = pool.acquire(4.0, 4, "", [4, 4], lambda s: s == 1)
    assert evicting is not None
    assert (evicting.slot, evicting.evicted) == (0, 1)


def test_leftovers_are_dropped_oldest_first_and_no_more_than_needed() -> None:
    pool = Pool(4, 100, 40)
    for session in range(4):
        placed = pool.acquire(float(session), session, "", [session], never)
        assert placed is not None
        pool.record(float(session), placed.slot, [session] * 10)
    for slot in (2, 0, 1):
        pool.release(slot, keep=True)
    assert (pool.unused, pool.free) == (0, 30)
    assert not pool.clear(31)
    assert pool.held == 40
    assert pool.clear(11)
    assert [len(s.tokens) for s in pool.slots] == [0, 0, 10, 10]
    assert pool.clear(20)
    assert pool.held == 20


def test_leftovers_are_dropped_before_owners_are_evicted() -> None:
    pool = Pool(3, 100, 100)
    for session in range(3):
        pool.acquire(float(session), session, "", [session, 9], never)
        pool.record(float(session), session, [session] * 30)
    pool.release(2, keep=True)
    assert pool.fit(10, lambda s: True) == []
    assert pool.held == 90
    assert pool.fit(20, lambda s: True) == []  # the leftover went
    assert pool.held == 60
    assert pool.fit(60, lambda s: True) is None
    assert pool.held == 60
    assert pool.fit(60, lambda s: s != 0) == [0]
    assert pool.held == 30


def oldest_that_may_go(pool: KvPool, evictable: set[int]) -> int | None:
    """The slot that `_victim` should choose, from a search through all slots."""
    ranks = [
        (2 if s.owner is not None else 1 if s.tokens else 0, s.used, s.index)
        for s in pool.slots
        if s.owner is None or s.owner in evictable
    ]
    return min(ranks)[2] if ranks else None


def longest_shared(pool: KvPool, key: str, chain: list[int]) -> int:
    """Longest prefix of a chain in the slots of that key, from a search through all slots."""
    return max((common_prefix(s.tokens, chain) for s in pool.slots if s.key == (key, "")), default=0)


@given(st.lists(st.tuples(st.sampled_from("adegr"), st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_the_slot_found_is_that_of_a_search_through_all_slots(what: list[tuple[str, int, int]]) -> None:
    pool = Pool(4, 100, 200)
    for now, (do, slot, n) in enumerate(what):
        session, key, idle = 100 + now, "ab"[n % 2], {100 + i for i in range(now) if (i + n) % 3}
        chain = [n % 3, n % 5, *range(n)]
        shared = longest_shared(pool, key, chain[:-1])
        held, victim = pool.slots[slot], oldest_that_may_go(pool, idle)
        if do == "a":
            placement = pool.acquire(float(now // 2), session, key, chain, idle.__contains__)
            assert (placement is None) == (victim is None)
            if placement is not None:
                assert placement.start in (0, shared)
                assert placement.slot == victim or placement.start == shared > 0
        elif do == "d":
            pool.drop(slot)
        elif do == "e":
            pool.fit(n * 5, unless(idle))
        elif held.owner is not None and do == "g":
            pool.grow(float(now // 2), slot, chain)
        elif held.owner is not None:
            pool.release(slot, keep=True)
        assert pool.held == sum(len(s.tokens) for s in pool.slots)
        assert pool.owned_slots == sum(s.owner is not None for s in pool.slots)
        owners = sum(len(s.tokens) for s in pool.slots if s.owner in idle or s.owner is None)
        assert pool.obtainable(unless(idle)) == pool.unused + owners


def test_leftovers_go_before_sessions_and_of_those_the_oldest_first() -> None:
    pool = Pool(4, 100, 100)
    for i in range(4):
        assert pool.acquire(float(i), i, "k", [i, 1], never) is not None
        pool.record(float(i), i, [i] * 20)
    pool.release(3, keep=True)
    assert pool.fit(90, unless({0, 1})) is None
    assert pool.held == 80  # nothing has changed
    assert pool.fit(50, unless({0, 1})) == [0]
    assert [len(s.tokens) for s in pool.slots] == [0, 20, 20, 0]


def test_no_more_is_evicted_than_has_to_be() -> None:
    pool = Pool(3, 10, 30)
    for session in range(3):
        pool.acquire(float(session), session, "", [session, 1], never)
        pool.record(float(session), session, range(10))
    assert pool.fit(10, lambda session: False) == [0]
    assert pool.fit(11, lambda session: False) == [1]


def test_a_longer_prefix_is_found_behind_a_shorter_one() -> None:
    pool = Pool(4, 100, 400)
    chain = list(range(60))
    for session, length in enumerate((30, 10, 50)):
        pool.acquire(0.0, session, "", [0, 99], never)
        pool.record(0.0, session, chain[:length])
    found = pool.acquire(1.0, 7, "", [*chain, 98], never)
    assert found is not None
    assert (found.copy_from, found.start) == (2, 50)


def held(pool: Pool, session: int, tokens: list[int], now: float = 0.0, *, keep: bool = False) -> int:
    """The slot in which a session holds `tokens`, or has left them."""
    placed = pool.acquire(now, session, "", [99, 99], never)
    assert placed is not None
    pool.record(now, placed.slot, tokens)
    if keep:
        pool.release(placed.slot, keep=True)
    return placed.slot


def test_prefixes_are_copied_from_sixteen_tokens_on() -> None:
    for shared, start in ((15, 0), (16, 16)):
        pool = Pool(2, 100, 200)
        slot = held(pool, 1, list(range(60)))
        placed = pool.acquire(1.0, 2, "", [*range(shared), 98, 98], never)
        assert placed is not None
        assert (placed.start, placed.copy_from) == (start, slot if start else -1)


def test_a_leftover_is_continued_if_at_least_half_of_it_is_shared() -> None:
    for size, shared, continued in (
        (60, 30, True),
        (60, 29, False),
        (60, 10, False),
        (61, 30, True),
        (61, 29, False),
    ):
        pool = Pool(2, 100, 200)
        slot = held(pool, 1, list(range(size)), keep=True)
        placed = pool.acquire(1.0, 2, "", [*range(shared), 98, 98], never)
        assert placed is not None
        assert (placed.slot == slot) is continued
        assert placed.start == (shared if shared >= 16 else 0)
        assert placed.copy_from == (slot if placed.start and not continued else -1)
        assert len(pool.slots[placed.slot].tokens) == placed.start


def test_among_equal_prefixes_a_leftover_is_continued_rather_than_copied() -> None:
    pool = Pool(3, 100, 300)
    held(pool, 1, list(range(40)))
    left = held(pool, 2, [*range(40), 77], keep=True)
    placed = pool.acquire(1.0, 3, "", [*range(40), 98, 98], never)
    assert placed is not None
    assert (placed.slot, placed.start, placed.copy_from) == (left, 40, -1)


def test_a_slot_that_was_dropped_is_no_longer_found() -> None:
    pool = Pool(2, 100, 200)
    slot = held(pool, 1, list(range(40)))
    pool.drop(slot)
    pool.drop(slot)
    assert (pool.held, pool.owned_slots, pool.owned_tokens, pool.unused) == (0, 0, 0, 200)
    placed = pool.acquire(1.0, 2, "", [*range(40), 98], never)
    assert placed is not None
    assert (placed.start, placed.copy_from, placed.evicted) == (0, -1, None)
    assert pool.acquire(1.0, 3, "", [1, 1], never) is not None
    assert pool.acquire(1.0, 4, "", [1, 1], never) is None  # no slot was counted twice


def test_kv_that_just_suffices_costs_nobody_anything() -> None:
    pool = Pool(2, 100, 100)
    held(pool, 1, [1] * 30, 0.0)
    held(pool, 2, [2] * 30, 1.0, keep=True)
    assert pool.unused == 40
    assert pool.clear(40)
    assert pool.held == 60
    assert pool.fit(40, lambda session: False) == []
    assert pool.held == 60
    pool.reserved = 10
    assert (pool.unused, pool.free) == (30, 60)
    assert pool.clear(60)  # exactly with the leftover
    assert pool.held == 30
    assert pool.obtainable(lambda session: False) == 90
    assert pool.fit(91, lambda session: False) is None
    assert pool.fit(90, lambda session: False) == [1]


def test_the_slot_used_longest_ago_is_taken_first() -> None:
    pool = Pool(2, 100, 200)
    first, second = held(pool, 1, [1] * 9, 0.0), held(pool, 2, [2] * 9, 1.0)
    pool.grow(2.0, first, [])
    taken = pool.acquire(3.0, 3, "", [3, 3], lambda session: True)
    assert taken is not None
    assert (taken.slot, taken.evicted) == (second, 2)
    pool.grow(4.0, first, [1])
    assert pool.held == 10
    taken = pool.acquire(5.0, 4, "", [4, 4], lambda session: True)
    assert taken is not None
    assert (taken.slot, taken.evicted) == (second, 3)


def test_of_slots_used_at_the_same_time_the_first_goes() -> None:
    pool = Pool(3, 100, 300)
    for session in range(3):
        held(pool, session, [session] * 9, keep=True)
    placed = pool.acquire(1.0, 7, "", [8, 8], never)
    assert placed is not None
    assert placed.slot == 0


def test_what_is_at_hand_is_what_a_session_would_get() -> None:
    pool, system = Pool(3, 100, 300), list(range(20))
    assert pool.at_hand(("", ""), packed(system)) == 0
    pool.acquire(0.0, 1, "", [*system, 50], never)
    pool.record(0.0, 0, [*system, 50])
    for chain in ([*system, 60, 61], [*system, 50], [0, 1, 99], [7]):
        at_hand = pool.at_hand(("", ""), packed(chain))
        assigned = pool.acquire(1.0, 2, "", chain, never)
        assert assigned is not None
        assert assigned.start == at_hand
        pool.release(assigned.slot, keep=False)
    assert pool.at_hand(("other", ""), packed([*system, 60])) == 0
