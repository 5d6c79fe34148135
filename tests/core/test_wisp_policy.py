"""The wisp policy: prompts, slack and backlog. Rules common to all policies are in test_policies."""

from __future__ import annotations

import msgspec

from wisp.core.verify.batching import Candidate, Kind, StepLimits, batching_policy
from wisp.core.verify.cost import Coefficients, CostModel

NOW = 50.0
LIMITS = StepLimits(2048, 256, {}, CostModel(Coefficients(step=30.0, token=0.4)))


def going(session: int, ahead_s: float) -> Candidate:
    """A draft of four tokens, of a session whose next token is due in `ahead_s`."""
    return Candidate(
        session=session, kind=Kind.VERIFY, new=5, cached=200, n_draft=4, since=NOW, opened=NOW - 9.0,
        due=NOW + ahead_s, tpot_s=0.125, expected_tokens=3.4, round_tokens=3.0, remaining=90, lag_s=-ahead_s,
    )  # fmt: skip


def prompt(session: int, tokens: int, within_s: float) -> Candidate:
    """The prompt of a new session whose first token is due in `within_s`."""
    return Candidate(
        session=session, kind=Kind.PREFILL, new=tokens, cached=0, n_draft=0, since=NOW, opened=NOW,
        due=NOW + within_s, tpot_s=0.125, remaining=200, first=True,
    )  # fmt: skip


def granted(*candidates: Candidate) -> dict[int, int]:
    """Tokens by session."""
    return {g.session: g.tokens for g in batching_policy("wisp").plan(NOW, candidates, LIMITS).grants}


def test_sessions_with_much_slack_wait_for_a_crowd_of_prompts() -> None:
    sessions = [going(i, 2.0) for i in range(20)]
    few = granted(*sessions, prompt(100, 150, 3.0))
    assert all(s.session in few for s in sessions)
    assert few[100] == 150
    crowd = [prompt(100 + i, 150, 3.0) for i in range(40)]  # 6,000 tokens: 2.4 s of the engine's time
    found = granted(*sessions, *crowd)
    assert sum(s.session in found for s in sessions) <= 1
    # More than fits into a step without a crowd
    assert sum(tokens for session, tokens in found.items() if session >= 100) > 700


def test_sessions_that_cannot_catch_up_do_not_wait_for_a_crowd() -> None:
    # The hurried sessions have hardly any tokens left to catch up in
    hurried = [msgspec.structs.replace(going(i, 0.1), remaining=10) for i in range(10)]
    able = [going(10 + i, 0.1) for i in range(10)]
    relaxed = [going(20 + i, 2.0) for i in range(10)]
    crowd = [prompt(100 + i, 150, 3.0) for i in range(40)]
    found = granted(*hurried, *able, *relaxed, *crowd)
    assert all(found.get(s.session) == 5 for s in hurried)
    assert not any(s.session in found for s in (*able, *relaxed))
    assert sum(tokens for session, tokens in found.items() if session >= 100) > 1000


def test_prompts_with_time_are_no_crowd() -> None:
    sessions = [going(i, 2.0) for i in range(20)]
    found = granted(*sessions, *(prompt(100 + i, 150, 30.0) for i in range(40)))
    assert all(s.session in found for s in sessions)


def test_sessions_with_slack_for_less_than_a_long_step_do_not_wait() -> None:
    slow = StepLimits(2048, 256, {}, CostModel(Coefficients(step=24.0, token=1.1)))
    patient = {"tpot_s": 0.48, "round_tokens": 3.0}
    far = [msgspec.structs.replace(going(i, 3.0), **patient) for i in range(20)]
    near = [msgspec.structs.replace(going(20 + i, 0.65), remaining=6, **patient) for i in range(5)]
    crowd = [prompt(100 + i, 200, 3.0) for i in range(40)]
    plan = batching_policy("wisp").plan(NOW, [*far, *near, *crowd], slow)
    found = {g.session for g in plan.grants}
    assert found >= {w.session for w in near}
    assert not found & {w.session for w in far}


def test_prompts_that_fit_beside_all_drafts_are_no_crowd() -> None:
    sessions = [going(i, 2.0) for i in range(20)]
    found = granted(*sessions, prompt(100, 200, 0.4))
    assert all(s.session in found for s in sessions)
    late = msgspec.structs.replace(prompt(100, 4000, 0.4), slo_lost=True)
    assert all(s.session in granted(*sessions, late) for s in sessions)


def test_no_session_waits_for_prompts_without_kv() -> None:
    sessions = [going(i, 2.0) for i in range(20)]
    crowd = [prompt(100 + i, 150, 3.0) for i in range(40)]
    limits = msgspec.structs.replace(LIMITS, free_kv=300.0)  # the sessions' drafts, a prompt, and a half
    found = {g.session for g in batching_policy("wisp").plan(NOW, [*sessions, *crowd], limits).grants}
    assert found == {*range(20), 100}


def backlog_ms(*candidates: Candidate) -> float:
    return batching_policy("wisp").plan(NOW, candidates, LIMITS).left_ms


def test_sessions_with_little_slack_are_a_backlog() -> None:
    """No candidate is left out of these steps, yet there is not enough time for all."""
    assert backlog_ms(*(going(i, 2.0) for i in range(10))) == 0.0
    few = backlog_ms(*(going(i, 2.0) for i in range(9)), going(9, 0.01))
    many = backlog_ms(*(going(i, 0.01) for i in range(10)))
    assert 0.0 < few < many


def test_a_cost_model_with_free_steps_grants_everything() -> None:
    limits = StepLimits(2048, 256, {}, CostModel(Coefficients(step=0.0, token=0.0)))
    candidates = [going(1, 2.0), prompt(100, 150, 0.0), prompt(101, 150, -1.0)]
    found = {g.session for g in batching_policy("wisp").plan(NOW, candidates, limits).grants}
    assert found == {1, 100, 101}


def test_with_only_prompts_without_kv_the_policy_wakes_up_soon() -> None:
    away = msgspec.structs.replace(going(1, 9.0), edge_drafting=True, kind=Kind.DECODE, new=1, n_draft=0)
    limits = msgspec.structs.replace(LIMITS, free_kv=10.0)
    plan = batching_policy("wisp").plan(NOW, [away, prompt(100, 150, 2.9)], limits)
    assert not plan.grants
    assert plan.wake_at is not None
    assert NOW < plan.wake_at < NOW + 0.1
