"""Pages of results are made of the data beside them and a template, and of nothing else."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import jinja2
import msgspec
import pytest

from benchmarks.pages import SOURCES, remade, render, table
from wisp.check.faults.check import Report

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    "name",
    [name for name in SOURCES if name not in ("suite", "faults") or (RESULTS / f"{name}.json").is_file()],
)
def test_a_committed_page_is_what_its_data_make(name: str) -> None:
    """After a change of data or template: `python -m benchmarks pages`."""
    assert (RESULTS / f"{name}.md").read_text() == remade(name, RESULTS)


@pytest.mark.parametrize("name", ["ablations", "bursts", "overlap", "paper", "reality", "regimes", "table"])
def test_the_picture_of_a_committed_page_can_be_drawn_again(name: str, tmp_path: Path) -> None:
    data = msgspec.json.decode((RESULTS / f"{name}.json").read_bytes())
    import_module(SOURCES[name]).draw(data, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_a_quick_run_says_so() -> None:
    data = {
        "command": "python -m benchmarks experiments regimes --quick",
        "date": "today",
        "wisp": "0",
        "cells": [],
    }
    page = render("regimes", data, {"more": 0, "fewer": 0, "map": table(("a", "b"), [("1", "2")])})
    assert (
        "**A quick run: short windows, few requests, in most pages few cells. A single figure means little.**"
        in page
    )
    assert page.endswith("\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")


def test_a_figure_that_is_missing_makes_no_page() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("regimes", {}, {})


def test_the_page_of_faults_says_what_was_found() -> None:
    report = Report(
        100, 3, 250, violations={101: "a token is wrong\nwhere", 102: "a slot is left"}, cpu_s=5.0
    )
    report.by_kind = {"kill": 250}
    data = msgspec.json.decode(msgspec.json.encode(report))
    page = render("faults", data, import_module(SOURCES["faults"]).figures(data))
    assert "**250 faults over 3 seeds (100 to 102): 2 violations.**" in page
    assert "- 101: a token is wrong\n- 102: a slot is left\n" in page
    assert "| kill | a process is gone | 250 |" in page
    assert "| cut | a connection breaks; each end notices when it does | 0 |" in page
