"""Which mutants are tried, which tests they meet, and what is told of them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.mutant_tests import Reach, Record, annotated, changed_function, lines_at, outcome
from tools.mutants import ANNOTATION, Results, mutated_files, name_of, page, summed, why_equivalent, write

SOURCE = """\
LIMIT = 3

class Box:
    size = LIMIT + 1

    @property
    def room(self) -> int | None:
        if (
            self.size
            > LIMIT
        ):
            return self.size - 1
        elif self.size < 0:
            return 0
        return None

def fill(box: Box, count: int = 2) -> int:
    for _ in range(count):
        box.size += (
            1
        )
    return box.size
"""
TREE = ast.parse(SOURCE)


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        (1, None),  # whoever imports the file
        (4, None),
        (6, range(8, 16)),  # a decorator: whoever calls the function
        (9, range(8, 12)),  # all lines of a condition, without what hangs on it
        (12, range(12, 13)),
        (13, range(13, 14)),
        (17, range(18, 23)),  # a default
        (18, range(18, 19)),
        (20, range(19, 22)),
    ],
)
def test_a_change_is_seen_by_the_tests_that_run_its_statement(line: int, lines: range | None) -> None:
    assert lines_at(TREE, line) == lines


def test_annotations_do_not_run() -> None:
    assert annotated(TREE, 7, SOURCE.splitlines()[6].index("|"))
    assert not annotated(TREE, 12, SOURCE.splitlines()[11].index("-"))
    assert not annotated(TREE, 17, SOURCE.splitlines()[16].index("2"))


def test_the_fastest_of_the_tests_that_reach_a_line_come_first() -> None:
    lines = {"a.py": {1: frozenset({"slow", "quick"}), 2: frozenset({"other"})}}
    reach = Reach(lines, {"slow": 2.0, "quick": 0.1, "other": 0.5}, ())
    assert reach.tests("a.py", range(1, 2)) == ["quick", "slow"]
    assert reach.tests("a.py", None) == ["quick", "other", "slow"]
    assert reach.tests("a.py", range(3, 9)) == []
    assert reach.tests("b.py", None) == []


def test_a_mutant_that_never_ends_is_no_survivor() -> None:
    assert [outcome(status) for status in (0, 1 << 8, 2 << 8, 24)] == [
        "survived",
        "killed",
        "killed",
        "endless",
    ]
    with pytest.raises(ValueError, match="ended with 5"):
        outcome(5 << 8)  # no test was found


def mutant(line: int, diff: list[str] | None = None, outcome: str | None = "survived") -> Record:
    return {
        "file": mutated_files()[0],
        "line": line,
        "column": 0,
        "in": "fit",
        "operator": "NumberReplacer",
        "source": f"x = {line}",
        "diff": diff or ["-    x = 1", "+    x = 2 | 3"],
        "outcome": outcome,
        "cpu_s": 30.0,
    }


def test_survivors_are_tried_again_once_tests_have_changed(tmp_path: Path) -> None:
    path, survivor, killed = tmp_path / "results.jsonl", mutant(1), mutant(2)
    results = Results(path, "before")
    results.add(survivor, "survived", 1.0)
    results.add(killed, "killed", 0.5)
    again = Results(path, "before")
    assert [bool(again.of(each)) for each in (survivor, killed, mutant(3))] == [True, True, False]
    changed = Results(path, "after")
    assert [bool(changed.of(each)) for each in (survivor, killed)] == [False, True]
    assert name_of(survivor) != name_of(killed)


def test_survivors_are_listed_and_the_rest_is_counted(tmp_path: Path) -> None:
    known = [{"old": "x = 1", "new": "x = 2 | 3", "why": "nobody reads x"}]
    records = [
        mutant(1),
        mutant(2, ["-    y = 1", "+    y = 2"]),
        mutant(3, outcome="killed"),
        mutant(4, outcome=None),
    ]
    summary = {**summed(records, 900, 1, known), "note": "Looked through."}
    assert (summary["killed"], summary["done"], summary["left"], summary["equivalent"]) == (1, 3, 1, 1)
    assert [s["equivalent"] for s in summary["survivors"]] == ["nobody reads x", ""]
    out = tmp_path / "mutants.json"
    write(summary, out)
    write({**summary, "seed": 2}, out)
    write(summary, out)
    assert [run["seed"] for run in json.loads(out.read_text())["runs"]] == [1, 2]
    text = page([summary])
    assert "| 4 of 900 | 3 | 1 | 33.3% | 1 | 50.0% | 2 min |" in text
    assert "x = 2 \u2223 3" in text  # a bar would end the cell
    assert "| nobody reads x |" in text
    assert "Looked through." in text


def test_changes_to_annotations_are_known_to_be_equivalent() -> None:
    file = next(path for path in mutated_files() if path.endswith("kv.py"))
    at = Path(file).read_text().splitlines()
    line = next(i for i, text in enumerate(at, 1) if "-> Slot | None" in text)
    record = {**mutant(line), "file": file, "column": at[line - 1].index("|")}
    assert why_equivalent(record, []) == ANNOTATION
    assert why_equivalent({**record, "column": 0}, []) == ""


@pytest.mark.parametrize(
    ("old", "new", "function"),
    [
        ("low, high = 0,", "low, high = 1,", "common_prefix"),
        ("", "", None),
        ("while high - low > 1", "while high - low is not 1", "common_prefix"),  # a SyntaxWarning
        ("COPY_FROM = 16", "COPY_FROM = 17", None),  # each user of the module has seen it
        ("evicted = victim.owner", "evicted = not victim.owner", "KvPool.acquire"),
        ("used: float = 0.0", "used: float = 1.0", None),
        (
            "for s in self.slots if s.owner is not None)",
            "for s in () if s.owner is not None)",
            "KvPool.owned_tokens",
        ),
    ],
)
def test_a_change_within_a_function_is_known(old: str, new: str, function: str | None) -> None:
    file = next(path for path in mutated_files() if path.endswith("/kv.py"))
    source = Path(file).read_text()
    assert old in source
    change = changed_function({"file": file, "source": source.replace(old, new)})
    assert (change.co_qualname if change is not None else None) == function


MUTANTS = """\
import os
from pathlib import Path
from tools import mutant_tests

mutant_tests.SPARE_CPU_S = 2.0
mutant_tests.TESTS = "tests/core/test_kv.py"
file = "src/wisp/core/verify/kv.py"
source = Path(file).read_text()
tests = [mutant_tests.TESTS + "::test_common_prefix_by_bisection"]
nowhere = os.open(os.devnull, os.O_WRONLY)


def meet(start, *changes):
    for old, new in changes:
        assert old in source
        pid = start({"file": file, "source": source.replace(old, new)}, tests, 0.0, nowhere)
        print("outcome", mutant_tests.outcome(os.waitpid(pid, 0)[1]), flush=True)


wrong, endless = ("b[:high]:", "b[:low]:"), ("low = middle", "low = low")
meet(mutant_tests.start, ("", ""), wrong, ("def common_prefix", "def another"))
mutant_tests.collected(lambda runner: meet(runner.start, wrong, endless))
"""


def test_each_mutant_meets_the_tests_in_a_process_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", MUTANTS], capture_output=True, text=True, check=True)
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("outcome")]
    assert found == ["survived", "killed", "killed", "killed", "endless"]
