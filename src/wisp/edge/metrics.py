"""Prometheus metrics of an edge: latencies and tokens as its users see them."""

from __future__ import annotations

from wisp.api.attainment import Attainment
from wisp.api.observe import RequestRecord
from wisp.api.scrape import Registry
from wisp.edge.backend import EdgeBackend

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)


class EdgeMetrics:
    """An `api.observe.Observer` with a registry of its own."""

    def __init__(self, backend: EdgeBackend) -> None:
        self.registry = r = Registry()
        r.gauge("num_requests_running", "Generations under way.", lambda: backend.sessions)
        text = "1 while a verifier is connected."
        r.gauge("verifier_connected", text, lambda: backend.link.welcome is not None)
        text = "Connections lost since the start."
        r.gauge("verifier_connections_lost", text, lambda: backend.link.reconnects)
        text = "Branches that sessions, now ended, have sent since the start."
        r.gauge("branches_sent", text, lambda: backend.branches_sent)
        text = "Branches that the texts of sessions, now ended, went along since the start."
        r.gauge("branches_taken", text, lambda: backend.branches_taken)
        text = "From the request to the first token."
        self.ttft = r.histogram("time_to_first_token_seconds", text, SECONDS)
        self.tpot = r.histogram("request_time_per_output_token_seconds", "Per answer.", SECONDS)
        self.itl = r.histogram("inter_token_latency_seconds", "Time between chunks.", SECONDS)
        self.requests = r.counter("request", "Requests by outcome.", "finished_reason")
        self.attainment = Attainment(r)
        self.tokens = r.counter("generation_tokens", "Tokens committed.")
        self.prompt = r.counter("prompt_tokens", "Prompt tokens.")
        self.drafts = r.counter("spec_decode_num_drafts", "Drafts verified.")
        self.draft_tokens = r.counter("spec_decode_num_draft_tokens", "Tokens drafted and sent.")
        self.accepted = r.counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")

    def request_finished(self, record: RequestRecord) -> None:
        served = record.served()
        self.requests.add(1.0, record.finish)
        self.tokens.add(record.completion_tokens)
        self.prompt.add(record.prompt_tokens)
        self.drafts.add(record.spec.num_spec_steps)
        self.draft_tokens.add(record.spec.num_draft_tokens)
        self.accepted.add(record.spec.num_accepted_draft_tokens)
        if record.completion_tokens:
            self.ttft.observe(served.ttft_ms / 1e3)
        if record.completion_tokens > 1:
            self.tpot.observe(served.tpot_ms / 1e3)
        for gap in record.gaps_s:
            self.itl.observe(gap)
        self.attainment.count(record)
