"""Dashboards and alert rules below deploy/ are those of docs/metrics.md, and name no metric that there is not."""

from __future__ import annotations

import re

import pytest

from tools import monitoring

PAGE = monitoring.PAGE.read_text()


@pytest.mark.parametrize("path", monitoring.files(PAGE))
def test_the_files_are_current(path: str) -> None:
    assert (monitoring.ROOT / path).read_text() == monitoring.files(PAGE)[path], "python -m tools.monitoring"


@pytest.mark.parametrize("process", ["Server", "Edge", "Router"])
def test_a_dashboard_shows_every_metric_of_its_process(process: str) -> None:
    board = monitoring.dashboard(PAGE, process)
    shown = " ".join(monitoring.queries(board))
    own = {m.name for m in monitoring.metrics(PAGE) if m.process == process}
    assert own == {name for name in own if name in shown}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all("$job" in query and "$instance" in query for query in monitoring.queries(board))


def test_ratios_and_alerts_name_metrics_of_the_page() -> None:
    listed = {m.name for m in monitoring.metrics(PAGE)}
    expressions = [r.expression for r in monitoring.ratios(PAGE)] + [
        a.expression for a in monitoring.alerts(PAGE)
    ]
    named = {re.sub(r"_(sum|bucket|count)$", "", n) for e in expressions for n in re.findall(r"wisp:\w+", e)}
    assert named <= listed
    assert len(expressions) > 20
