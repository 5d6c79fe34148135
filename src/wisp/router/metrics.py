"""Prometheus metrics of a router. What tokens cost is measured at the replicas, each at its own /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wisp.api.attainment import Attainment
from wisp.api.observe import RequestRecord
from wisp.api.scrape import Registry
from wisp.core.route.placement import Choice
from wisp.router.fleet import Fleet


class RouterMetrics:
    """Counters in a registry of their own; what there is of replicas is read from the fleet when asked."""

    def __init__(self, fleet: Callable[[], Fleet]) -> None:
        self.registry = r = Registry()
        self.connections = r.gauge("edge_connections", "Open session sockets.")
        self.placements = r.counter("placements", "Sessions sent to a replica, and why.", "replica", "reason")
        text = "Prompt tokens placed where they are cached."
        self.prefix_tokens = r.counter("placement_prefix_tokens", text)
        self.redirects = r.counter("redirects", "Edges' sessions among the placements.")
        self.refused = r.counter("request_refused", "Sessions refused.", "code")
        self.attainment = Attainment(r)
        r.register(_Replicas(fleet))

    def placed(self, choice: Choice) -> None:
        self.placements.add(1.0, choice.replica, choice.reason.value)
        self.prefix_tokens.add(choice.shared)

    def request_finished(self, record: RequestRecord) -> None:
        """A thin client's request has ended (see `api.observe`): this is its edge."""
        self.attainment.count(record)


class _Replicas(Collector):
    """One sample a replica."""

    def __init__(self, fleet: Callable[[], Fleet]) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("wisp:replica_up", "1 while it takes sessions.", labels=["replica"])
        sessions = GaugeMetricFamily("wisp:replica_sessions", "Sessions it serves.", labels=["replica"])
        restarts = CounterMetricFamily(
            "wisp:replica_restarts", "Times it died and was started again.", labels=["replica"]
        )
        for view in self._fleet().view():
            up.add_metric([view.name], view.state == "up")
            sessions.add_metric([view.name], view.sessions)
            restarts.add_metric([view.name], view.restarts)
        return [up, sessions, restarts]
