"""What followed the same words before."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest

from wisp.core.history import EACH, GRAM, LONGEST, Acceptance, Histories, History, Match


def text(tokens: Sequence[int]) -> array[int]:
    return array("I", tokens)


def said(*texts: Sequence[int]) -> History:
    history = History()
    for name, tokens in enumerate(texts, 1):
        history.extend(name, text(tokens), 0)
    return history


def test_what_followed_in_another_text_is_found() -> None:
    assert said([9, 1, 2, 3, 4, 5, 6]).find(7, text([8, 1, 2, 3]), 2) == Match([4, 5], 3)


def test_the_last_time_counts() -> None:
    assert said([1, 2, 3, 4], [1, 2, 3, 5]).find(7, text([1, 2, 3]), 4) == Match([5], 3)


def test_what_is_new_or_too_short_or_has_no_sequel_is_not_found() -> None:
    history = said([1, 2, 3, 4])
    assert history.find(7, text([1, 2, 9]), 4) is None
    assert history.find(7, text([3]), 4) is None
    assert history.find(7, text([2, 3, 4]), 4) is None
    assert History().find(7, text([1, 2, 3]), 4) is None


def test_a_match_is_as_long_as_both_agree_backwards() -> None:
    words = list(range(100, 120))
    history = said([1, *words, 50])
    for n in range(GRAM, 20):
        assert history.find(7, text([2, *words[-n:]]), 1) == Match([50], min(n, LONGEST))


def test_a_text_that_repeats_itself_goes_on_in_the_guess() -> None:
    own = text([7, 8, 9, 7, 8, 9, 7, 8, 9])
    history = History()
    history.extend(1, own, 0)
    assert history.find(1, own, 7) == Match([7, 8, 9, 7, 8, 9, 7], 6)
    assert history.find(2, own, 7) == Match([7, 8, 9], 6)  # another text ends where it ends


def test_a_text_grows_by_its_new_tokens() -> None:
    rng = random.Random(5)
    tokens = [rng.randrange(6) for _ in range(500)]
    whole, parts, known = said(tokens), History(), 0
    while known < len(tokens):
        end = min(len(tokens), known + rng.randint(0, 9))
        parts.extend(1, text(tokens[:end]), known)
        known = end
    assert parts.held == whole.held == 500
    for _ in range(200):
        asked = text([rng.randrange(6) for _ in range(12)])
        assert parts.find(2, asked, 5) == whole.find(2, asked, 5)


def test_what_is_known_from_another_text_is_not_kept_again() -> None:
    shared = list(range(100))
    history = said([*shared, 200, 201])
    history.extend(2, text([*shared, 300, 301]), 100)
    assert history.held == 102 + LONGEST + 2
    assert history.find(3, text(shared), 2) == Match([300, 301], LONGEST)


def test_what_is_found_really_followed() -> None:
    rng = random.Random(1)
    texts = [[rng.randrange(5) for _ in range(60)] for _ in range(20)]
    history = said(*texts)
    found = 0
    for _ in range(300):
        asked = [rng.randrange(5) for _ in range(9)]
        match = history.find(99, text(asked), 4)
        if match is not None:
            found += 1
            run = asked[-match.length :] + match.tokens
            assert any(run == t[i : i + len(run)] for t in texts for i in range(60))
    assert found > 100


def test_the_oldest_text_goes_first_and_takes_only_its_own_places() -> None:
    history = said([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 9])
    history.drop_oldest()
    assert history.held == 8
    assert history.find(7, text([1, 2, 3]), 1) == Match([9], 3)
    history.drop_oldest()
    assert history.find(7, text([5, 6, 7]), 1) is None


def test_a_text_that_was_dropped_goes_on_with_what_is_new() -> None:
    history = said(list(range(50)))
    history.drop_oldest()
    history.extend(1, text(range(60)), 50)
    assert history.find(2, text([50, 51, 52]), 2) == Match([53, 54], 3)
    assert history.find(2, text([20, 21, 22]), 2) is None


def test_histories_are_apart() -> None:
    histories = Histories[tuple[str, str]](100)
    histories.extend(("a", ""), 1, text([1, 2, 3, 4]), 0)
    histories.extend(("a", "salt"), 2, text([1, 2, 3, 5]), 0)
    one, other = histories.of(("a", "")), histories.of(("a", "salt"))
    assert one is not None
    assert other is not None
    assert one.find(9, text([1, 2, 3]), 1) == Match([4], 3)
    assert other.find(9, text([1, 2, 3]), 1) == Match([5], 3)
    assert histories.of(("b", "")) is None


def test_the_history_used_least_recently_goes_for_want_of_room_then_old_texts() -> None:
    histories = Histories[str](30 + 2 * EACH)
    for name, whose in enumerate(("a", "b", "c"), 1):
        histories.extend(whose, name, text(range(10)), 0)
    histories.extend("a", 1, text(range(12)), 10)
    assert (histories.held, set(histories)) == (22, {"a", "c"})
    for name in range(4, 10):
        histories.extend("c", name, text(range(100 * name, 100 * name + 10)), 0)
    assert (histories.held, set(histories)) == (50, {"c"})
    last = histories.of("c")
    assert last is not None
    assert last.find(99, text([900, 901, 902]), 1) is not None
    assert last.find(99, text([400, 401, 402]), 1) is None


def test_many_tiny_histories_take_room_as_well() -> None:
    """Whoever asks with a new salt each time cannot fill the memory with histories of hardly any tokens."""
    histories = Histories[int](1200)
    for whose in range(500):
        histories.extend(whose, whose, text([1, 2, 3]), 0)
    assert set(histories) == set(range(500 - 1212 // (EACH + 3), 500))


def test_a_text_larger_than_all_the_room_is_not_kept() -> None:
    histories = Histories[str](30)
    histories.extend("a", 1, text(range(50)), 0)
    assert histories.held == 0
    histories.extend("a", 1, text(range(60)), 50)
    assert histories.held == 10 + LONGEST


def test_the_room_adds_up_whatever_happens() -> None:
    rng = random.Random(2)
    histories, texts = Histories[str](200), {(w, n): list[int]() for w in "abc" for n in range(6)}
    for _ in range(500):
        whose, name = rng.choice(list(texts))
        tokens = texts[whose, name]
        known = len(tokens)
        tokens += [rng.randrange(9) for _ in range(rng.randint(0, 12))]
        histories.extend(whose, name, text(tokens), known)
        if rng.random() < 0.02:
            histories.drop([whose])
        histories_held = [h.held for w in histories if (h := histories.of(w)) is not None]
        assert histories.held == sum(histories_held) <= 200


def test_what_is_dropped_is_gone() -> None:
    histories = Histories[str](100)
    histories.extend("a", 1, text([1, 2, 3, 4]), 0)
    histories.drop(["a", "never"])
    assert histories.of("a") is None
    assert histories.held == 0


def test_longer_matches_are_believed_more_before_any_was_seen() -> None:
    acceptance = Acceptance()
    values = [acceptance.of(n) for n in range(GRAM, LONGEST + 4)]
    assert values == sorted(values)
    assert 0.0 < values[0] < values[-1] < 1.0


@pytest.mark.parametrize(("comes", "least", "most"), [(4, 0.95, 0.99), (5, 0.0, 0.02)])
def test_acceptance_is_learnt_by_the_length_of_the_match(comes: int, least: float, most: float) -> None:
    acceptance, untouched = Acceptance(), Acceptance()
    for _ in range(200):
        acceptance.learn(Match([4], 5), [comes, 1])
    assert least < acceptance.of(5) < most
    assert acceptance.of(4) == untouched.of(4)
    assert acceptance.of(6) == untouched.of(6)


def test_each_token_teaches_up_to_the_first_that_did_not_come() -> None:
    acceptance, before = Acceptance(), Acceptance()
    acceptance.learn(Match([1, 2, 3, 4], 5), [1, 9, 3, 4])
    assert acceptance.of(5) > before.of(5)
    assert acceptance.of(6) < before.of(6)
    assert acceptance.of(7) == before.of(7)
