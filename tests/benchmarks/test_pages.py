"""Pages of results are made of the data beside them and a template, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from benchmarks.pages import SOURCES, remade, render, table

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if name != "suite" or (RESULTS / "suite.json").is_file()]
)
def test_a_committed_page_is_what_its_data_make(name: str) -> None:
    """After a change of data or template: `python -m benchmarks pages`."""
    assert (RESULTS / f"{name}.md").read_text() == remade(name, RESULTS)


def test_a_quick_run_says_so() -> None:
    data = {
        "command": "python -m benchmarks experiments regimes --quick",
        "date": "today",
        "wisp": "0",
        "cells": [],
    }
    page = render("regimes", data, {"more": 0, "fewer": 0, "map": table(("a", "b"), [("1", "2")])})
    assert "**A quick run: few cells, short windows. Its figures mean little.**" in page
    assert page.endswith("\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")


def test_a_figure_that_is_missing_makes_no_page() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("regimes", {}, {})
