"""The parts of benchmarks/gpu.sh: whatever becomes of one, the others run, and the summary names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import everything
from benchmarks.gpu.everything import Part, parts, run
from waiting import eventually

ROOT = Path(__file__).parents[2]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_part_that_fails_or_hangs_or_cannot_run_leaves_the_others_alone(tmp_path: Path) -> None:
    alive = tmp_path / "pid"
    child = ("sh", "-c", f"sleep 600 & echo $! > {alive}; wait")
    todo = [
        Part("broken", 60, python("print('words'); raise SystemExit('it broke')"), ()),
        Part("hanging", 5, child, ()),
        Part("foreign", 60, python(""), ("no_such_module",)),
        Part("good", 60, python("import os; print(os.environ['GIVEN'])"), (), (("GIVEN", "yes"),)),
    ]
    done = run(todo, tmp_path, total_s=600.0, patience=1.0)
    assert [(d.name, d.state) for d in done] == [
        ("broken", "failed"), ("hanging", "out of time"), ("foreign", "skipped"), ("good", "done"),
    ]  # fmt: skip
    assert done[0].why == "it broke"
    assert done[2].why == "not installed: no_such_module"
    assert (tmp_path / "good.log").read_text() == "yes\n"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [p["state"] for p in summary["parts"]] == ["failed", "out of time", "skipped", "done"]
    assert summary["versions"]["python"]
    if alive.exists() and (
        pid := alive.read_text()
    ):  # on a machine that stood still it was ended before it began
        _gone(int(pid))


def _gone(pid: int) -> None:
    """What a part had started has ended with it."""

    def ended() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    eventually(ended)


def test_none_is_begun_where_hardly_any_time_is_left(tmp_path: Path) -> None:
    [done] = run([Part("late", 60, python(""), ())], tmp_path, total_s=everything.LEAST_S - 1, patience=1.0)
    assert (done.state, done.why) == ("skipped", "no time was left of 14 s")


@pytest.mark.parametrize("tiny", [False, True])
def test_all_parts_together_take_less_than_ten_minutes(tiny: bool, tmp_path: Path) -> None:
    todo = parts(tmp_path, "tiny-target", 64, tiny=tiny)
    assert sum(part.seconds for part in todo) <= everything.TOTAL_S < 600
    assert len({part.name for part in todo}) == len(todo)


def test_the_script_ends_with_a_summary_where_nothing_that_it_needs_is_installed(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    env = {**os.environ, "PYTHON": str(bare)}
    ended = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "--tiny", "--out", tmp_path / "out"],
        env=env,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out/summary.json").read_text())["parts"]
    assert {p["state"] for p in found} == {"skipped"}
    assert all("torch" in p["why"] for p in found)


def test_a_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    ended = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "--only", "bits,colours", "--out", tmp_path], check=False, capture_output=True,
        text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert ended.returncode == 2
    assert "no such part: colours; there are self-test, bits" in ended.stderr
