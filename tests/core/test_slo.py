"""SLO attainment and goodput, by example."""

from __future__ import annotations

import math

import msgspec
import pytest

from wisp.core.protocol.slo import Served, Slo, account, met

SLO = Slo(ttft_ms=500, tpot_ms=100)


def served(**changes: object) -> Served:
    base = Served(arrived=0.0, first=0.4, last=1.4, tokens=11, slo=SLO, ended=1.4)
    return msgspec.structs.replace(base, **changes)


def test_met_at_the_limit_and_missed_beyond() -> None:
    assert met(served(), now=2.0)
    assert served().tpot_ms == pytest.approx(100)
    assert not met(served(last=1.41), now=2.0)
    assert not met(served(first=0.6, last=1.0), now=2.0)


def test_one_token_has_only_a_ttft() -> None:
    assert met(served(tokens=1, last=0.4), now=2.0)
    assert served(tokens=1).tpot_ms == 0.0


def test_failed_requests_missed() -> None:
    assert not met(served(ok=False), now=2.0)
    assert not met(served(tokens=0, ended=0.1), now=2.0)


def test_unfinished_requests_miss_once_they_are_behind() -> None:
    waiting = served(tokens=0, first=0.0, last=0.0, ended=None)
    assert met(waiting, now=0.5)
    assert not met(waiting, now=0.51)
    going = served(tokens=5, last=0.8, ended=None)  # token 5 is due at 0.4 + 5 * 0.1
    assert met(going, now=0.9)
    assert not met(going, now=0.91)


def test_no_target_is_always_met() -> None:
    assert met(served(slo=Slo(), last=100.0, ended=100.0), now=200.0)


def test_account_counts_what_arrived_in_the_window() -> None:
    requests = [served(), served(arrived=1.0, first=1.2, last=9.0, ended=9.0), served(arrived=5.0)]
    result = account(requests, start=0.0, end=2.0, now=10.0)
    assert (result.arrived, result.met) == (2, 1)
    assert result.violation_rate == 0.5
    assert result.goodput == 11 / 2.0
    nothing = account([], 0.0, 1.0, 1.0)
    assert math.isnan(nothing.violation_rate)
    assert math.isnan(nothing.attainment)
    assert nothing.goodput == 0.0
