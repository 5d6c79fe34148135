"""Limits and shares of API keys."""

from __future__ import annotations

import pytest

from wisp.core.verify.admission import Admission, KeyLimits, Refusal


def test_a_full_verifier_refuses_with_a_time_to_come_back() -> None:
    admission = Admission(2)
    admission.opened(0.0, "a")
    admission.opened(0.0, "a")
    with pytest.raises(Refusal) as refusal:
        admission.opened(0.0, "b")
    assert (refusal.value.code, refusal.value.retry_after) == ("overloaded", 1.0)
    assert admission.usage["b"].refused == 1
    admission.closed("a")
    admission.opened(0.0, "b")


def test_sessions_per_key() -> None:
    admission = Admission(10, {"a": KeyLimits(sessions=1)})
    admission.opened(0.0, "a")
    with pytest.raises(Refusal, match="1 sessions"):
        admission.opened(0.0, "a")
    admission.opened(0.0, "b")


def test_requests_per_minute_refill() -> None:
    admission = Admission(100, {"a": KeyLimits(requests_per_minute=2)})
    admission.opened(0.0, "a")
    admission.opened(0.0, "a")
    with pytest.raises(Refusal) as refusal:
        admission.opened(0.0, "a")
    assert refusal.value.retry_after == pytest.approx(30.0)
    admission.opened(30.5, "a")


def test_ask_raises_what_opened_would_and_changes_nothing() -> None:
    limits = {
        "sessions": KeyLimits(sessions=1),
        "requests": KeyLimits(requests_per_minute=1),
        "tokens": KeyLimits(tokens_per_minute=60),
    }
    admission = Admission(100, limits)
    for key in limits:
        for _ in range(5):
            admission.ask(0.0, key)
        assert key not in admission.usage
        admission.opened(0.0, key)
    admission.served(0.0, "tokens", 100, 20)
    for key in limits:
        refusals = []
        for attempt in (admission.ask, admission.ask, admission.opened):
            with pytest.raises(Refusal) as refusal:
                attempt(1.0, key)
            refusals.append((str(refusal.value), refusal.value.retry_after))
        assert len(set(refusals)) == 1
        assert admission.usage[key].refused == 1
    admission.ask(1.0, "free")


def test_tokens_per_minute_are_charged_afterwards() -> None:
    admission = Admission(100, {"a": KeyLimits(tokens_per_minute=60)})
    admission.opened(0.0, "a")
    admission.served(0.0, "a", prompt_tokens=50, output_tokens=40)  # 30 overdrawn
    with pytest.raises(Refusal) as refusal:
        admission.opened(0.0, "a")
    assert refusal.value.retry_after == pytest.approx(31.0)
    admission.opened(31.0, "a")


def test_new_limits_reset_only_the_keys_that_they_change() -> None:
    limits = KeyLimits(requests_per_minute=1, tokens_per_minute=60)
    admission = Admission(100, {"a": limits, "b": limits, "c": limits})
    for key in "abc":
        admission.opened(0.0, key)
        admission.served(0.0, key, 0, 90)
    more = KeyLimits(requests_per_minute=1, tokens_per_minute=120)
    admission.set_limits({"a": limits, "b": more})
    with pytest.raises(Refusal) as refusal:
        admission.opened(0.0, "a")
    assert refusal.value.retry_after == pytest.approx(31.0)
    admission.opened(0.0, "b")
    admission.opened(0.0, "c")  # has no limits any more


def test_a_refused_request_costs_no_request() -> None:
    admission = Admission(100, {"a": KeyLimits(requests_per_minute=1, tokens_per_minute=60)})
    admission.opened(0.0, "a")
    admission.served(0.0, "a", 0, 120)
    with pytest.raises(Refusal):
        admission.opened(60.0, "a")
    admission.opened(62.0, "a")  # the request bucket had refilled and was not touched


def test_a_key_earns_no_claim_by_a_pause() -> None:
    admission = Admission(100)
    admission.opened(0.0, "busy")
    admission.served(0.0, "busy", 0, 1000)
    admission.opened(1.0, "late")
    assert admission.shares["late"] == admission.shares["busy"] == 1000.0


def test_usage_is_counted_per_key() -> None:
    admission = Admission(100)
    admission.opened(0.0, "a")
    admission.served(0.0, "a", 8, 2)
    admission.served(0.0, "a", 0, 3)
    usage = admission.usage["a"]
    assert (usage.requests, usage.prompt_tokens, usage.output_tokens) == (1, 8, 5)
    assert admission.shares["a"] == 8 * 0.25 + 5
