"""Fair shares of places between keys when all are taken."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rig import SAMPLING, Rig
from toy import toy_text
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import KeyLimits

PROMPT = [1, 2, 3]
TEXT = toy_text(PROMPT, SAMPLING, 40)
HOG, GUEST = 1, 2  # connections


def opening(session: str, **changes: object) -> Open:
    return msgspec.structs.replace(Open(session, 0, PROMPT, SAMPLING, 40), **changes)


def hogged(places: int = 4, **options: Any) -> Rig:
    """One key has taken all places and sends nothing more."""
    rig = Rig(max_sessions=places, **options)
    for n in range(places):
        rig.receive(opening(f"hogs-{n:04}"), connection=HOG, key="hog")
        rig.settle()
        rig.now += 1.0
    rig.now += 10.0
    rig.sent.clear()
    return rig


def held(rig: Rig) -> dict[str, int]:
    """Places by key."""
    return {key: usage.sessions for key, usage in rig.verifier.admission.usage.items() if usage.sessions}


def test_a_silent_key_with_all_places_shuts_no_other_out() -> None:
    rig = hogged(1024)
    rig.receive(opening("guest-0001"), connection=GUEST, key="guest")
    rig.settle()
    assert rig.verdict(GUEST).tokens == TEXT[:1]
    assert held(rig) == {"hog": 1023, "guest": 1}


def test_the_longest_silent_session_gives_way_and_its_edge_loses_no_token() -> None:
    rig = hogged(4)
    rig.receive(
        Draft("hogs-0000", 1, 1, TEXT[1:3]), connection=HOG, key="hog"
    )  # was silent longest until now
    rig.settle()
    assert rig.verdict(HOG).tokens == TEXT[1:4]
    rig.receive(opening("guest-0001"), connection=GUEST, key="guest")
    ended = rig.refused(HOG)
    assert (ended.session, ended.code, ended.fatal) == ("hogs-0001", "overloaded", True)
    assert ended.retry_after > 0
    rig.receive(Cancel("hogs-0003"), connection=HOG, key="hog")
    rig.receive(opening("hogs-0001", epoch=1, round=1, committed=TEXT[:1]), connection=HOG, key="hog")
    rig.settle()
    assert rig.verdict(HOG).tokens == TEXT[1:2]


def test_places_are_shared_evenly_between_keys() -> None:
    rig = hogged(9)
    for n in range(9):
        for connection, key in ((2, "a"), (3, "b")):
            rig.receive(opening(f"{key}-{n:08}"), connection=connection, key=key)
    assert held(rig) == {"hog": 3, "a": 3, "b": 3}
    rig.receive(opening("hogs-9999"), connection=HOG, key="hog")
    refused = list(rig.sent[HOG])[-1]
    assert isinstance(refused, Refused)
    assert (refused.session, refused.code, refused.retry_after) == ("hogs-9999", "overloaded", 1.0)


def test_without_silent_sessions_the_youngest_gives_way() -> None:
    rig = Rig(max_sessions=3, slots=3)
    for n in range(3):
        rig.receive(opening(f"busy-{n:04}", serve=True), connection=n, key="busy")
        rig.steps(2)
    rig.dispatch()  # all of them are in the engine now
    rig.receive(opening("guest-0001"), connection=9, key="guest")
    assert held(rig) == {"busy": 2, "guest": 1}
    rig.finish()
    rig.settle()
    last = list(rig.sent[2])[-1]
    assert isinstance(last, Refused)
    assert (last.session, last.code) == ("busy-0002", "overloaded")
    for n in range(2):
        assert rig.text(n) == TEXT
    assert held(rig) == {"guest": 1}


def test_a_single_key_keeps_all_places_from_its_own_new_sessions() -> None:
    rig = hogged(4)
    rig.receive(opening("hogs-9999"), connection=HOG, key="hog")
    assert rig.refused(HOG).code == "overloaded"
    assert held(rig) == {"hog": 4}


def test_an_edge_that_never_drafts_loses_its_place_like_a_lost_one() -> None:
    rig = hogged(4)
    rig.now += rig.limits.park_s
    rig.receive(opening("hogs-9999"), connection=HOG, key="hog")
    assert rig.refused(HOG).session == "hogs-0000"
    rig.settle()
    assert rig.verdict(HOG).session == "hogs-9999"


def test_a_parked_session_gives_way() -> None:
    rig = hogged(4)
    rig.lose(HOG)
    rig.receive(opening("hogs-9999"), connection=2, key="hog")
    rig.settle()
    assert rig.verdict(2).tokens == TEXT[:1]
    assert held(rig) == {"hog": 4}


def test_no_session_gives_way_to_one_that_is_refused() -> None:
    """The key's own limits are checked first."""
    rig = hogged(4, limits={"guest": KeyLimits(requests_per_minute=1)})
    rig.receive(opening("guest-0001"), connection=GUEST, key="guest")
    rig.receive(opening("guest-0002"), connection=GUEST, key="guest")
    assert rig.refused(GUEST).code == "rate_limit_exceeded"
    assert held(rig) == {"hog": 3, "guest": 1}


def test_a_session_cancelled_in_mid_step_frees_its_place_at_once() -> None:
    rig = Rig(max_sessions=1)
    rig.receive(opening("session-1", serve=True))
    rig.dispatch()
    rig.receive(Cancel("session-1"))
    rig.receive(opening("session-2"))
    rig.finish()
    rig.settle()
    assert rig.verdict().session == "session-2"
    assert held(rig) == {"": 1}


def test_a_session_opened_again_while_its_old_step_runs_is_admitted() -> None:
    rig = Rig(max_sessions=3, slots=3)
    for n in range(3):
        rig.receive(opening(f"busy-{n:04}", serve=True), connection=n, key="busy")
    rig.steps(2)
    rig.dispatch()
    rig.receive(opening("guest-0001"), connection=9, key="guest")
    rig.receive(Cancel("guest-0001"), connection=9, key="guest")
    heard = [t for v in rig.sent[2] if isinstance(v, Verdict) for t in v.tokens]
    rig.receive(opening("busy-0002", epoch=1, round=1, committed=heard, serve=True), connection=2, key="busy")
    rig.finish()
    rig.settle()
    texts = [t for v in rig.sent[2] if isinstance(v, Verdict) for t in v.tokens]
    assert texts == TEXT
    assert not rig.verifier.sessions
    assert rig.verifier.kv.owned_slots == 0


def test_the_last_step_of_an_ended_session_changes_nothing() -> None:
    rig = Rig()
    rig.receive(opening("session-1", serve=True))
    rig.dispatch()
    rig.receive(Cancel("session-1"))
    rig.receive(opening("session-1", serve=True))  # another, under the same name
    rig.fail("out of memory")
    assert rig.silent
    rig.settle()
    assert rig.text(1) == TEXT


def test_silent_sessions_do_not_count_in_slo_admission() -> None:
    rig = hogged(
        12, kv_tokens=200, batching="wisp", slo_admission=True
    )  # beside all of them there is no room
    rig.receive(opening("guest-0001", slo=Slo(1000.0, 1000.0)), connection=GUEST, key="guest")
    rig.settle()
    verdict = rig.take(GUEST)
    assert isinstance(verdict, Verdict), verdict


@pytest.mark.parametrize("places", [1, 3])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_there_are_never_more_sessions_than_places(places: int, asked: list[tuple[str, bool]]) -> None:
    rig = Rig(max_sessions=places)
    for n, (key, step) in enumerate(asked):
        before = held(rig)
        rig.receive(opening(f"session-{n}"), connection=ord(key), key=key)
        after = held(rig)
        assert sum(after.values()) == min(sum(before.values()) + 1, places)
        assert after == {
            k: sum(s.key == k for s in rig.verifier.sessions.values() if s.has_place) for k in after
        }
        most = max(before.values(), default=0)
        if before.get(key, 0) + 1 < most:  # somebody has more: there is a place for it
            assert after[key] == before.get(key, 0) + 1
        if step and rig.dispatch():
            rig.finish()
    rig.settle(1000)
