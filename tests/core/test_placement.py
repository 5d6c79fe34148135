"""Placement of sessions on replicas: by prefix if that is fair, otherwise by load."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisp.core.route import placement
from wisp.core.route.placement import BLOCK, SETTLE_S, Choice, Placement, Reason, ReplicaSize
from wisp.core.verify.admission import Refusal

SIZE = ReplicaSize(slots=8, kv_tokens=1 << 20, max_sessions=1000)
SYSTEM = list(range(100, 100 + 4 * BLOCK))  # what many prompts begin with


def fleet(*names: str, size: ReplicaSize = SIZE) -> Placement:
    made = Placement()
    for name in names:
        made.up(name, size)
    return made


def fresh(n: int) -> list[int]:
    """A unique prompt."""
    return [10_000 + n] * (2 * BLOCK)


def test_sessions_without_common_prefix_alternate_between_replicas() -> None:
    p = fleet("a", "b", "c")
    choices = [p.place(0.0, f"s{n}", "key", fresh(n)) for n in range(9)]
    assert [c.replica for c in choices] == ["a", "b", "c"] * 3
    assert {c.reason for c in choices} == {Reason.LOAD}


def test_the_next_turn_of_a_chat_goes_to_the_same_replica() -> None:
    p = fleet("a", "b")
    p.place(0.0, "other", "key", fresh(0))
    chat = SYSTEM
    assert p.place(0.0, "turn-1", "key", chat).replica == "b"
    for turn in range(2, 9):
        for replica in ("a", "b"):  # what went before has ended
            p.reported(float(turn), replica, 0)
        chat = [*chat, *fresh(turn)]
        choice = p.place(float(turn), f"turn-{turn}", "key", chat)
        assert (choice.replica, choice.reason) == ("b", Reason.PREFIX)
        assert choice.shared == len(chat) - 2 * BLOCK


def test_a_prefix_shared_by_all_does_not_overload_one_replica() -> None:
    p = fleet("a", "b", "c")
    for n in range(300):
        p.place(0.0, f"s{n}", "key", [*SYSTEM, *fresh(n)])
    assert all(80 <= p.sessions(name) <= 120 for name in "abc")


def test_prefixes_of_another_key_do_not_count() -> None:
    p = fleet("a", "b")
    p.place(0.0, "s1", "alice", SYSTEM)
    p.place(0.0, "s2", "bob", fresh(1))
    for name in ("a", "b"):
        p.reported(1.0, name, 0)
    p.place(1.0, "s3", "bob", fresh(2))  # a, which is level with b but comes first
    assert p.place(1.0, "s4", "bob", SYSTEM) == Choice("b", Reason.LOAD, 0)


def test_only_whole_blocks_count() -> None:
    p = fleet("a", "b")
    p.place(0.0, "s1", "key", SYSTEM)
    p.reported(1.0, "a", 0)
    assert p.place(1.0, "s2", "key", [*SYSTEM[: BLOCK - 1], *fresh(1)]).reason is Reason.LOAD
    p.reported(2.0, "b", 0)
    choice = p.place(2.0, "s3", "key", [*SYSTEM[: 2 * BLOCK - 1], *fresh(2)])
    assert (choice.replica, choice.reason, choice.shared) == ("a", Reason.PREFIX, BLOCK)


def test_blocks_beyond_the_cache_are_forgotten_oldest_first() -> None:
    p = fleet("a", "b", size=ReplicaSize(8, kv_tokens=4 * BLOCK, max_sessions=1000))
    for n in range(6):  # each replica sees three prompts of two blocks, and holds two
        p.place(0.0, f"s{n}", "key", fresh(n))
    for name in ("a", "b"):
        p.reported(1.0, name, 0)
    assert p.place(1.0, "late", "key", fresh(4)).shared == 2 * BLOCK
    for name in ("a", "b"):
        p.reported(2.0, name, 0)
    assert p.place(2.0, "later", "key", fresh(0)).reason is Reason.LOAD


def test_the_end_of_a_long_prompt_is_forgotten_first() -> None:
    """The rest of it is of use only with the beginning."""
    p = fleet("a", size=ReplicaSize(8, kv_tokens=5 * BLOCK, max_sessions=1000))
    p.place(0.0, "s1", "key", SYSTEM)  # four blocks
    p.place(0.0, "s2", "key", fresh(1))  # two
    assert p.place(0.0, "s3", "key", SYSTEM).shared == 3 * BLOCK


def test_a_larger_replica_gets_more_sessions() -> None:
    p = fleet("small")
    p.up("big", ReplicaSize(slots=24, kv_tokens=1 << 20, max_sessions=1000))
    for n in range(80):
        p.place(0.0, f"s{n}", "key", fresh(n))
    assert (p.sessions("small"), p.sessions("big")) == (20, 60)


def test_reports_replace_counted_placements() -> None:
    p = fleet("a", "b")
    for n in range(10):
        p.place(0.0, f"s{n}", "key", fresh(n))
    p.reported(SETTLE_S / 2, "a", 0)  # too early to tell of them
    assert p.sessions("a") == 5
    p.reported(1.0, "a", 1)
    p.reported(1.0, "b", 5)
    assert [p.place(1.0, f"t{n}", "key", fresh(20 + n)).replica for n in range(4)] == ["a"] * 4


def test_a_resumed_session_returns_to_its_replica_unless_it_avoids_it() -> None:
    p = fleet("a", "b", "c")
    first = p.place(0.0, "session", "key", fresh(0)).replica
    for n in range(5):
        p.place(0.0, f"s{n}", "key", fresh(n + 1))
    again = p.place(1.0, "session", "key", fresh(0))
    assert (again.replica, again.reason) == (first, Reason.RESUME)
    elsewhere = p.place(2.0, "session", "key", fresh(0), avoid=first).replica
    assert elsewhere != first
    assert p.place(3.0, "session", "key", fresh(0)).replica == elsewhere


def test_the_only_replica_is_chosen_even_if_avoided() -> None:
    assert fleet("a").place(0.0, "session", "key", [1], avoid="a").replica == "a"


def test_no_session_goes_to_a_replica_that_is_shut_gone_or_full() -> None:
    p = fleet("a", "b", "c", size=ReplicaSize(8, 1024, max_sessions=3))
    p.place(0.0, "session", "key", SYSTEM)
    p.shut("a")
    p.gone("b")
    assert [p.place(0.0, f"s{n}", "key", SYSTEM).replica for n in range(3)] == ["c"] * 3
    with pytest.raises(Refusal, match="all 3 sessions") as refused:
        p.place(0.0, "s4", "key", SYSTEM)
    assert (refused.value.code, refused.value.retry_after) == ("overloaded", 1.0)
    assert not p.knows("key", "s4")
    p.shut("a", shut=False)
    assert p.place(0.0, "s4", "key", SYSTEM).replica == "a"


def test_a_restarted_replica_has_nothing_cached() -> None:
    p = fleet("a", "b")
    p.place(0.0, "s1", "key", SYSTEM)
    p.gone("a")
    p.up("a", SIZE)
    assert p.place(1.0, "s2", "key", SYSTEM).reason is Reason.LOAD


def test_late_reports_of_a_gone_replica_change_nothing() -> None:
    p = fleet("a")
    p.gone("a")
    p.reported(1.0, "a", 5)
    p.shut("a", shut=False)
    p.gone("a")
    assert not p.any_open
    with pytest.raises(Refusal):
        p.place(1.0, "s", "key", [1])


prompts = st.lists(st.sampled_from([0, 1]), min_size=0, max_size=4).map(
    lambda blocks: [token for b in blocks for token in [b] * BLOCK]
)


@given(
    st.lists(st.tuples(st.sampled_from("kl"), prompts), max_size=120),
    st.lists(st.integers(1, 16), min_size=1, max_size=5),
)
def test_no_replica_ever_gets_much_more_than_its_share(
    asked: list[tuple[str, list[int]]], slots: list[int]
) -> None:
    """For any prefixes: at most 20 %, or one session, above its share."""
    p = Placement()
    for i, n in enumerate(slots):
        p.up(f"r{i}", ReplicaSize(n, 1 << 20, 10_000))
    for n, (key, prompt) in enumerate(asked):
        name = p.place(0.0, f"s{n}", key, prompt).replica
        share = (n + 1) * slots[int(name[1:])] / sum(slots)
        assert p.sessions(name) <= max(1.2 * share, share + 1)


@given(st.lists(st.tuples(st.sampled_from("kl"), prompts), max_size=60))
def test_remembered_prefixes_agree_with_a_search_through_all_prompts(
    asked: list[tuple[str, list[int]]],
) -> None:
    p = fleet("a", "b", "c")
    placed: list[tuple[str, str, list[int]]] = []

    def common(a: list[int], b: list[int]) -> int:
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return n - n % BLOCK

    for n, (key, prompt) in enumerate(asked):
        for name in "abc":  # each ends before the next: only prefixes count
            p.reported(float(n), name, 0)
        best = {
            name: max((common(prompt, old) for r, k, old in placed if (r, k) == (name, key)), default=0)
            for name in "abc"
        }
        choice = p.place(float(n), f"s{n}", key, prompt)
        assert choice.shared == best[choice.replica]
        assert choice.shared == max(best.values())
        assert (choice.reason is Reason.PREFIX) == (choice.shared > 0)
        placed.append((choice.replica, key, prompt))


@given(st.integers(1, 500), st.integers(1, 6))
def test_without_prefixes_sessions_spread_evenly(sessions: int, replicas: int) -> None:
    p = fleet(*(f"r{i}" for i in range(replicas)))
    for n in range(sessions):
        p.place(0.0, f"s{n}", "key", [])
    counts = [p.sessions(f"r{i}") for i in range(replicas)]
    assert max(counts) == math.ceil(sessions / replicas)
    assert min(counts) == sessions // replicas


@pytest.mark.parametrize(("places", "most"), [(5, 100_000), (1000, 20)])
def test_remembered_sessions_are_bounded_and_fair_between_keys(
    places: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "REMEMBERED", most)  # or four of each place
    p = fleet("a", size=ReplicaSize(8, 1024, max_sessions=places))
    for n in range(5):
        p.place(0.0, f"mine-{n}", "modest", [], owed=True)
    for n in range(100):
        p.place(0.0, f"many-{n}", "greedy", [], owed=True)
    assert all(p.knows("modest", f"mine-{n}") for n in range(5))
    assert [n for n in range(100) if p.knows("greedy", f"many-{n}")] == list(range(85, 100))
    assert not p.knows("greedy", "mine-0")


def test_a_key_owed_a_place_goes_to_the_least_loaded_replica_even_if_full() -> None:
    p = fleet("a", "b", size=ReplicaSize(8, 1024, max_sessions=3))
    for n in range(6):
        p.place(0.0, f"s{n}", "greedy", fresh(n))
    p.reported(1.0, "b", 2)
    p.reported(1.0, "a", 3)
    p.place(1.0, "s6", "greedy", fresh(6))
    with pytest.raises(Refusal):
        p.place(1.0, "s7", "modest", fresh(7))
    assert p.place(1.0, "s7", "modest", fresh(7), owed=True).reason is Reason.LOAD


def test_prefixes_of_another_salt_do_not_count() -> None:
    p = fleet("a", "b")
    p.place(0.0, "s1", "edge", SYSTEM, salt="alice")
    p.place(0.0, "s2", "edge", fresh(1), salt="bob")
    for name in ("a", "b"):
        p.reported(1.0, name, 0)
    p.place(1.0, "s3", "edge", fresh(2), salt="bob")
    assert p.place(1.0, "s4", "edge", SYSTEM, salt="bob") == Choice("b", Reason.LOAD, 0)
    assert p.place(1.0, "s5", "edge", SYSTEM, salt="alice").shared == len(SYSTEM)


def test_a_replica_with_an_overdue_report_is_passed_over() -> None:
    p = fleet("a", "b")
    p.place(0.0, "s0", "key", SYSTEM)
    p.late("a")
    assert [p.place(1.0, name, "key", SYSTEM).replica for name in ("s0", "s1", "s2")] == ["b"] * 3
    p.late("b")
    assert p.place(1.0, "s3", "key", fresh(3)).replica == "a"  # no other is left
    p.reported(2.0, "a", 0)
    assert [p.place(2.0, f"t{n}", "key", fresh(n)).replica for n in range(3)] == ["a"] * 3
    p.late("nobody")
