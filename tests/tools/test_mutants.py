"""Which mutants are tried, and what is told of them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tools.mutants import MODULES, TESTS, configuration, page, pick, read, summed

SCHEMA = """
CREATE TABLE work_items (job_id TEXT);
CREATE TABLE mutation_specs (job_id TEXT, module_path TEXT, operator_name TEXT, operator_args TEXT, occurrence INTEGER,
    start_pos_row INTEGER, start_pos_col INTEGER, definition_name TEXT);
CREATE TABLE work_results (job_id TEXT, test_outcome TEXT, diff TEXT);
"""


def session(jobs: int) -> sqlite3.Connection:
    """As cosmic-ray has it, before anything was tried."""
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    for i in range(jobs):
        db.execute("INSERT INTO work_items VALUES (?)", (f"{i * 7919 % 1000:03}",))
        spec = (
            f"{i * 7919 % 1000:03}",
            f"src/{'ab'[i % 2]}.py",
            "core/NumberReplacer",
            "{}",
            i,
            i // 3,
            0,
            "fit",
        )
        db.execute("INSERT INTO mutation_specs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", spec)
    return db


def test_mutants_are_picked_by_seed_alone() -> None:
    def picked(seed: int) -> list[tuple[str, int]]:
        with closing(session(90)) as db:
            pick(db, 20, seed)
            assert db.execute("SELECT count(*) FROM work_items").fetchone() == (20,)
            return [(r["file"], r["line"]) for r in read(db)]

    assert len(picked(1)) == 20
    assert picked(1) == picked(1) != picked(2)


def test_survivors_are_listed_and_the_rest_is_counted() -> None:
    diff = "--- a\n+++ b\n@@ -1 +1 @@\n context\n-    x = 1\n+    x = 2 | 3"
    with closing(session(4)) as db:
        jobs = [job for (job,) in db.execute("SELECT job_id FROM work_items")]
        outcomes = ("TestOutcome.SURVIVED", "TestOutcome.KILLED", "INCOMPETENT")
        for job, outcome in zip(jobs, outcomes, strict=False):
            db.execute("INSERT INTO work_results VALUES (?, ?, ?)", (job, outcome, diff))
        summary = summed(list(read(db)), 4, 1)
    assert (summary["killed"], summary["done"], summary["left"]) == (2, 3, 1)
    assert summary["survivors"][0]["diff"] == ["-    x = 1", "+    x = 2 | 3"]
    text = page(summary)
    assert "2 of 3 mutants" in text
    assert "66.7%" in text
    assert "1 of 4 were not tried" in text
    assert "x = 2 \u2223 3" in text  # a bar would end the cell


def test_the_modules_and_their_tests_are_there() -> None:
    assert all(Path(path).is_file() for path in (*MODULES, *TESTS))
    assert "ulimit -t" in configuration(Path("/bin/python"))
