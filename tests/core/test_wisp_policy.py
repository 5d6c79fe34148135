"""The wisp policy: what takes part, what is left out, and what a draft token costs. Rules common to all policies are
in test_policies."""

from __future__ import annotations

import math
import random

import msgspec
import pytest

from wisp.core.verify.batching import Candidate, Kind, Plan, StepLimits, batching_policy
from wisp.core.verify.cost import Coefficients, CostModel

NOW = 50.0
LIMITS = StepLimits(2048, 256, {}, CostModel(Coefficients(step=30.0, token=0.4)))


def going(session: int, ahead_s: float, n_draft: int = 4) -> Candidate:
    """A draft, of a session whose next token is due in `ahead_s`."""
    return Candidate(
        session=session, kind=Kind.VERIFY if n_draft else Kind.DECODE, new=1 + n_draft, cached=200, n_draft=n_draft,
        since=NOW, opened=NOW - 9.0, due=NOW + ahead_s, tpot_s=0.125, expected_tokens=3.4, remaining=90,
        acceptance=0.8,
    )  # fmt: skip


def prompt(session: int, tokens: int, within_s: float) -> Candidate:
    """The prompt of a new session whose first token is due in `within_s`."""
    return Candidate(
        session=session, kind=Kind.PREFILL, new=tokens, cached=0, n_draft=0, since=NOW, opened=NOW,
        due=NOW + within_s, tpot_s=0.125, remaining=200, first=True,
    )  # fmt: skip


def settled(*candidates: Candidate, limits: StepLimits = LIMITS) -> tuple[Plan, float]:
    """The plan and the price of a policy that has seen these candidates before."""
    policy = batching_policy("wisp")
    for _ in range(3):
        plan = policy.plan(NOW, candidates, limits)
    return plan, policy.price


def granted(*candidates: Candidate, limits: StepLimits = LIMITS) -> dict[int, int]:
    """Tokens by session."""
    return {g.session: g.tokens for g in settled(*candidates, limits=limits)[0].grants}


def test_a_server_with_time_serves_everybody_at_once_however_far_ahead() -> None:
    sessions = [going(i, ahead) for i, ahead in enumerate((0.0, 0.5, 2.0, 9.0))]
    assert granted(*sessions).keys() == {0, 1, 2, 3}
    alike = [going(i, 2.0) for i in range(6)]
    assert granted(*alike, prompt(100, 30, 3.0)).keys() == {*range(6), 100}


def test_where_no_prompt_has_kv_the_first_goes_on_all_the_same() -> None:
    limits = StepLimits(2048, 256, {}, CostModel(Coefficients(step=30.0, token=0.4)), free_kv=36)
    assert granted(prompt(1, 60, 0.1), prompt(2, 50, 3.0), limits=limits).keys() == {1}
    assert granted(prompt(1, 60, 0.1), prompt(2, 30, 3.0), limits=limits).keys() == {2}
    assert granted(prompt(1, 60, 0.1), going(3, 1.0), limits=limits).keys() == {3}
    begun = msgspec.structs.replace(prompt(2, 50, 3.0), cached=12)
    assert granted(prompt(1, 60, 0.1), begun, limits=limits).keys() == {
        2
    }  # or they would take turns for ever


def test_sessions_ahead_are_left_out_where_others_are_late() -> None:
    late = [going(i, -0.8) for i in range(40)]
    ahead = [going(100 + i, 5.0) for i in range(40)]
    found = granted(*late, *ahead)
    assert all(s.session in found for s in late)
    assert not any(s.session in found for s in ahead)


def test_drafts_are_cut_as_the_step_fills_and_no_session_is_dropped_for_them() -> None:
    rows = []
    for n in (2, 20, 120):
        found = granted(*(going(i, 0.2, n_draft=12) for i in range(n)))
        assert len(found) == n
        rows.append(max(found.values()))
    assert rows[0] > rows[1] > rows[2] >= 1


def test_a_draft_ends_where_its_next_token_is_worth_less_than_its_row() -> None:
    """A late session's token is worth more, so its draft is longer."""
    found = granted(going(0, -0.5, n_draft=12), *(going(1 + i, 0.6, n_draft=12) for i in range(30)))
    assert found[0] > max(tokens for session, tokens in found.items() if session)


@pytest.mark.parametrize("n", [5, 40, 200])
def test_edges_are_told_to_draft_about_as_far_as_drafts_are_granted(n: int) -> None:
    policy = batching_policy("wisp")
    everybody = [going(i, -0.6 + 0.01 * (i % 150), n_draft=16) for i in range(n)]
    # No newcomers, whose delay drafts are charged with as well.
    limits = msgspec.structs.replace(LIMITS, tokens=10_000, answer_tokens=0.0)
    for _ in range(20):
        plan = policy.plan(NOW, everybody, limits)
    tokens = {g.session: g.tokens - 1 for g in plan.grants}
    for c in everybody:
        price = policy.price_of(NOW, c.due, c.tpot_s)
        worth_sending = sum(c.acceptance**k > price for k in range(1, 17))
        assert abs(tokens.get(c.session, 0) - worth_sending) <= 1


def test_a_draft_token_is_cheaper_for_a_session_that_is_later() -> None:
    policy = batching_policy("wisp")
    for _ in range(3):
        policy.plan(NOW, [going(i, 0.0) for i in range(5)], LIMITS)
    prices = [policy.price_of(NOW, NOW + ahead_s, 0.125) for ahead_s in (-1.0, -0.2, 0.0, 1.0, 5.0)]
    assert 0.0 < prices[0] < prices[1] < prices[2] < prices[3] < prices[4] <= 1.0
    assert policy.price == pytest.approx(prices[2], rel=0.02)  # all are due now
    without_slo = policy.price_of(NOW, math.inf, 0.0)
    assert prices[2] < without_slo < prices[4]  # due in 0.7 s


def test_the_price_rises_from_about_nothing_to_the_worth_of_a_row() -> None:
    prices = [settled(*(going(i, 0.2) for i in range(n)))[1] for n in (1, 10, 100)]
    assert prices[0] < 0.06
    assert prices[0] < prices[1] < prices[2] < 1.0
    late = settled(*(going(i, -3.0) for i in range(100)))[1]
    assert late == pytest.approx(
        prices[2], rel=0.02
    )  # in tokens, not in weights: lateness of all is no price


def test_prompts_come_first_as_their_first_token_comes_due() -> None:
    busy = [going(i, -0.3) for i in range(60)]
    assert 100 not in granted(*busy, prompt(100, 200, 3.0))
    assert granted(*busy, prompt(100, 200, 0.1))[100] > 0


def test_a_long_prompt_is_cut_where_its_step_would_delay_others_too_long() -> None:
    limits = msgspec.structs.replace(LIMITS, tokens=100_000, answer_tokens=2000.0)
    asked = msgspec.structs.replace(prompt(100, 8000, 3.7), remaining=2000)

    def rows(ahead_s: float) -> int:
        return granted(*(going(i, ahead_s) for i in range(20)), asked, limits=limits)[100]

    assert 0 < rows(0.1) < rows(0.8) < 8000
    assert rows(30.0) == 8000


def test_prompts_of_short_answers_wait_for_others_and_short_prompts_come_first() -> None:
    """A row is worth its share of the answer that it opens the way to."""
    busy = [going(i, 0.0) for i in range(3)]
    few = msgspec.structs.replace(LIMITS, answer_tokens=10.0)
    many = msgspec.structs.replace(LIMITS, answer_tokens=200.0)
    assert 100 not in granted(*busy, prompt(100, 400, 2.0), limits=few)
    assert granted(*busy, prompt(100, 400, 2.0), limits=many)[100] == 400
    first = settled(prompt(100, 500, 1.0), prompt(101, 100, 1.0), *busy)[0].grants
    assert next(g.session for g in first if g.session >= 100) == 101


def test_a_first_token_waits_for_no_draft_of_sessions_ahead() -> None:
    ahead, late = going(0, 5.0, n_draft=6), going(1, -0.2, n_draft=6)
    alone = granted(ahead, late)
    assert alone[0] > 1
    beside = granted(ahead, late, prompt(100, 50, 3.0))
    assert beside[100] == 50
    assert beside[0] == 1
    assert beside[1] == alone[1] > 1


def test_drafts_of_sessions_ahead_become_shorter_as_newcomers_wait_for_the_end_of_their_step() -> None:
    """The shorter answers are, the more often somebody comes. Sessions that are late keep their drafts."""
    often, seldom = (msgspec.structs.replace(LIMITS, answer_s=s) for s in (2.0, 1e6))
    ahead = [going(i, 3.0, n_draft=12) for i in range(30)]
    late = [going(i, -2.0, n_draft=12) for i in range(30)]
    assert sum(granted(*ahead, limits=often).values()) < 0.8 * sum(granted(*ahead, limits=seldom).values())
    assert granted(*ahead, limits=often).keys() == set(range(30))
    assert sum(granted(*late, limits=often).values()) > 0.9 * sum(granted(*late, limits=seldom).values())


def test_rows_of_a_prompt_are_cheap_up_to_the_knee_whatever_the_last_step_was() -> None:
    """Beyond the knee a row takes time, and the prompt is cut there rather than read in one long step."""
    cost = CostModel(Coefficients(step=40.0, token=0.001, beyond=0.4, knee=100))
    limits = StepLimits(4096, 256, {}, cost, answer_tokens=40.0)
    busy = [going(i, 0.0, n_draft=0) for i in range(3)]
    assert granted(*busy, prompt(100, 1000, 3.0), limits=limits)[100] == 97


def test_the_order_of_candidates_does_not_matter() -> None:
    sessions = [going(i, (i % 7 - 3) / 2) for i in range(60)]
    sessions += [prompt(100 + i, 200, i / 4) for i in range(8)]
    plan = settled(*sessions)[0]
    for seed in range(5):
        random.Random(seed).shuffle(sessions)
        assert settled(*sessions)[0] == plan


def test_a_prompt_leaves_no_session_out() -> None:
    """Prompts do not raise the rate that sessions are measured by."""
    sessions = [going(i, ahead) for i, ahead in enumerate((0.1, 0.6, 3.0, 9.0))]
    alone = granted(*sessions)
    for within_s in (3.0, 0.5, -0.5):
        found = granted(*sessions, prompt(100, 600, within_s))
        assert found.pop(100) > 0
        assert found.keys() == alone.keys() == {0, 1, 2, 3}


def test_work_without_slo_waits_for_late_sessions_but_not_for_long() -> None:
    late = [going(i, -0.4) for i in range(80)]
    plain = msgspec.structs.replace(going(200, 0.0), due=float("inf"), tpot_s=0.0)
    assert 200 not in granted(*late, plain)
    waited = msgspec.structs.replace(plain, since=NOW - 3.0)
    assert 200 in granted(*late, waited)


def test_no_session_waits_for_prompts_without_kv() -> None:
    sessions = [going(i, 0.1) for i in range(20)]
    crowd = [prompt(100 + i, 150, 0.6) for i in range(40)]
    limits = msgspec.structs.replace(LIMITS, free_kv=300.0)  # the sessions' drafts, a prompt, and a half
    found = granted(*sessions, *crowd, limits=limits)
    assert len(found.keys() & {s.session for s in sessions}) == 20
    assert len(found) == 21


def test_a_cost_model_with_free_steps_grants_everything() -> None:
    limits = StepLimits(2048, 256, {}, CostModel(Coefficients(step=0.0, token=0.0)))
    assert set(granted(going(1, 2.0), prompt(100, 150, 0.0), prompt(101, 150, -1.0), limits=limits)) == {
        1,
        100,
        101,
    }


def test_an_edge_that_drafts_is_waited_for_until_its_token_is_due() -> None:
    away = msgspec.structs.replace(going(1, 9.0, n_draft=0), edge_drafting=True)
    policy = batching_policy("wisp")
    plan = policy.plan(NOW, [away], LIMITS)
    assert not plan.grants
    assert plan.wake_at is not None
    assert NOW < plan.wake_at < NOW + 9.0
    assert policy.plan(plan.wake_at, [away], LIMITS).grants


def test_a_step_for_one_absent_edge_takes_others_along() -> None:
    """Its fixed cost is spent anyway."""
    away = [msgspec.structs.replace(going(i, i / 4, n_draft=0), edge_drafting=True) for i in range(20)]
    assert granted(*away).keys() == set(range(20))


def test_a_prompt_does_not_wait_for_sessions_that_can_make_up_for_it() -> None:
    def read(*ahead_s: float) -> int:
        busy = [going(i, ahead_s[i % len(ahead_s)], n_draft=0) for i in range(60)]
        return granted(*busy, prompt(100, 800, 2.0)).get(100, 0)

    assert read(0.8) == 800
    assert read(0.8, 0.0) == read(0.0) == 0


def test_a_prompt_comes_while_others_are_thousands_of_tokens_ahead() -> None:
    """Their urgency is about the smallest number that there is: its product with a row's time may be 0."""
    for ahead_s in range(2_500, 2_700):
        far = msgspec.structs.replace(going(1, float(ahead_s), 0), tpot_s=1.0)
        assert granted(far, prompt(2, 100, 2.0))[2] == 100
