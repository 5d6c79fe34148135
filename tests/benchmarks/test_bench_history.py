"""The benchmark of drafts from earlier texts: a replay is exact, and finds what repeats."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import history
from wisp.calibrate.traces.format import Trace, TraceSet, shipped_traces, trace_folder


@cache
def summaries() -> list[Trace]:
    return list(TraceSet.load(trace_folder(shipped_traces())).select(domain="summarise", label="greedy"))


@pytest.fixture(autouse=True)
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SEEDS", (1,))


@pytest.mark.parametrize("depth", [1, 2])
def test_summaries_repeat_their_texts(depth: int) -> None:
    none, all_ = (history.served("", summaries(), "a100-qwen3-32b", 4, depth, h) for h in ("none", "all"))
    assert (none.tokens_a_slice, none.drafted_a_token) == (1.0, 0.0)
    assert all_.tokens_a_slice > 1.3
    assert all_.tokens_per_s > 1.1 * none.tokens_per_s
    assert 0.2 < all_.accepted < 1.0


def test_an_edge_with_n_grams_finds_more_in_earlier_answers() -> None:
    alone, more = (history.edge("", summaries(), name) for name in ("ngram", "history+ngram"))
    assert alone.places == more.places == sum(map(len, summaries()))
    assert more.proposed > alone.proposed
    assert more.right > alone.right
    model = history.edge("", summaries(), "model")
    assert (model.proposed, model.model_asked) == (1.0, 1.0)
