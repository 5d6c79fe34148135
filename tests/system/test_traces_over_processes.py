"""Two processes export their spans to a collector, over OTLP: one request is one trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from harness import HTTP, Fleet, body_of
from waiting import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


class Collector:
    """Takes OTLP over HTTP. `spans`: (service, span) of all that came."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[tuple[str, Any]] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    named = {a.key: a.value.string_value for a in resource.resource.attributes}
                    found = [span for scope in resource.scope_spans for span in scope.spans]
                    spans.extend((named["service.name"], span) for span in found)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    collector = Collector()
    yield collector
    collector.http.shutdown()
    collector.http.server_close()


@pytest.mark.slow
def test_a_collector_gets_one_trace_of_edge_and_verifier(fleet: Fleet, collector: Collector) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
    verifier = fleet.serve(env=env)
    edge = fleet.edge(verifier.url, env=env)
    body = body_of("Once upon a time", max_tokens=24)
    for headers in ({"traceparent": PARENT}, {}):
        response = httpx.post(f"{edge.url}/v1/chat/completions", json=body, headers=headers, **HTTP)
        assert response.status_code == 200
    for process in (edge, verifier):  # what is left goes out at the end
        process.terminate()
    assert (edge.wait(), verifier.wait()) == (0, 0)
    eventually(lambda: len([s for _, s in collector.spans if s.name == "session"]) == 4)
    found = [(service, span) for service, span in collector.spans if span.trace_id.hex() == TRACE]
    by_id = {span.span_id: (service, span) for service, span in found}
    assert {(service, span.name) for service, span in found} >= {
        ("wisp-edge", "chat.completions"),
        ("wisp-edge", "session"),
        ("wisp-edge", "round"),
        ("wisp-serve", "session"),
        ("wisp-serve", "step"),
    }
    (at_verifier,) = [span for service, span in found if (service, span.name) == ("wisp-serve", "session")]
    service, parent = by_id[at_verifier.parent_span_id]
    assert (service, parent.name) == ("wisp-edge", "session")
    service, request = by_id[parent.parent_span_id]
    assert (service, request.name) == ("wisp-edge", "chat.completions")
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    others = {span.trace_id.hex() for _, span in collector.spans} - {TRACE}
    assert len(others) == 1, "a request without a parent begins a trace, which goes on at the verifier"


@pytest.mark.slow
def test_a_collector_that_is_not_there_costs_no_answer(fleet: Fleet) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    verifier = fleet.serve(
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    )
    response = httpx.post(f"{verifier.url}/v1/chat/completions", json=body_of("Hello", max_tokens=4), **HTTP)
    assert response.status_code == 200
    verifier.terminate()
    assert verifier.wait() == 0
    assert "traces go to: otlp" in verifier.log()
