"""Requests without constraints of two versions, in turn: here of one and the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import constraints_before
from wisp.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def head() -> str:
    """The version that is checked out. Skips where there is no git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return found.stdout.strip()


def test_a_version_is_checked_out_and_goes_away() -> None:
    with constraints_before.version(head()) as source:
        assert (source / "wisp" / "core").is_dir()
    assert not source.exists()
    with pytest.raises(ConfigError, match="--before"), constraints_before.version("no-such-version"):
        pass


@pytest.mark.extended
def test_each_kind_of_work_has_a_cost_in_both_versions() -> None:
    found = constraints_before.plain(head(), pairs=1, turns=2)
    assert found.keys() == {"step", "rule", "streamed", "whole"}
    assert all(0.0 < cost < 1e4 for p in found.values() for cost in (p.before, p.now))
    assert all(p.low == p.more == p.high for p in found.values())
