"""Drafting policies on hand-made views: where a draft ends, what is sent, who decodes, and drafting ahead."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from wisp.core.draft.policies import (
    POLICIES,
    STOPPING_IN_TIME,
    Ahead,
    Confidence,
    DraftingPolicy,
    Fixed,
    Gain,
    Judgement,
    Policies,
    Predicted,
    View,
)
from wisp.core.draft.predictor import FEATURES, Predictor
from wisp.core.draft.round_times import RoundTimes
from wisp.core.draft.signals import Signal
from wisp.core.errors import ConfigError
from wisp.engines.build import read_predictor

N = len(FEATURES)


def predictor(threshold: float = 0.6) -> Predictor:
    """Believes the drafter's own confidence."""
    weights = [[1.0 if name == "logit_confidence" else 0.0] for name in FEATURES]
    return Predictor([0.0] * N, [1.0] * N, [(weights, [0.0])], {"threshold": threshold})


def judgement(threshold: float = 0.6) -> Judgement:
    return Judgement(predictor(threshold), None, None, 0.0)


def gain(longest: int = 16, *, server_mode: bool = True) -> Gain:
    return Gain(judgement(), longest, server_mode=server_mode)


def pace(
    draft_ms: float = 15.0,
    wait_ms: float = 60.0,
    token_ms: float = 0.0,
    acceptance: float = 0.8,
    price: float = 0.0,
) -> RoundTimes:
    made = RoundTimes()
    made.draft.add(draft_ms)
    for i in range(70):
        k = i % 7
        made.verdict(k, wait_ms + token_ms * k, 2.0, 10.0 + token_ms * k)
    made.price = price
    made.acceptance.value = acceptance
    return made


def view(
    p: Sequence[float] = (),
    made: RoundTimes | None = None,
    *,
    sent: int = 0,
    now_ms: float = 0.0,
    sent_ms: float = 0.0,
) -> View:
    made = made or pace()
    return View(now_ms, list(p), sent, sent, sent_ms + made.wait_ms(sent), made)


def drafted(policy: DraftingPolicy, made: RoundTimes, p: Sequence[float] = (0.8,) * 64) -> list[float]:
    """The draft that a policy builds and sends, if tokens turn out to have these probabilities."""
    chain: list[float] = []
    while policy.more(view(chain, made)):
        chain.append(p[len(chain)])
    return chain[: policy.take(view(chain, made))]


# --- the simple ones


@pytest.mark.parametrize("k", [1, 4, 64])
def test_fixed_drafts_and_sends_k_however_doubtful(k: int) -> None:
    assert len(drafted(Fixed(k), pace(), [0.01] * 64)) == k


def test_fixed_counts_unsent_tokens_only() -> None:
    assert Fixed(2).more(view([0.9] * 5, sent=4))
    assert not Fixed(2).more(view([0.9] * 6, sent=4))
    assert Fixed(2).take(view([0.9] * 5)) == 2


@pytest.mark.parametrize("name", ["fixed", "gain"])
@pytest.mark.parametrize("k", ["0", "-1", "33", "4.7", "nan", "inf", "many"])
def test_lengths_are_1_to_32(name: str, k: str) -> None:
    with pytest.raises(ConfigError, match="1 to 32"):
        Policies(f"{name}:{k}", read_predictor())


def test_confidence_leaves_out_the_first_doubtful_token_and_all_behind_it() -> None:
    policy = Confidence(0.4)
    assert drafted(policy, pace(), [0.9, 0.4, 0.39, 0.9]) == [0.9, 0.4]
    assert drafted(policy, pace(), [0.1, 0.9]) == []
    assert policy.take(view([0.9, 0.3, 0.9, 0.9])) == 1  # drafted ahead, found doubtful later


def test_confidence_looks_at_unsent_tokens_only() -> None:
    assert Confidence(0.4).more(view([0.1], sent=1))
    assert Confidence(0.4).take(view([0.1, 0.5], sent=1)) == 1


def test_no_draft_is_longer_than_longest() -> None:
    sure = [0.999] * 64
    assert len(drafted(Confidence(0.4, longest=5), pace(), sure)) == 5
    assert len(drafted(Predicted(judgement(), longest=6), pace(), sure)) == 6
    eager = pace(draft_ms=0.1, wait_ms=2000.0, acceptance=0.99)
    assert len(drafted(gain(7), eager, sure)) == 7
    assert gain(7).take(view(sure, eager)) == 7


@pytest.mark.parametrize("name", ["confidence", "predictor"])
@pytest.mark.parametrize("least", ["0", "1.0", "-0.5", "4", "nan", "sure"])
def test_thresholds_are_probabilities(name: str, least: str) -> None:
    with pytest.raises(ConfigError, match="probability"):
        Policies(f"{name}:{least}", read_predictor())


def test_predicted_stops_at_the_predictors_own_threshold_unless_told() -> None:
    """The token that stopped it is sent, too."""
    p = [0.9, 0.65, 0.55, 0.45, 0.35]
    assert drafted(Predicted(judgement(0.6)), pace(), p) == p[:3]
    assert drafted(Predicted(judgement(0.6), 0.5), pace(), p) == p[:4]


def test_predicted_judges_by_the_predictor_and_confidence_by_the_drafter() -> None:
    signal = Signal(confidence=0.9, entropy=1.0)
    doubtful = Predictor([0.0] * N, [1.0] * N, [([[0.0]] * N, [-2.0])])
    assert Predicted(Judgement(doubtful, None, None, 0.0)).judge(signal, []).p == pytest.approx(
        0.1192, abs=1e-4
    )
    assert Confidence(0.4).judge(signal, []).p == 0.9


@pytest.mark.parametrize("policy", [Fixed(4), Confidence(0.4), Predicted(judgement())])
def test_simple_policies_never_leave_it_to_the_verifier(policy: DraftingPolicy) -> None:
    assert not policy.serve(view([], pace(draft_ms=5000.0, wait_ms=500.0)))


# --- gain: length


def test_gain_does_not_leave_it_to_a_verifier_that_tells_no_times() -> None:
    made = RoundTimes()
    made.drafted(15.0)
    for k in range(7):
        made.verdict(k, 60.0, 0.0, 0.0)
    assert made.serve_ms == 0.0
    assert not gain().serve(view([], made))


def test_gain_drafts_longer_when_the_round_trip_is_long() -> None:
    lengths = [len(drafted(gain(), pace(wait_ms=wait))) for wait in (30.0, 100.0, 400.0, 1500.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] + 4 <= lengths[-1]


def test_gain_drafts_longer_when_drafting_is_cheap() -> None:
    lengths = [len(drafted(gain(), pace(draft_ms=d))) for d in (60.0, 20.0, 5.0, 1.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] + 4 <= lengths[-1]


def test_gain_drafts_shorter_when_verifying_is_dear() -> None:
    lengths = [len(drafted(gain(), pace(draft_ms=1.0, token_ms=t))) for t in (20.0, 5.0, 0.5)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_gain_stops_at_low_survival() -> None:
    policy, made = gain(), pace()
    assert policy.more(view([0.95], made))
    assert not policy.more(view([0.95, 0.05], made))
    assert not policy.more(view([0.4] * 3, made))  # each is likelier than that; all of them are not


def test_gain_is_close_to_the_best_fixed_length_where_all_tokens_are_alike() -> None:
    for wait in (60.0, 200.0, 600.0):
        made = pace(draft_ms=10.0, wait_ms=wait)
        best = max(range(17), key=lambda k: sum(0.8**i for i in range(k + 1)) / (10.0 * k + wait))
        assert abs(len(drafted(gain(), made)) - best) <= 1


def test_gain_sends_only_tokens_whose_survival_exceeds_the_price() -> None:
    p = [0.9, 0.8, 0.6, 0.9]  # survival 0.9, 0.72, 0.43, 0.39
    for price, n in ((0.0, 4), (0.41, 3), (0.5, 2), (0.75, 1), (0.95, 0)):
        assert gain().take(view(p, pace(price=price))) == n


def test_gain_drafts_and_sends_nothing_at_a_high_price() -> None:
    made = pace(draft_ms=1.0, wait_ms=400.0, price=1.0)
    assert drafted(gain(), made, [0.99] * 64) == []
    assert drafted(gain(), pace(draft_ms=1.0, wait_ms=400.0), [0.99] * 64) != []


def test_gain_looks_at_unsent_tokens_only() -> None:
    assert gain().take(view([0.1, 0.9, 0.9], sent=1)) == 2
    assert gain().more(view([0.05, 0.05], sent=2))


# --- gain: server mode


def served(made: RoundTimes, times_drafted: float, longest: int = 16) -> RoundTimes:
    """The verifier alone was seen to be this much faster than drafting is believed to be."""
    made.served.value = 1.0 / (times_drafted * STOPPING_IN_TIME * made.best_speed(longest))
    made.served.n = 10
    return made


def test_a_device_slower_than_the_verifier_lets_it_decode() -> None:
    assert gain().serve(view([], pace(draft_ms=200.0, wait_ms=60.0)))  # and the verifier needs 12 ms
    assert not gain().serve(view([], served(pace(draft_ms=2.0, wait_ms=60.0), 0.7)))
    assert not gain(server_mode=False).serve(view([], pace(draft_ms=200.0, wait_ms=60.0)))


def test_server_mode_is_left_again_when_drafting_pays() -> None:
    policy = gain()
    assert policy.serve(view([], pace(draft_ms=200.0)))
    assert not policy.serve(view([], served(pace(draft_ms=5.0, wait_ms=60.0), 0.8)))
    assert policy.serve(view([], pace(draft_ms=200.0)))


def test_a_little_faster_is_not_reason_enough_to_change_over() -> None:
    drafting, serving = gain(), gain()
    assert serving.serve(view([], served(pace(), 1.5)))
    close = served(pace(), 1.05)
    assert not drafting.serve(view([], close))
    assert serving.serve(view([], close))
    assert drafting.serve(view([], served(pace(), 1.15)))
    assert not serving.serve(view([], served(pace(), 0.95)))


def test_nobody_changes_over_before_anything_is_measured() -> None:
    made = RoundTimes()
    made.draft.add(500.0)
    assert not gain().serve(view([], made))
    made.verdict(0, 60.0, 0.0, 10.0)
    assert not gain().serve(view([], made))
    made.verdict(0, 60.0, 0.0, 10.0)
    assert gain().serve(view([], made))


# --- drafting ahead


def test_ahead_always_drafts_while_waiting_is_longer_than_a_step() -> None:
    for acceptance in (0.3, 0.8, 0.99):
        made = pace(draft_ms=20.0, wait_ms=300.0, acceptance=acceptance)
        for p in ([0.9, 0.9], [0.5], [0.9] * 3):
            flight = view([*p, 0.9], made, sent=len(p), now_ms=100.0)
            assert Ahead(energy=0.0).worth(flight)


def test_ahead_drafts_nothing_that_the_price_would_keep_from_being_sent() -> None:
    made = pace(draft_ms=20.0, wait_ms=300.0, acceptance=0.8)
    # Behind the guess at the verdict's own token: 0.6.
    flight = view([0.9, 0.9, 0.9, 0.6], made, sent=2, now_ms=100.0)
    for price, worth in ((0.0, True), (0.4, True), (0.6 * 0.8 + 0.01, False)):
        assert Ahead(energy=0.0).worth(flight, price) is worth
    may_be_sent = view([0.9, 0.9, 0.9], made, sent=2, now_ms=100.0)
    assert Ahead(energy=0.0).worth(may_be_sent, 0.5)


def test_ahead_never_delays_a_likely_restart() -> None:
    made = pace(draft_ms=100.0, wait_ms=120.0)
    late = 110.0  # the verdict is due in 10 ms
    assert not Ahead(energy=0.0).worth(view([0.5, 0.5, 0.8], made, sent=2, now_ms=late))
    assert Ahead(energy=0.0).worth(view([0.99, 0.99, 0.99], made, sent=2, now_ms=late))
    assert Ahead(energy=0.0).worth(view([0.5, 0.5, 0.8], made, sent=2, now_ms=5.0))


def test_ahead_drafts_while_the_prompt_is_being_read() -> None:
    made = RoundTimes()
    made.draft.add(100.0)
    assert Ahead().worth(view([], made))


def test_ahead_obeys_energy() -> None:
    made = pace(draft_ms=20.0, wait_ms=500.0, acceptance=0.9)
    flight = view([0.8, 0.5, 0.5], made, sent=2)  # 0.2 that all are right, 0.18 that one more is, too
    assert Ahead(energy=0.15).worth(flight)
    assert not Ahead(energy=0.19).worth(flight)
    assert not Ahead(energy=1.1).worth(view([], made))
    for first in (view([], RoundTimes()), view([0.5], RoundTimes(), sent=1)):
        assert not Ahead(energy=0.9).worth(first)


def test_ahead_obeys_longest() -> None:
    made = pace(draft_ms=10.0, wait_ms=800.0)
    for longest in (1, 3):
        assert Ahead(0.0, longest).worth(view([0.99] * (4 + longest - 1), made, sent=4))
        assert not Ahead(0.0, longest).worth(view([0.99] * (4 + longest), made, sent=4))
    assert not Ahead(0.0, 0).worth(view([0.99] * 4, made, sent=4))


# --- by name


def test_every_name_makes_a_policy_that_drafts() -> None:
    for name in POLICIES:
        assert Policies(name, predictor()).make().more(view([], pace(draft_ms=1.0)))


@pytest.mark.parametrize(
    ("spec", "length"),
    [
        ("fixed", 4),
        ("fixed:7", 7),
        ("confidence:0.85", 0),
        ("confidence", 16),
        ("gain:3", 3),
        ("predictor:0.85", 1),
    ],
)
def test_arguments_reach_the_policy(spec: str, length: int) -> None:
    made = pace(draft_ms=0.5, wait_ms=1000.0)
    assert len(drafted(Policies(spec, predictor()).make(), made)) == length


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("", "choose one of: fixed, confidence, predictor, gain"),
        ("best", "choose one of: fixed, confidence, predictor, gain"),
        ("Fixed:4", "choose one of"),
        ("fixed:many", "1 to 32"),
        ("fixed:0", "1 to 32 tokens, e.g. fixed:4"),
        ("fixed:33", "1 to 32"),
        ("confidence:2", "e.g. confidence:0.4"),
        ("confidence:x", "probability"),
        ("confidence:nan", "probability"),
        ("predictor:x", "probability"),
        ("gain:x", "1 to 32"),
    ],
)
def test_a_bad_policy_is_refused_at_once_with_advice(spec: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        Policies(spec, predictor())


@pytest.mark.parametrize("spec", ["predictor", "predictor:0.5", "gain"])
def test_without_a_predictor_it_says_how_to_get_one(spec: str) -> None:
    with pytest.raises(ConfigError, match="wisp train"):
        Policies(spec)
    Policies("fixed:3")
    Policies("confidence")


def test_the_next_session_starts_from_what_the_last_learned() -> None:
    policies, others = Policies("gain", predictor()), Policies("gain", predictor())
    signal = Signal(confidence=0.9)
    first, second = policies.make(), policies.make()
    before = second.judge(signal, []).p
    for _ in range(150):
        first.observe([first.judge(signal, [])], 0)
    assert second.judge(signal, []).p < before - 0.3
    assert policies.make().judge(signal, []).p == second.judge(signal, []).p
    assert others.make().judge(signal, []).p == before


def test_ngrams_are_learned_apart_and_shared_as_well() -> None:
    policies = Policies("gain", predictor())
    counted, own = Signal(confidence=0.9, counted=True), Signal(confidence=0.9)
    first, second = policies.make(), policies.make()
    before = second.judge(own, []).p
    for _ in range(150):
        first.observe([first.judge(counted, [])], 0)
    assert second.judge(counted, []).p < 0.6
    assert second.judge(own, []).p == before


def test_the_papers_policy_does_not_learn() -> None:
    policy = Policies("predictor", predictor()).make()
    signal = Signal(confidence=0.9)
    before = policy.judge(signal, []).p
    for _ in range(150):
        policy.observe([policy.judge(signal, [])], 0)
    assert policy.judge(signal, []).p == before


def test_server_mode_can_be_forbidden_for_all() -> None:
    slow = view([], pace(draft_ms=200.0))
    assert Policies("gain", predictor()).make().serve(slow)
    assert not Policies("gain", predictor(), server_mode=False).make().serve(slow)


def test_the_temperature_reaches_the_predictor() -> None:
    weights = [[1.0 if name == "sampled" else 0.0] for name in FEATURES]
    policies = Policies("gain", Predictor([0.0] * N, [1.0] * N, [(weights, [0.0])]))
    assert policies.make(0.7).judge(Signal(0.5), []).z == 1.0
    assert policies.make().judge(Signal(0.5), []).z == 0.0
