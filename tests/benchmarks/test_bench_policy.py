"""The bench of decisions measures what it says."""

from __future__ import annotations

from benchmarks.policy import Edges, measure, pending
from wisp.core.verify.batching import POLICIES, Kind


def test_the_usual_mix_has_all_there_is() -> None:
    work = pending(1000, 1)
    assert {w.kind for w in work} == set(Kind)
    assert 200 < sum(w.edge_drafting for w in work) < 300
    assert sum(w.slo_lost for w in work) + sum(w.due < 0 for w in work) > 50
    assert work == pending(1000, 1)


def test_every_policy_is_measured() -> None:
    reports = measure(12, budget_s=0.001, sizes=(5,))
    assert [r.policy for r in reports] == list(POLICIES)
    for r in reports:
        assert [t.pending for t in r.mix] == [t.pending for t in r.strict] == [5, 12]
        assert 0 < r.tick.median <= r.tick.p99


def test_edges_are_served_to_the_end() -> None:
    edges = Edges("wisp", 8, 1)
    for _ in range(600):
        edges.step()
    assert edges.opened > 16
