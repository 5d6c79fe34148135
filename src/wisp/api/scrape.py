"""What all our /metrics have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.responses import Response


def add_gauges(registry: CollectorRegistry, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
    """Gauges by name, each with what it says and how it is read when asked."""
    for name, (text, read) in gauges.items():
        Gauge(f"wisp:{name}", text, registry=registry).set_function(read)


def scraped(registry: CollectorRegistry) -> Response:
    """All there is, in the text format that Prometheus reads."""
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")
