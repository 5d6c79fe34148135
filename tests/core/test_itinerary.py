"""Where a session on a device goes: redirected, repeated, lost, back home, given up."""

from __future__ import annotations

import math

import msgspec
import pytest

from wisp.core.draft.itinerary import BOUNCE_S, HOME, MAX_LOSSES, Go, Home, Itinerary, Send
from wisp.core.draft.patience import Patience
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.protocol.messages import (
    VERSION,
    Branch,
    Cancel,
    Draft,
    Open,
    Redirect,
    Refused,
    Verdict,
    Welcome,
)
from wisp.core.protocol.sampling import Sampling

ME = "session-1"
WELCOME = Welcome(VERSION, "m", "f", 1000, [999], 512, 64, digest="d1")
OPEN = Open(ME, 0, [1, 2, 3], Sampling(), 20, digest="d1")
GIVE_UP_S = 30.0


def draft(round_: int) -> Draft:
    return Draft(ME, round_, round_, [7])


def verdict(round_: int = 0) -> Verdict:
    return Verdict(ME, round_, 0, 0, [5])


def itinerary(give_up_s: float = GIVE_UP_S, jitter: float = 1.0) -> Itinerary:
    return Itinerary(ME, Patience(give_up_s, 0.0), lambda: jitter)


def sent_to(address: str, made: Itinerary, now_s: float = 0.0, said: Open = OPEN) -> None:
    """It opens at home, and a router there sends it to `address`."""
    made.say(said)
    assert made.heard(HOME, Redirect(ME, address), now_s) == Go(address)


def served_at(address: str, made: Itinerary, now_s: float = 0.0, said: Open = OPEN) -> None:
    """Likewise, and it says its Open there."""
    sent_to(address, made, now_s, said)
    assert isinstance(made.heard(address, WELCOME, now_s), Send)


def test_a_session_at_a_verifier_stays_at_home() -> None:
    made = itinerary()
    assert made.say(OPEN) == [OPEN]
    assert made.heard(HOME, verdict(), 0.0) == verdict()
    assert made.say(draft(1)) == [draft(1)]
    assert made.at is HOME


def test_a_redirect_is_followed_and_what_was_said_is_repeated_there() -> None:
    made = itinerary()
    assert made.say(OPEN) == [OPEN]
    assert made.say(draft(1)) == [draft(1)]  # ahead of the answer, to a router that does not take it
    assert made.heard(HOME, Redirect(ME, "a:1"), 0.0) == Go("a:1")
    assert made.at == "a:1"
    assert made.say(draft(2)) == []  # nothing before the Open
    assert made.heard("a:1", WELCOME, 0.0) == Send([OPEN, draft(1), draft(2)], WELCOME)
    assert made.say(draft(3)) == [draft(3)]
    assert made.heard("a:1", verdict(), 0.0) == verdict()


@pytest.mark.parametrize(
    "said",
    [
        Draft(ME, 1, 1, [7, 8, 9]),
        Draft(ME, 1, 1, [7], branches=[Branch(1, 5, [6, 7])]),
        Draft(ME, 1, 1, [7], branches=[Branch(1, 5, []), Branch(0, 6, [])]),
    ],
    ids=["tokens", "a long branch", "branches"],
)
def test_a_session_is_opened_anew_where_its_drafts_are_more_than_is_taken(said: Draft) -> None:
    made, narrow = itinerary(), msgspec.structs.replace(WELCOME, max_draft=2, max_branches=1)
    made.say(OPEN)
    made.say(said)
    made.heard(HOME, Redirect(ME, "a:1"), 0.0)
    assert made.heard("a:1", narrow, 0.0) == narrow
    again = msgspec.structs.replace(OPEN, epoch=1)
    assert made.say(again) == [again]


def test_a_routers_refusal_of_a_draft_behind_the_open_is_ignored() -> None:
    made = itinerary()
    made.say(OPEN)
    made.say(draft(1))
    assert made.heard(HOME, Refused(ME, "unknown_session", "a router", round=1), 0.0) is None
    of_the_open = Refused(ME, "unknown_session", "never seen", round=0)
    assert made.heard(HOME, of_the_open, 0.0) == of_the_open


def test_messages_for_other_places_and_sessions_are_ignored() -> None:
    made = itinerary()
    sent_to("a:1", made)
    assert made.heard(HOME, Refused(ME, "overloaded", "too late"), 0.0) is None
    assert made.heard(HOME, Redirect(ME, "b:1"), 0.0) is None
    assert made.heard("a:1", Verdict("session-2", 0, 0, 0, [5]), 0.0) is None
    assert made.lost(HOME, 0.0) is None
    assert made.at == "a:1"


def test_a_redirect_without_an_open_is_ignored() -> None:
    made = itinerary()
    made.say(OPEN)
    made.heard(HOME, verdict(), 0.0)
    assert made.heard(HOME, Redirect(ME, "a:1"), 0.0) is None
    assert made.at is HOME


def test_a_session_that_was_served_comes_home_and_may_be_sent_back() -> None:
    made = itinerary()
    served_at("a:1", made)
    made.heard("a:1", verdict(), 0.0)
    assert made.lost("a:1", 1.0) == Home(0.0)
    assert made.at is HOME
    assert made.heard(HOME, WELCOME, 1.0) == WELCOME  # open it again
    assert made.say(OPEN) == [OPEN]


def test_the_router_is_told_which_verifier_never_answered() -> None:
    made = itinerary()
    sent_to("a:1", made)
    assert made.lost("a:1", 1.0, "connection refused") == Home(0.0)
    (said,) = made.say(OPEN)
    assert isinstance(said, Open)
    assert said.avoid == "a:1"
    assert made.heard(HOME, Redirect(ME, "b:1"), 1.0) == Go("b:1")
    assert made.heard("b:1", WELCOME, 1.0) == Send([said], WELCOME)


def test_a_verdict_ends_what_is_to_be_avoided() -> None:
    made = itinerary()
    sent_to("a:1", made)
    made.lost("a:1", 1.0)
    served_at("b:1", made)
    made.heard("b:1", verdict(), 1.0)
    made.lost("b:1", 2.0)
    assert made.say(OPEN) == [OPEN]


@pytest.mark.parametrize("code", ["overloaded", "shutting_down"])
def test_a_session_that_one_verifier_refuses_goes_home_and_avoids_it(code: str) -> None:
    made = itinerary()
    served_at("a:1", made)
    made.heard("a:1", verdict(), 0.0)
    assert made.heard("a:1", Refused(ME, code, "not here"), 1.0) == Home(0.0)
    (said,) = made.say(OPEN)
    assert isinstance(said, Open)
    assert said.avoid == "a:1"


def test_a_new_session_for_which_two_verifiers_have_no_room_is_refused_at_once() -> None:
    made = itinerary()
    served_at("a:1", made)
    refused = Refused(ME, "overloaded", "this verifier could not keep the pace asked for", 4.0, fatal=True)
    assert made.heard("a:1", refused, 0.0) == Home(0.0)
    served_at("b:1", made)
    assert made.heard("b:1", refused, 0.1) == refused


@pytest.mark.parametrize("begun", ["here", "elsewhere"])
def test_a_session_with_tokens_goes_on_looking_for_room(begun: str) -> None:
    made, resumed = itinerary(), msgspec.structs.replace(OPEN, committed=[5])
    if begun == "here":
        served_at("a:1", made)
        made.heard("a:1", verdict(), 0.0)
    else:
        served_at("a:1", made, said=resumed)
    for n in range(3):
        assert isinstance(made.heard("a:1", Refused(ME, "overloaded", "no room", 4.0), float(n)), Home)
        served_at("a:1", made, float(n), resumed)


@pytest.mark.parametrize("code", ["overloaded", "shutting_down", "unknown_session"])
def test_a_refusal_at_home_is_for_the_drafter(code: str) -> None:
    made = itinerary()
    made.say(OPEN)
    refused = Refused(ME, code, "no")
    assert made.heard(HOME, refused, 0.0) == refused


def test_a_session_that_its_verifier_forgot_is_opened_again_there() -> None:
    made = itinerary()
    served_at("a:1", made)
    forgotten = Refused(ME, "unknown_session", "who?", round=0)
    assert made.heard("a:1", forgotten, 0.0) == forgotten
    assert made.heard("a:1", WELCOME, 0.0) == WELCOME
    assert made.say(OPEN) == [OPEN]
    assert made.at == "a:1"


def test_an_open_said_under_way_replaces_the_one_before() -> None:
    made = itinerary()
    sent_to("a:1", made)
    made.say(draft(1))
    again = Open(ME, 1, [1, 2, 3], Sampling(), 20, round=2, digest="d1")
    assert made.say(again) == []
    assert made.heard("a:1", WELCOME, 0.0) == Send([again], WELCOME)


def test_trips_in_vain_wait_longer_each_time_and_a_verdict_ends_that() -> None:
    made = itinerary(math.inf, jitter=0.5)
    waits: list[float | None] = []
    for _ in range(8):
        sent_to("a:1", made)
        step = made.lost("a:1", 1.0)
        assert isinstance(step, Home)
        waits.append(step.after_s)
    assert waits == [0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert BOUNCE_S[1] * 0.5 == 1.0
    served_at("a:1", made)
    made.heard("a:1", verdict(), 1.0)
    assert made.lost("a:1", 1.0) == Home(0.0)


def test_a_session_that_is_only_sent_astray_ends_in_time() -> None:
    made = itinerary()
    for second in (0.0, 2.9, 5.8):  # no longer apart: that would be a device asleep
        sent_to("a:1", made)
        assert isinstance(made.lost("a:1", second, "refused"), Home)
    at = 5.8
    while at < GIVE_UP_S:
        sent_to("a:1", made)
        made.lost("a:1", at, "refused")
        at += 2.9
    sent_to("a:1", made)
    with pytest.raises(UnavailableError, match=r"a:1.*\(connection refused\); is that port open"):
        made.lost("a:1", at, "connection refused")


def test_a_request_that_kills_its_verifiers_ends_after_some_of_them() -> None:
    made = itinerary(give_up_s=1.0)
    for trip in range(MAX_LOSSES):
        served_at("a:1", made)
        assert isinstance(made.lost("a:1", 2.0 * trip), Home)
    served_at("a:1", made)
    with pytest.raises(RequestError, match="6 verifiers in a row") as error:
        made.lost("a:1", 2.0 * MAX_LOSSES)
    assert (error.value.status, error.value.code) == (502, "verifiers_lost")


def test_a_verifier_of_another_model_ends_the_session_before_it_is_told_anything() -> None:
    made = itinerary()
    sent_to("a:1", made)
    other = Welcome(VERSION, "m", "f", 1000, [999], 512, 64, digest="d2")
    with pytest.raises(RequestError, match="not the one that this answer was begun with") as error:
        made.heard("a:1", other, 0.0)
    assert error.value.code == "model_changed"


def test_a_lost_home_is_waited_for_and_opened_when_it_is_back() -> None:
    made = itinerary()
    made.say(OPEN)
    assert made.lost(HOME, 1.0) == Home(None)
    assert made.heard(HOME, WELCOME, 2.0) == WELCOME


def test_the_wait_for_home_begins_when_the_session_comes_there() -> None:
    patience = Patience(GIVE_UP_S, 0.0)
    attempt = patience.began(0.0)
    made = Itinerary(ME, patience)
    served_at("a:1", made)
    for second in range(100):  # home is gone all the time, and is not needed
        patience.beat(float(second))
    patience.failed(attempt)
    assert made.left_s(99.0) == 0.0
    made.lost("a:1", 99.0)
    assert made.left_s(99.0) == GIVE_UP_S


def test_a_user_who_leaves_cancels_where_the_session_is() -> None:
    made = itinerary()
    assert made.say(Cancel(ME)) == [Cancel(ME)]
    served_at("a:1", made)
    assert made.say(Cancel(ME)) == [Cancel(ME)]
    assert made.at == "a:1"
