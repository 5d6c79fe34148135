"""The congestion price of a draft token."""

from __future__ import annotations

import pytest

from wisp.core.verify.congestion import CongestionPrice


def test_the_price_is_zero_without_backlog() -> None:
    congestion = CongestionPrice()
    for _ in range(50):
        congestion.planned(100.0, 0.0)
        congestion.stepped(80, 100.0)
    assert congestion.price(0.4) == 0.0


def test_at_full_load_the_price_is_the_tokens_that_its_time_would_commit() -> None:
    congestion = CongestionPrice()
    for _ in range(200):
        congestion.planned(100.0, 500.0)
        congestion.stepped(80, 100.0)
    assert congestion.price(0.4) == pytest.approx(0.4 * 0.8, rel=1e-3)


def test_the_price_is_zero_before_the_first_step() -> None:
    assert CongestionPrice().price(0.4) == 0.0
