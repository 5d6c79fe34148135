"""The values that hold a session's state, by example."""

from __future__ import annotations

import math

import pytest

from wisp.core.protocol.slo import Slo
from wisp.core.verify.session import RELAXED, TPOT_SHARE, TTFT_SHARE, Speed, Targets


def targets(ttft_ms: float = 1000.0, tpot_ms: float = 100.0) -> Targets:
    """Of a session that was opened at 10 s."""
    return Targets(Slo(ttft_ms, tpot_ms), 10.0, begun=False)


def test_due_times_follow_from_the_opening_and_then_from_the_first_token() -> None:
    made = targets()
    assert made.due(0) == pytest.approx(10.0 + TTFT_SHARE)
    made.first_at = 11.0
    assert made.due(5) == pytest.approx(11.0 + 5 * 0.1 * TPOT_SHARE)
    assert targets(ttft_ms=0.0).due(0) == math.inf
    only_first = targets(tpot_ms=0.0)
    only_first.first_at = 11.0
    assert only_first.due(5) == math.inf


def test_a_lost_slo_leaves_twice_the_time_from_then_on() -> None:
    made = targets()
    made.first_at = 11.0
    made.relax(20.0, 5)
    assert made.due(5) == pytest.approx(20.0)
    assert made.due(7) == pytest.approx(20.0 + 2 * RELAXED * 0.1 * TPOT_SHARE)
    waiting = targets()
    waiting.relax(20.0, 0)
    assert waiting.due(0) == pytest.approx(21.0)  # the first token has its whole target again


@pytest.mark.parametrize(("n_draft", "expected"), [(0, 1.0), (1, 1.5), (2, 1.75), (3, 1.875)])
def test_a_draft_is_expected_to_be_right_up_to_some_token(n_draft: int, expected: float) -> None:
    speed = Speed(0.0)
    speed.acceptance = 0.5
    assert speed.expected(n_draft) == pytest.approx(expected)


def test_acceptance_is_learnt_from_what_was_seen_and_no_further() -> None:
    speed = Speed(0.0)
    start = speed.acceptance
    speed.verified(3.0, 4, 0)
    assert speed.answered_at == 3.0
    assert speed.acceptance == pytest.approx(start * 0.96)  # one failure, whatever was drafted behind it
    speed.acceptance = 0.5
    speed.verified(4.0, 2, 2)
    assert speed.acceptance == pytest.approx(0.98 - (0.98 - 0.5) * 0.96**2)
    speed.committed(12)
    assert speed.round_tokens == pytest.approx(3.0)
