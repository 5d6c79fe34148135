"""The price of a draft token: what it costs others."""

from __future__ import annotations

import pytest

from wisp.core.verify.congestion import CongestionPrice


def test_it_is_free_while_the_server_keeps_up() -> None:
    pressure = CongestionPrice()
    for _ in range(50):
        pressure.planned(100.0, 0.0)
        pressure.stepped(80, 100.0)
    assert pressure.price(0.4) == 0.0


def test_under_full_load_it_is_what_its_time_would_commit_elsewhere() -> None:
    pressure = CongestionPrice()
    for _ in range(200):
        pressure.planned(100.0, 500.0)
        pressure.stepped(80, 100.0)
    assert pressure.price(0.4) == pytest.approx(0.4 * 0.8, rel=1e-3)


def test_nothing_is_priced_before_a_step() -> None:
    assert CongestionPrice().price(0.4) == 0.0
