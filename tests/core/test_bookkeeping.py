"""What a verifier says of itself, and what changes while it runs: counts, limits, resumed and doomed sessions."""

from __future__ import annotations

import msgspec
import pytest

from rig import SAMPLING, Rig
from toy import toy_text
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import KeyLimits
from wisp.core.verify.events import KeyLimitsChanged
from wisp.core.verify.states import State

ID = "session-1"
PROMPT = [1, 2, 3]
TEXT = toy_text(PROMPT, SAMPLING, 40)


def opening(session: str = ID, **changes: object) -> Open:
    return msgspec.structs.replace(Open(session, 0, PROMPT, SAMPLING, 40), **changes)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_session_without_a_slot_waits_and_takes_one_from_a_silent_session() -> None:
    rig = Rig(slots=1)
    verifier = rig.verifier
    rig.receive(opening("session-a"), connection=1)
    rig.settle()
    assert (verifier.n_waiting, verifier.evicted, verifier.kv.owned_tokens) == (0, 0, len(PROMPT))
    rig.receive(opening("session-b"), connection=2)
    assert not rig.dispatch()
    assert (verifier.n_waiting, verifier.evicted) == (1, 0)
    rig.now += 1.5
    rig.settle()
    assert (verifier.n_waiting, verifier.evicted) == (0, 1)
    rig.receive(Cancel("session-b"), connection=2)
    assert (verifier.kv.owned_tokens, verifier.kv.held) == (0, len(PROMPT))  # kept for a follow-up turn
    assert verifier.knows("session-a")
    assert not verifier.knows("session-b")


def test_a_silent_or_lost_session_keeps_no_place(rig: Rig) -> None:
    for i in range(3):
        rig.receive(opening(f"session-{i}"), connection=i)
    rig.settle()
    assert rig.verifier.kept_places(rig.now) == 3
    rig.lose(0)
    assert rig.verifier.kept_places(rig.now) == 2
    assert rig.verifier.kept_places(rig.now + rig.limits.park_s + 1.0) == 0


def test_new_limits_of_keys_hold_at_once(rig: Rig) -> None:
    rig.feed(KeyLimitsChanged({"a": KeyLimits(sessions=1)}))
    rig.receive(opening("session-1"), connection=1, key="a")
    rig.receive(opening("session-2"), connection=2, key="a")
    assert rig.refused(2).code == "rate_limit_exceeded"
    rig.feed(KeyLimitsChanged({}))
    rig.receive(opening("session-2"), connection=2, key="a")
    rig.settle()
    assert rig.text(1) == rig.text(2) == TEXT[:1]


def test_sessions_that_are_refused_for_their_slos_are_counted_and_the_others_go_on() -> None:
    rig = Rig(slots=16, kv_tokens=64, slo_admission=True)  # KV for one or two contexts at a time
    for i in range(16):
        rig.receive(opening(f"session-{i}", serve=True, slo=Slo(5000.0, 5000.0)), connection=i, key="a")
        rig.steps(1)
    rig.settle()
    refused = [i for i in range(16) if isinstance(rig.sent[i][0], Refused)]
    assert 0 < len(refused) < 16
    assert rig.verifier.admission.usage["a"].refused == len(refused)
    for i in set(range(16)) - set(refused):
        assert rig.text(i) == TEXT


def test_the_result_of_a_step_is_dropped_if_the_edge_has_more_tokens_by_then(rig: Rig) -> None:
    """Another verifier went on with the session, and it returns while its first step still runs here."""
    rig.receive(opening())
    rig.dispatch()
    rig.lose(1)
    rig.receive(opening(epoch=1, round=1, committed=TEXT[:3], draft=TEXT[3:5]), connection=2)
    rig.finish()
    rig.settle()
    (verdict,) = rig.verdicts(2)
    assert (verdict.round, verdict.base, verdict.accepted, verdict.tokens) == (1, 3, 2, TEXT[3:6])


def test_it_is_dropped_as_well_if_that_edge_is_lost_again(rig: Rig) -> None:
    rig.receive(opening())
    rig.dispatch()
    rig.lose(1)
    rig.receive(opening(epoch=1, round=1, committed=TEXT[:3]), connection=2)
    rig.lose(2)
    rig.finish()
    assert rig.verifier.sessions[1].state is State.PARKED
    rig.receive(opening(epoch=2, round=2, committed=TEXT[:3]), connection=3)
    rig.settle()
    assert rig.text(3) == TEXT[3:4]


def test_a_cancelled_session_whose_edge_is_lost_ends_once_with_its_step(rig: Rig) -> None:
    rig.receive(opening(draft=TEXT[:2]))
    rig.dispatch()
    rig.receive(Cancel(ID))
    rig.lose(1)
    rig.finish()
    assert [(e.session, e.why) for e in rig.ended] == [(ID, "abort")]
    assert rig.silent
    assert not rig.verifier.sessions
    rig.receive(opening(), connection=2)
    rig.settle()
    rig.receive(Draft(ID, 1, 1, []), connection=2)
    rig.settle()
    assert rig.text(2) == TEXT[:2]
