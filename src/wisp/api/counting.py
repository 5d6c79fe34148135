"""Counters and histograms as plain numbers, which Prometheus reads when it asks.

Those of `prometheus_client` take a lock, and a microsecond or two, for each observation: too much for what happens
thousands of times a second. These belong to one thread, and others only read them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Counter(Collector):
    """A counter: one series for each of its labels' values that came up, or one without labels."""

    def __init__(
        self, registry: CollectorRegistry, name: str, about: str, labels: Sequence[str] = ()
    ) -> None:
        self.labels = labels  # their names
        self._name, self._about = name, about
        self._totals: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        registry.register(self)

    def add(self, n: float = 1.0, *values: str) -> None:
        """Count n. values: of the labels."""
        self._totals[values] = self._totals.get(values, 0.0) + n

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._about, labels=self.labels)
        for values, total in tuple(self._totals.items()):
            family.add_metric(values, total)
        return [family]


class Histogram:
    """A series of a histogram. A value that equals an edge belongs to the bucket below it."""

    __slots__ = ("counts", "edges", "sum")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value


class Histograms(Collector):
    """A histogram without labels, or with one that has these values: `of` has a series for each.

    signed: there may be negative values; then there is no sum, since Prometheus takes a sum that falls for a restart.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        name: str,
        about: str,
        edges: Sequence[float],
        label: str = "",
        values: Sequence[str] = (),
        *,
        signed: bool = False,
    ) -> None:
        self.labels = (label,) if label else ()
        self._name, self._about, self._signed = name, about, signed
        self._values: list[tuple[str, ...]] = [(value,) for value in values] or [()]
        self._les = [*(str(float(edge)) for edge in edges), "+Inf"]
        self.of = [Histogram(edges) for _ in self._values]
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._about, labels=self.labels)
        for values, series in zip(self._values, self.of, strict=True):
            buckets = list(zip(self._les, accumulate(series.counts), strict=True))
            family.add_metric(values, buckets, None if self._signed else series.sum)
        return [family]
