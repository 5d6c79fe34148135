"""Who sees what at /metrics."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from wisp.api.keys import Keyring
from wisp.api.scrape import scraped

KEYS = """
[keys.alice]
secret = "alice-secret"

[keys.bob]
secret = "bob-secret"

[keys.operator]
secret = "operator-secret"
admin = true
"""


class Usage(Collector):
    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily("wisp:key_tokens", "Tokens.", labels=["key", "kind"])
        for key in ("alice", "bob"):
            tokens.add_metric([key, "output"], 7)
        return [tokens]


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("wisp:num_requests_running", "Running.", registry=registry).set(3)
    Counter("wisp:request_success", "Finished.", ["finished_reason"], registry=registry).labels("stop").inc()
    registry.register(Usage())
    return registry


def scrape(registry: CollectorRegistry, keys: Keyring, secret: str = "", model: str = "tiny") -> Response:
    headers = [(b"authorization", f"Bearer {secret}".encode())] if secret else []
    return scraped(Request({"type": "http", "headers": headers}), registry, model, keys)


def samples(response: Response) -> dict[tuple[str, str], float]:
    """Values by name and key."""
    page = bytes(response.body).decode()
    found = [s for family in text_string_to_metric_families(page) for s in family.samples]
    assert {s.labels["model_name"] for s in found} == {"tiny"}
    return {(s.name, s.labels.get("key", "")): s.value for s in found}


def test_every_series_names_the_model_as_vllms_do(registry: CollectorRegistry) -> None:
    page = bytes(scrape(registry, Keyring()).body).decode()
    assert 'wisp:num_requests_running{model_name="tiny"} 3.0' in page
    assert 'wisp:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in page
    assert "# TYPE wisp:request_success_total counter" in page
    assert "model_name" not in bytes(scrape(registry, Keyring(), model="").body).decode()


def test_customers_are_named_to_operators_and_to_themselves(
    registry: CollectorRegistry, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    keys = Keyring(path, secrets="from-the-environment")
    everyone = {("wisp:num_requests_running", ""), ("wisp:request_success_total", "")}
    alice, bob = ("wisp:key_tokens_total", "alice"), ("wisp:key_tokens_total", "bob")
    assert everyone <= samples(scrape(registry, keys)).keys()
    for secret, seen in (
        ("", set()),
        ("alice-secret", {alice}),
        ("operator-secret", {alice, bob}),
        ("from-the-environment", {alice, bob}),
    ):
        named = {place for place in samples(scrape(registry, keys, secret)) if place[1]}
        assert named == seen
    assert scrape(registry, keys, "wrong").status_code == 401


def test_where_there_are_no_keys_nothing_is_hidden(registry: CollectorRegistry) -> None:
    assert ("wisp:key_tokens_total", "alice") in samples(scrape(registry, Keyring()))


def test_open_metrics_are_had_where_they_are_asked_for(registry: CollectorRegistry) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5"
    request = Request({"type": "http", "headers": [(b"accept", accept.encode())]})
    response = scraped(request, registry, "tiny", Keyring(None, None))
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    text = bytes(response.body).decode()
    assert text.endswith("# EOF\n")
    families = list(openmetrics_families(text))  # type: ignore[no-untyped-call]
    assert {"wisp:num_requests_running", "wisp:request_success"} <= {family.name for family in families}
    plain = samples(scrape(registry, Keyring(None, None)))
    assert {sample.name for family in families for sample in family.samples} == {name for name, _ in plain}


def test_openmetrics_keeps_the_names() -> None:
    registry = CollectorRegistry()
    Counter("wisp:things", "Things.", registry=registry).inc()
    scope = {"type": "http", "headers": [(b"accept", b"application/openmetrics-text")]}
    page = bytes(scraped(Request(scope), registry, "m", Keyring(None, None)).body).decode()
    assert 'wisp:things_total{model_name="m"} 1.0' in page
