"""Policies against the optimum, step by step in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import msgspec
import pytest

import oracle
from oracle import Form, Piece, best, enumerate_all
from wisp.core.verify.batching import Candidate, Grant, Kind, StepLimits
from wisp.core.verify.batching.deadlines import first_step
from wisp.core.verify.batching.wisp import Wisp
from wisp.core.verify.cost import Coefficients, CostModel, Load

MOST = 4096
INSTANCES = 300
Decide = Callable[[float, Sequence[Candidate], Coefficients], list[Grant]]


def strict(now: float, candidates: Sequence[Candidate], cost: Coefficients) -> list[Grant]:
    return first_step(now, candidates, cost, 1.0, MOST)[0]


def wisp(now: float, candidates: Sequence[Candidate], cost: Coefficients) -> list[Grant]:
    return Wisp().plan(now, candidates, StepLimits(MOST, 64, cost=CostModel(cost))).grants


class Instance(msgspec.Struct):
    """Candidates that are all there at time 0, and the cost of steps."""

    candidates: list[Candidate]
    cost: Coefficients


def instance(seed: int) -> Instance:
    """Up to 8 last rounds and prompts. Due times are spread over a fraction of the time that all would take in one
    step to a multiple of it, so that some instances are hopeless and some are easy."""
    rng = random.Random(seed)
    cost = Coefficients(
        step=rng.choice([5.0, 20.0, 40.0]),
        token=rng.choice([0.4, 1.0, 3.0]),
        cached=rng.choice([0.0, 0.002]),
        attention=rng.choice([0.0, 0.0001]),
    )
    work = []
    for i in range(rng.randint(2, 8)):
        kind = rng.choices([Kind.VERIFY, Kind.DECODE, Kind.PREFILL], [6, 2, 2])[0]
        n_draft = rng.choice([1, 2, 2, 2, 4, 8]) if kind is Kind.VERIFY else 0
        new = rng.randint(20, 200) if kind is Kind.PREFILL else 1 + n_draft
        a = rng.uniform(0.3, 0.95)
        gain = sum(a**k for k in range(n_draft + 1))
        cached = 0 if kind is Kind.PREFILL else rng.randint(10, 3000)
        room = new + 1 if kind is Kind.PREFILL else int(gain)
        work.append(
            Candidate(
                i, kind, new, cached, n_draft, 0.0, 0.0,
                tpot_s=0.05, expected_tokens=gain, round_tokens=2.0, remaining=room, first=kind is Kind.PREFILL,
            )
        )  # fmt: skip
    load = Load()
    for w in work:
        load = load.plus(w.new, w.cached)
    whole = cost.ms(load) / 1e3
    early, late = rng.choice([(0.1, 0.8), (0.3, 1.2), (0.5, 1.0), (0.5, 2.5), (1.0, 3.0)])
    work = [
        msgspec.structs.replace(w, due=max(rng.uniform(early, late) * whole, 1.05 * cost.step / 1e3))
        for w in work
    ]
    return Instance(work, cost)


def drive(decide: Decide, it: Instance) -> tuple[float, int]:
    """Plan and run steps of exactly the predicted time. Late tokens are worth nothing."""
    now, tokens, kept = 0.0, 0.0, 0
    pending = {w.session: w for w in it.candidates}
    while pending:
        grants = decide(now, list(pending.values()), it.cost)
        if not grants:
            break
        load = Load()
        for g in grants:
            load = load.plus(g.tokens, pending[g.session].cached)
        now += it.cost.ms(load) / 1e3
        for g in grants:
            w = pending.pop(g.session)
            if w.kind is Kind.PREFILL and g.tokens < w.new:
                pending[w.session] = msgspec.structs.replace(
                    w, new=w.new - g.tokens, cached=w.cached + g.tokens
                )
            elif now <= w.due + oracle.EPS:
                tokens += oracle.value(w, g.tokens - (w.new - w.n_draft))
                kept += 1
        pending = {s: w for s, w in pending.items() if w.due >= now}
    return tokens, kept


@cache
def optima() -> list[tuple[Instance, oracle.Best]]:
    """Instances and their optima."""
    out = []
    for seed in range(INSTANCES):
        it = instance(seed)
        out.append((it, best(0.0, it.cost.step / 1e3, [oracle.piece(w, it.cost) for w in it.candidates])))
    return out


@pytest.mark.parametrize("decide", [strict, wisp])
def test_a_policy_delivers_at_least_95_percent_of_the_optimum(decide: Decide) -> None:
    shares, all_kept = [], []
    for it, optimum in optima():
        tokens, kept = drive(decide, it)
        assert tokens <= optimum.tokens * (1 + 1e-6) + 1e-6
        if optimum.tokens:
            shares.append(tokens / optimum.tokens)
        if optimum.pieces == len(it.candidates):
            all_kept.append(kept == len(it.candidates))
    assert len(shares) > 0.8 * INSTANCES
    assert len(all_kept) > 0.3 * INSTANCES
    assert sum(shares) / len(shares) >= 0.95
    assert sum(all_kept) / len(all_kept) >= 0.98


def test_the_oracle_agrees_with_enumeration() -> None:
    rng = random.Random(5)
    for _ in range(150):
        n = rng.randint(1, 4)
        pieces = []
        for _ in range(n):
            long, gain = rng.uniform(0.5, 6.0), rng.uniform(1.0, 5.0)
            forms = (Form(long, gain), Form(long * rng.uniform(0.2, 0.9), gain * rng.uniform(0.2, 0.9)))
            pieces.append(Piece(rng.uniform(1.0, 14.0), forms))
        fixed = rng.choice([0.1, 1.0, 3.0])
        assert best(0.0, fixed, pieces) == pytest.approx(enumerate_all(0.0, fixed, pieces))


def test_if_all_fit_the_first_step_is_filled_in_due_order() -> None:
    cost = Coefficients(step=10.0, token=1.0)
    work = [
        Candidate(i, Kind.VERIFY, 5, 0, 4, 0.0, 0.0, due=due, expected_tokens=3.0)
        for i, due in enumerate([0.050, 0.021, 0.030])
    ]
    assert first_step(0.0, work, cost, 1.0, 100) == ([Grant(1, 5), Grant(2, 5)], [])


def test_drafts_are_cut_before_a_session_is_dropped() -> None:
    cost = Coefficients(step=10.0, token=1.0)
    work = [Candidate(i, Kind.VERIFY, 5, 0, 4, 0.0, 0.0, due=0.018, expected_tokens=3.0) for i in range(2)]
    grants, given_up = first_step(0.0, work, cost, 1.0, 100)
    assert sum(g.tokens for g in grants) == 8
    assert len(grants) == 2
    assert not given_up


def test_a_hopeless_candidate_is_given_up_and_delays_no_other() -> None:
    cost = Coefficients(step=10.0, token=1.0)
    lost = Candidate(1, Kind.PREFILL, 500, 0, 0, 0.0, 0.0, due=0.1)
    fine = Candidate(2, Kind.DECODE, 1, 0, 0, 0.0, 0.0, due=0.2)
    assert first_step(0.0, [lost, fine], cost, 1.0, 1000) == ([Grant(2, 1)], [1])


def test_a_prompt_longer_than_a_step_is_cut() -> None:
    cost = Coefficients(step=10.0, token=0.1)
    work = [Candidate(1, Kind.PREFILL, 500, 0, 0, 0.0, 0.0, due=1.0)]
    assert first_step(0.0, work, cost, 1.0, 200) == ([Grant(1, 200)], [])


def test_a_late_candidate_makes_no_other_late() -> None:
    cost = Coefficients(step=10.0, token=1.0)
    late = Candidate(1, Kind.PREFILL, 100, 0, 0, 0.0, 0.0, due=0.9, first=True, slo_lost=True)
    soon = Candidate(2, Kind.DECODE, 1, 9, 0, 0.9, 0.0, due=1.05, remaining=1, tpot_s=0.1)
    assert wisp(1.0, [late, soon], cost) == [Grant(2, 1)]
