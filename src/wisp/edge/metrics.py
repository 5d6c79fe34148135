"""Prometheus metrics of an edge: latencies and tokens as its users see them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from wisp.api.attainment import Attainment
from wisp.api.observe import RequestRecord
from wisp.api.scrape import add_gauges
from wisp.edge.backend import EdgeBackend

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)


class EdgeMetrics:
    """An `api.observe.Observer` with a registry of its own."""

    def __init__(self, backend: EdgeBackend) -> None:
        self.registry = r = CollectorRegistry()
        gauges = {
            "num_requests_running": ("Generations under way.", lambda: backend.sessions),
            "verifier_connected": (
                "1 while a verifier is connected.",
                lambda: backend.link.welcome is not None,
            ),
            "verifier_connections_lost": ("Connections lost since start.", lambda: backend.link.reconnects),
        }
        add_gauges(r, gauges)
        self.ttft = Histogram(
            "wisp:time_to_first_token_seconds", "Request to first token.", buckets=SECONDS, registry=r
        )
        self.tpot = Histogram(
            "wisp:request_time_per_output_token_seconds", "Per answer.", buckets=SECONDS, registry=r
        )
        self.itl = Histogram(
            "wisp:inter_token_latency_seconds", "Between chunks.", buckets=SECONDS, registry=r
        )
        self.requests = Counter("wisp:request", "Requests by outcome.", ["finished_reason"], registry=r)
        self.attainment = Attainment(r)
        self.tokens = Counter("wisp:generation_tokens", "Tokens committed.", registry=r)
        self.prompt = Counter("wisp:prompt_tokens", "Prompt tokens.", registry=r)
        self.drafts = Counter("wisp:spec_decode_num_drafts", "Drafts verified.", registry=r)
        self.draft_tokens = Counter(
            "wisp:spec_decode_num_draft_tokens", "Tokens drafted and sent.", registry=r
        )
        self.accepted = Counter("wisp:spec_decode_num_accepted_tokens", "Draft tokens accepted.", registry=r)

    def request_finished(self, record: RequestRecord) -> None:
        """Count one request."""
        served = record.served()
        self.requests.labels(record.finish).inc()
        self.tokens.inc(record.completion_tokens)
        self.prompt.inc(record.prompt_tokens)
        self.drafts.inc(record.spec.num_spec_steps)
        self.draft_tokens.inc(record.spec.num_draft_tokens)
        self.accepted.inc(record.spec.num_accepted_draft_tokens)
        if record.completion_tokens:
            self.ttft.observe(served.ttft_ms / 1e3)
        if record.completion_tokens > 1:
            self.tpot.observe(served.tpot_ms / 1e3)
        for gap in record.gaps_s:
            self.itl.observe(gap)
        self.attainment.count(record)
