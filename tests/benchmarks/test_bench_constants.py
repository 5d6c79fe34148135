"""What each constant is for: cells run again without it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.constants import CROWDED, WITHOUT, Result, changed, measured, run_bench_constants
from wisp.core.errors import ConfigError
from wisp.core.verify import preemption
from wisp.core.verify.batching import wisp


def test_every_constant_is_taken_away_in_turn_and_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [getattr(module, name) for name, module, _ in WITHOUT]
    out = tmp_path / "constants.json"
    run_bench_constants(out, as_json=False, cells=("five-devices",), crowded=(), requests=1)
    assert [getattr(module, name) for name, module, _ in WITHOUT] == before
    rows = msgspec.json.decode(out.read_bytes(), type=Result).rows
    of_the_policy = [name for name, module, _ in WITHOUT if module is wisp]
    assert [r.changed.split(" ")[0] for r in rows] == ["", *of_the_policy]
    assert rows[0].attainment == 1.0
    said = capsys.readouterr().out
    assert "| none | 100, " in said
    assert len(said.splitlines()) == 2 + len(rows)


def test_a_changed_constant_changes_what_happens() -> None:
    as_it_is = measured("sampled-29-14", "", (1,), 10)
    with changed(wisp, "FIRST", 0.01):
        assert measured("sampled-29-14", "", (1,), 10).ttft_ms > as_it_is.ttft_ms
    assert measured("sampled-29-14", "", (1,), 10) == as_it_is


def test_a_cell_that_the_suite_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="no cell"):
        measured("no-such-cell", "", (1,), 1)


def test_preemption_matters_where_kv_is_short() -> None:
    (cell,) = CROWDED
    as_it_is = measured(cell, "", (1,), 10)
    with changed(preemption, "SPARE_S", 1e6):  # nobody is far ahead
        assert measured(cell, "", (1,), 10) != as_it_is
