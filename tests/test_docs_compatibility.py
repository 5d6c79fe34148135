"""The page about llama.cpp's checks names tests that there are, and counts its rows right."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "compatibility-llamacpp.md").read_text()
ROW = re.compile(r"^\| (.*?) \| (passes|differs|not here) \| (.*) \|$", re.MULTILINE)


def test_every_verdict_names_an_existing_test() -> None:
    there = {
        name
        for path in TESTS.glob("*/test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 40
    assert named <= there
    for checks, verdict, why in ROW.findall(PAGE):
        shown = "`test_" in why or "the same" in why
        assert shown or verdict != "passes", checks


def test_the_sum_is_that_of_the_rows() -> None:
    counts: Counter[str] = Counter()
    for checks, verdict, _ in ROW.findall(PAGE):
        counts[verdict] += checks.count("`") // 2 + sum(map(int, re.findall(r"\((\d+)\)", checks)))
    said = re.search(r"Of (\d+) checks, (\d+) pass, (\d+) differ and (\d+) are not here", PAGE)
    assert said is not None
    assert [int(n) for n in said.groups()] == [
        counts.total(),
        counts["passes"],
        counts["differs"],
        counts["not here"],
    ]
