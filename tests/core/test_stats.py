"""What a request is told about its speculation."""

from __future__ import annotations

from wisp.core.draft.stats import SpecStats


def test_rounds_with_a_draft_are_counted_by_how_much_of_it_was_accepted() -> None:
    stats = SpecStats()
    for drafted, accepted in ((4, 4), (4, 1), (2, 1), (0, 0), (3, 0)):
        stats.round(drafted, accepted)
    assert stats.report() == {
        "mean_acceptance_length": 2.5,  # 1 + (4 + 1 + 1 + 0) / 4
        "draft_acceptance_rate": 0.4615,  # 6 of 13
        "acceptance_histogram": [1, 2, 0, 0, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 6,
        "num_draft_tokens": 13,
    }


def test_without_a_draft_nothing_is_divided_by_zero() -> None:
    stats = SpecStats()
    stats.round(0, 0)
    assert (stats.mean_acceptance_length, stats.draft_acceptance_rate) == (0.0, 0.0)
    assert stats.report()["acceptance_histogram"] == []


def test_two_requests_share_no_histogram() -> None:
    SpecStats().round(1, 1)
    assert SpecStats().acceptance_histogram == []
