"""Rules that every batching policy keeps, for any candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wisp.core.verify.batching import POLICIES, Candidate, Grant, Kind, Plan, StepLimits, batching_policy
from wisp.core.verify.batching.paper import deadline
from wisp.core.verify.cost import Coefficients, CostModel, Load

NAMES = sorted(POLICIES)
COST = Coefficients(step=20.0, token=0.4, cached=0.0005)
NOW = 100.0


def limits(tokens: int, slices: int) -> StepLimits:
    return StepLimits(tokens, slices, {"a": 10.0}, CostModel(COST))


@st.composite
def pieces(
    draw: st.DrawFn, *, hurry: bool = True, drafting: bool = True, most: int = 16, longest: int = 900
) -> list[Candidate]:
    """Up to `most` candidates. Without `hurry`, none has an SLO."""
    out = []
    for session in range(draw(st.integers(0, most))):
        kind = draw(st.sampled_from(Kind))
        n_draft = 0 if kind is Kind.DECODE else draw(st.integers(int(kind is Kind.VERIFY), 12))
        missing = draw(st.integers(9, longest)) if kind is Kind.PREFILL else draw(st.integers(1, 8))
        has_slo = hurry and draw(st.booleans())
        first = kind is Kind.PREFILL and draw(st.booleans())
        away = drafting and kind is Kind.DECODE and draw(st.booleans())
        gain = draw(st.floats(1.0, n_draft + 1.0)) if n_draft else 1.0
        since = NOW - draw(st.floats(0.0, 3.0))
        out.append(
            Candidate(
                session=session,
                kind=kind,
                new=missing + n_draft,
                cached=draw(st.integers(0, 2000)),
                n_draft=n_draft,
                since=since,
                opened=since - draw(st.floats(0.0, 9.0)),
                key=draw(st.sampled_from(["", "a"])),
                due=NOW + draw(st.floats(-1.0, 3.0)) if has_slo else math.inf,
                tpot_s=draw(st.sampled_from([0.02, 0.1, 0.25])) if has_slo else 0.0,
                expected_tokens=gain,
                remaining=n_draft + draw(st.integers(1, 200)),
                edge_drafting=away,
                first=first,
                lag_s=draw(st.floats(-1.0, 1.0)) if has_slo and not first else 0.0,
                slo_lost=has_slo and draw(st.booleans()),
            )
        )
    return out


def seen(name: str, work: Sequence[Candidate]) -> list[Candidate]:
    """The candidates offered to that policy."""
    return [w for w in work if not w.edge_drafting or batching_policy(name).wants_drafting]


def total(work: Sequence[Candidate]) -> Load:
    load = Load()
    for w in work:
        load = load.plus(w.new, w.cached)
    return load


def planned(name: str, work: Sequence[Candidate], step: StepLimits) -> Plan:
    return batching_policy(name).plan(NOW, work, step)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "cost",
    [
        Coefficients(step=0.0, token=0.0),
        Coefficients(step=0.0, token=0.0, slice=5.0),
        Coefficients(step=5.0, token=0.0),
        Coefficients(step=0.0, token=5.0),
    ],
    ids=["free", "each slice", "each step", "each token"],
)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_policies_work_with_a_single_positive_cost_coefficient(
    name: str, cost: Coefficients, data: st.DataObject
) -> None:
    """All coefficients but one may be learned as 0, and a profile may have 0 for all."""
    work = list(seen(name, data.draw(pieces())))
    paceless = data.draw(st.booleans())
    work = [msgspec.structs.replace(w, tpot_s=0.0, slo_lost=False) if paceless else w for w in work]
    step = StepLimits(64, 8, {"a": 10.0}, CostModel(cost))
    plan = batching_policy(name).plan(NOW, work, step)
    assert {g.session for g in plan.grants} <= {w.session for w in work}
    assert cost.ms(Load()) > 0.0


# --- the paper's


def of_paper(work: list[Candidate]) -> list[int]:
    """The sessions in the paper's next step, which takes 10 ms and 30 for each slice."""
    step = StepLimits(64, 16, {}, CostModel(Coefficients(step=10.0, token=0.0, slice=30.0)))
    return [g.session for g in batching_policy("paper").plan(NOW, work, step).grants]


def decode(session: int, due: float, **changes: float) -> Candidate:
    made = Candidate(session, Kind.DECODE, 1, 10, 0, NOW - 1.0, NOW - 9.0, due=NOW + due)
    return msgspec.structs.replace(made, **changes)


def test_the_papers_policy_counts_the_cost_per_slice() -> None:
    """All four take 130 ms together, and one by itself 40 ms. Urgent is who could not wait for both."""
    assert of_paper([decode(i, 9.0) for i in range(3)] + [decode(3, 0.165)]) == [3, 0, 1, 2]
    assert of_paper([decode(i, 9.0) for i in range(3)] + [decode(3, 0.175)]) == [0, 1, 2, 3]


def test_the_papers_urgent_requests_go_first_and_all_of_them() -> None:
    work = [decode(0, 0.1), decode(1, -0.5), decode(2, 0.05)]
    assert of_paper(work) == [1, 2, 0]


def test_the_papers_others_wait_while_somebody_is_late() -> None:
    at_leisure = [decode(i, 9.0) for i in (1, 2, 3)]
    assert of_paper([decode(0, -0.1), *at_leisure]) == [0]
    # The step ends by the deadline of session 0 with one more, not with two.
    assert of_paper([decode(0, 0.08), *at_leisure]) == [0, 1]
    assert of_paper(at_leisure) == [1, 2, 3]


def test_the_papers_deadline_is_of_the_average_rate() -> None:
    """A round of 3 tokens at 0.1 s each: 0.3 s from the last verdict on, or the lead since the first token."""
    behind = decode(0, -0.5, tpot_s=0.1, lag_s=0.3, expected_tokens=3.0)  # answered 0.3 s ago
    ahead = decode(0, 2.0, tpot_s=0.1, lag_s=-2.0, expected_tokens=3.0)
    assert deadline(behind) == pytest.approx(NOW)
    assert deadline(ahead) == NOW + 2.0
    assert deadline(msgspec.structs.replace(behind, first=True)) == NOW - 0.5
    assert deadline(decode(0, math.inf, tpot_s=0.1, lag_s=0.3)) == math.inf


def test_the_papers_others_go_by_expected_tokens_per_time() -> None:
    work = [decode(i, 9.0, expected_tokens=float(i)) for i in (1, 2, 3)]
    assert of_paper(work) == [3, 2, 1]


def test_the_papers_step_fits_into_memory() -> None:
    cost = CostModel(Coefficients(step=10.0, token=1.0))
    step = StepLimits(64, 16, {}, cost, free_kv=2)
    plan = batching_policy("paper").plan(NOW, [decode(i, 9.0) for i in range(4)], step)
    assert len(plan.grants) == 2


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_grants_are_for_candidates_and_fit_into_the_step(name: str, data: st.DataObject) -> None:
    work = seen(name, data.draw(pieces()))
    step = limits(data.draw(st.integers(1, 600)), data.draw(st.integers(1, 32)))
    plan = planned(name, work, step)
    by_session = {w.session: w for w in work}
    sessions = [g.session for g in plan.grants]
    assert len(set(sessions)) == len(sessions)
    assert set(sessions) <= set(by_session)
    for g in plan.grants:
        w = by_session[g.session]
        assert 1 <= g.tokens <= w.new
        if w.kind is Kind.VERIFY:
            assert g.tokens >= w.new - w.n_draft  # only its draft is cut
        elif w.kind is Kind.DECODE:
            assert g.tokens == w.new
    assert len(plan.grants) <= step.slices
    assert len(plan.grants) <= 1 or sum(g.tokens for g in plan.grants) <= step.tokens
    assert plan.wake_at is None or plan.wake_at > NOW


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_equal_candidates_give_equal_plans(name: str, data: st.DataObject) -> None:
    work = seen(name, data.draw(pieces()))
    assert planned(name, work, limits(200, 16)) == planned(name, work, limits(200, 16))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(work=pieces(drafting=False))
def test_with_candidates_there_is_a_grant_or_a_wake_up_time(name: str, work: list[Candidate]) -> None:
    plan = planned(name, work, limits(200, 16))
    assert plan.grants or plan.wake_at is not None or not work


@settings(max_examples=120, deadline=None)
@given(work=pieces(hurry=False, drafting=False), tokens=st.integers(1, 600), slices=st.integers(1, 32))
def test_without_slos_wisp_is_continuous_batching(work: list[Candidate], tokens: int, slices: int) -> None:
    ours, theirs = (planned(name, work, limits(tokens, slices)).grants for name in ("wisp", "continuous"))
    assert {(g.session, g.tokens) for g in ours} == {(g.session, g.tokens) for g in theirs}


# wisp weighs sessions even then: see test_wisp_policy.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "wisp"])
@settings(max_examples=80, deadline=None)
@given(work=pieces(most=6, drafting=False, longest=40), slack=st.floats(2.0, 10.0))
def test_an_idle_server_runs_everything_at_once(name: str, work: list[Candidate], slack: float) -> None:
    """Few candidates, none behind, and one step of all is shorter than any TPOT target allows."""
    assume(COST.ms(total(work)) / 1e3 < min((w.tpot_s for w in work if w.tpot_s), default=math.inf))
    work = [
        msgspec.structs.replace(
            w, due=NOW + slack if w.tpot_s else w.due, lag_s=-slack * bool(w.tpot_s), slo_lost=False
        )
        for w in work
    ]
    plan = planned(name, work, limits(100_000, 32))
    assert {(g.session, g.tokens) for g in plan.grants} == {(w.session, w.new) for w in work}


def closed_loop(name: str, work: list[Candidate], step: StepLimits, steps: int) -> dict[int, int]:
    """Each session sends its next candidate as soon as it is answered. Returns how often each was served."""
    policy, now = batching_policy(name), NOW
    pending = {w.session: w for w in work}
    served = dict.fromkeys(pending, 0)
    for _ in range(steps):
        plan = policy.plan(now, list(pending.values()), step)
        load = Load()
        for g in plan.grants:
            load = load.plus(g.tokens, pending[g.session].cached)
        if plan.grants:
            now += step.cost.ms(load) / 1e3
        else:
            assert plan.wake_at is not None
            now = max(plan.wake_at, now + 1e-3)
        for g in plan.grants:
            w = pending[g.session]
            if w.kind is Kind.PREFILL and g.tokens < w.new:
                pending[w.session] = msgspec.structs.replace(
                    w, new=w.new - g.tokens, cached=w.cached + g.tokens
                )
            else:
                served[w.session] += 1
                pending[w.session] = again(w, g, now)
    return served


def again(w: Candidate, grant: Grant, now: float) -> Candidate:
    """The session's next candidate: a new session with the same prompt, or a draft of the same length."""
    if w.kind is Kind.PREFILL:
        tokens = w.new + w.cached
        due = now + 2.0 if w.due < math.inf else math.inf
        return msgspec.structs.replace(
            w, new=tokens, cached=0, since=now, opened=now, due=due, slo_lost=False
        )
    due = w.due + w.tpot_s * w.expected_tokens if w.due < math.inf else math.inf
    lag_s = now + w.tpot_s - due if w.due < math.inf else 0.0
    return msgspec.structs.replace(w, since=now, due=due, lag_s=lag_s)


def crowd(drafters: int, prompts: int, tpot_s: float, prompt: int = 300) -> list[Candidate]:
    """Sessions with drafts of 4 tokens and a TPOT target of `tpot_s` (0: none), and new prompts."""
    due = NOW + 0.2 if tpot_s else math.inf
    out = [
        Candidate(
            i,
            Kind.VERIFY,
            5,
            300,
            4,
            NOW,
            NOW - 9.0,
            due=due,
            tpot_s=tpot_s,
            expected_tokens=3.0,
            remaining=400,
        )
        for i in range(drafters)
    ]
    return out + [
        Candidate(
            drafters + i, Kind.PREFILL, prompt, 0, 0, NOW, NOW,
            due=NOW + 2.0 if tpot_s else math.inf, tpot_s=tpot_s, first=True, remaining=400,
        )
        for i in range(prompts)
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tpot_s", [0.0, 0.1, 0.25])
@pytest.mark.parametrize(("drafters", "prompts"), [(4, 1), (12, 2), (60, 3), (200, 8)])
def test_nobody_starves(name: str, tpot_s: float, drafters: int, prompts: int) -> None:
    """Even at a load that no policy can keep up with, every session is served, if late."""
    if name == "paper" and not tpot_s and drafters >= 60:
        pytest.skip("without due times it goes by density alone, and prompts may wait for ever")
    served = closed_loop(name, crowd(drafters, prompts, tpot_s), limits(512, 256), 400)
    assert min(served.values()) >= 2, served
