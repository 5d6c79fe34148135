"""docs/metrics.md lists what /metrics exposes, with type and labels: nothing is missing, and nothing is made up."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from wisp.api.counting import Counter
from wisp.core.verify.admission import Admission, KeyUsage
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Limits
from wisp.core.verify.verifier import Verifier
from wisp.edge.metrics import EdgeMetrics
from wisp.router.fleet import View
from wisp.router.metrics import RouterMetrics
from wisp.server.metrics import Metrics

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
ROW = re.compile(r"\| `(wisp:\w+)` \| (\w+)[^|]*\| [^|]*\| ([^|]*)\|")

Row = tuple[str, frozenset[str]]  # type, labels


def server() -> CollectorRegistry:
    limits = Limits(n_vocab=10, eos=frozenset({1}), slots=2, slot_tokens=64, kv_tokens=128, step_tokens=64)
    verifier = Verifier(limits, batching_policy("continuous"), Admission(2))
    verifier.admission.usage["alice"] = KeyUsage()
    return Metrics(verifier).registry


def edge() -> CollectorRegistry:
    link = SimpleNamespace(welcome=None, reconnects=0)
    backend: Any = SimpleNamespace(sessions=0, branches_sent=0, branches_taken=0, link=link)
    return EdgeMetrics(backend).registry


def router() -> CollectorRegistry:
    fleet: Any = SimpleNamespace(view=lambda: [View("r1", "up", "", 0, 0, "")])
    return RouterMetrics(lambda: fleet).registry


def exposed(registry: CollectorRegistry) -> dict[str, Row]:
    """By the name of /metrics. Labels of metrics that nobody has counted yet are known to the metric alone."""
    found = {}
    for collector in registry._collector_to_names:
        for family in collector.collect():
            labels = {name for sample in family.samples for name in sample.labels} - {"le"}
            if isinstance(collector, Counter):
                labels |= set(collector.labels)
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, frozenset(labels))
    return found


def documented(process: str) -> dict[str, Row]:
    """The rows under the heading of that process."""
    section = PAGE.read_text().split(f"\n## {process}\n")[1].split("\n## ")[0]
    rows = ROW.findall(section)
    assert len(rows) == len({name for name, *_ in rows}), "a metric is listed twice"
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


@pytest.mark.parametrize(("process", "registry"), [("Server", server), ("Edge", edge), ("Router", router)])
def test_every_metric_is_documented_and_every_documented_one_exists(process: str, registry: Any) -> None:
    assert documented(process) == exposed(registry())
