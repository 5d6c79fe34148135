"""Grafana dashboards and Prometheus alert rules, made from the tables of docs/metrics.md.

    python -m tools.monitoring      writes them below deploy/

One dashboard for each process: its ratios first, then a panel for each metric in the order of the page. A counter is
drawn as its rate, a histogram as three quantiles, a gauge as it is; what the page says of it is the panel's help.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"
GRAFANA = "deploy/grafana/dashboards"
ALERTS = "deploy/prometheus/alerts.yml"
QUANTILES = (0.5, 0.9, 0.99)
WIDTH, HEIGHT = 8, 7  # of a panel, in Grafana's grid, which has 24 columns
_SELECTOR = 'job=~"$job",instance=~"$instance"'
_UNITS = {"seconds": "s", "share": "percentunit", "share, 0 to 1": "percentunit", "0 or 1": "bool"}


@dataclass(frozen=True)
class Listed:
    """A row of a table of metrics. kind: counter, gauge or histogram."""

    process: str
    section: str
    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    meaning: str
    worry: str


@dataclass(frozen=True)
class Ratio:
    """A figure that is made of several metrics."""

    process: str
    title: str
    unit: str
    expression: str
    meaning: str


@dataclass(frozen=True)
class Alert:
    """A rule. held: how long the expression holds before the alert fires, in Prometheus' notation."""

    name: str
    severity: str
    held: str
    expression: str
    meaning: str


def metrics(page: str) -> list[Listed]:
    """Every metric of the page, in its order."""
    found = []
    for process, section, cells in _rows(page):
        if len(cells) == 6 and cells[0].startswith("`wisp:"):
            name, kind, unit, labels, meaning, worry = cells
            names = tuple(re.findall(r"`(\w+)`", labels))
            found.append(
                Listed(process, section, name.strip("`"), kind.split(",")[0], unit, names, meaning, worry)
            )
    return found


def ratios(page: str) -> list[Ratio]:
    """The table of ratios."""
    rows = [cells for _, section, cells in _rows(page) if section == "Ratios"]
    return [Ratio(process, title, unit, e.strip("`"), about) for process, title, unit, e, about in rows]


def alerts(page: str) -> list[Alert]:
    """The table of alerts."""
    rows = [cells for _, section, cells in _rows(page) if section == "Alerts"]
    return [
        Alert(name.strip("`"), severity, held, e.strip("`"), about) for name, severity, held, e, about in rows
    ]


def dashboard(page: str, process: str) -> dict[str, Any]:
    """The dashboard of a process, as Grafana imports it."""
    listed = metrics(page)
    own = [m for m in listed if m.process == process]
    elsewhere = {m.name for m in listed if m.process != process}
    marker = next(m.name for m in own if m.name not in elsewhere)  # only this process has it
    groups: dict[str, list[dict[str, Any]]] = {"At a glance": []}
    for ratio in ratios(page):
        if ratio.process == process:
            target = _target(_selected(ratio.expression), "{{instance}}")
            groups["At a glance"].append(_panel(ratio.title, ratio.meaning, ratio.unit, [target]))
    for metric in own:
        groups.setdefault(metric.section or "All metrics", []).append(_metric_panel(metric))
    return {
        "uid": f"wisp-{process.lower()}",
        "title": f"WISP {process.lower()}",
        "tags": ["wisp"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables(marker)},
        "panels": _laid_out(groups),
    }


def rules(page: str) -> str:
    """The file of alert rules, in YAML."""
    lines = [
        "# Made by `python -m tools.monitoring` from docs/metrics.md: change them there.",
        "groups:",
        "  - name: wisp",
        "    rules:",
    ]
    for alert in alerts(page):
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {json.dumps(alert.expression)}",
            f"        for: {alert.held}",
            "        labels:",
            f"          severity: {alert.severity}",
            "        annotations:",
            f"          summary: {json.dumps(alert.meaning.replace('`', ''))}",
        ]
    return "\n".join(lines) + "\n"


def files(page: str) -> dict[str, str]:
    """Path within the repository -> text of each file that is made of the page."""
    processes = dict.fromkeys(m.process for m in metrics(page))
    boards = {
        f"{GRAFANA}/{p.lower()}.json": json.dumps(dashboard(page, p), indent=1) + "\n" for p in processes
    }
    return {**boards, ALERTS: rules(page)}


def queries(board: dict[str, Any]) -> list[str]:
    """The expressions of a dashboard's panels."""
    return [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]


def _rows(page: str) -> Iterator[tuple[str, str, list[str]]]:
    """(heading, heading below it or "", cells) of each row of a table, without the heads of the tables."""
    process = section = ""
    head = True  # of a table: its names, until the line below them
    for line in page.splitlines():
        if line.startswith("## "):
            process, section = line[3:], ""
        elif line.startswith("### "):
            section = line[4:]
        if not line.startswith("|"):
            head = True
        elif line.startswith("|---"):
            head = False
        elif not head:
            yield process, section, [cell.strip() for cell in line.strip("|").split("|")]


def _metric_panel(metric: Listed) -> dict[str, Any]:
    by = ", ".join(("instance", *metric.labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("instance", *metric.labels))
    unit = _UNITS.get(metric.unit, "short")
    title = metric.name.removeprefix("wisp:").removesuffix("_total").replace("_", " ")
    about = metric.meaning + (f". Worry when {metric.worry}" if metric.worry else "")
    if metric.kind == "gauge":
        targets = [_target(f"sum by ({by}) ({metric.name}{{{_SELECTOR}}})", legend)]
    elif metric.kind == "counter":
        rate = f"sum by ({by}) (rate({metric.name}{{{_SELECTOR}}}[$__rate_interval]))"
        targets, unit, title = [_target(rate, legend)], "short", f"{title}, {metric.unit} per second"
    else:
        by = ", ".join(("le", "instance", *metric.labels))
        buckets = f"sum by ({by}) (rate({metric.name}_bucket{{{_SELECTOR}}}[$__rate_interval]))"
        targets = [
            _target(f"histogram_quantile({q}, {buckets})", f"p{q * 100:.0f} {legend}") for q in QUANTILES
        ]
    return _panel(title, about, unit, targets)


def _panel(title: str, about: str, unit: str, targets: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": title,
        "description": re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", about),  # without the page's links
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [{**target, "refId": "ABC"[i]} for i, target in enumerate(targets)],
    }


def _target(expression: str, legend: str) -> dict[str, Any]:
    return {"expr": expression, "legendFormat": legend, "range": True}


def _selected(expression: str) -> str:
    """With the dashboard's selector at each metric."""
    return re.sub(r"(wisp:\w+)", rf"\1{{{_SELECTOR}}}", expression).replace("}{", ",")


def _variables(marker: str) -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "$datasource"}

    def values_of(label: str, within: str) -> dict[str, Any]:
        return {
            "name": label,
            "type": "query",
            "datasource": source,
            "query": f"label_values({marker}{within}, {label})",
            "refresh": 2,  # whenever the range of time changes
            "multi": True,
            "includeAll": True,
            "current": {"text": "All", "value": "$__all"},
        }

    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        values_of("job", ""),
        values_of("instance", '{job=~"$job"}'),
    ]


def _laid_out(groups: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Three panels side by side, below a row for each group."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, members in groups.items():
        if not members:
            continue
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        for i, panel in enumerate(members):
            place = {"x": i % 3 * WIDTH, "y": y + 1 + i // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append({**panel, "gridPos": place})
        y += 1 + -(-len(members) // 3) * HEIGHT
    return [{"id": i, **panel} for i, panel in enumerate(panels, start=1)]


def main() -> None:
    """Write the files."""
    for path, text in files(PAGE.read_text()).items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
