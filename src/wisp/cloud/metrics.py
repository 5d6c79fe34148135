"""Prometheus metrics of a verifier, under vLLM's names with our prefix.

Latencies here are the server's: from a message's arrival to its answer's departure. What a user sees is
measured where the user sits, at the edge.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from wisp.core.events import Run, StepDone
from wisp.core.messages import Open, Refused, Verdict
from wisp.core.session import State
from wisp.core.verifier import Verifier

# vLLM's bucket edges, seconds.
_MILLISECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08)
TTFT = (
    *_MILLISECONDS,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
ITL = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
E2E = (*_SECONDS, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Seen(msgspec.Struct):
    """What the metrics remember of a live session."""

    opened: float
    last: float = 0.0
    tokens: int = 0


class Metrics:
    """Counters and histograms in a registry of their own; gauges are read from the verifier when asked."""

    def __init__(self, verifier: Verifier) -> None:
        self.registry = CollectorRegistry()
        self._verifier = verifier
        self._seen: dict[str, _Seen] = {}
        r = self.registry
        gauges = {
            "num_requests_running": ("Sessions that hold a KV slot.", lambda: verifier.kv.owned_slots),
            "num_requests_waiting": ("Sessions with work but no KV slot.", lambda: verifier.n_waiting),
            "num_requests_parked": (
                "Sessions whose edge is gone.",
                lambda: sum(s.state is State.PARKED for s in verifier.sessions.values()),
            ),
            "kv_cache_usage_perc": (
                "KV tokens of live sessions over all (1 = full).",
                lambda: verifier.kv.owned_tokens / verifier.kv.kv_tokens,
            ),
        }
        for name, (text, read) in gauges.items():
            Gauge(f"wisp:{name}", text, registry=r).set_function(read)
        self.ttft = Histogram(
            "wisp:time_to_first_token_seconds", "Open to first token.", buckets=TTFT, registry=r
        )
        self.itl = Histogram(
            "wisp:inter_token_latency_seconds", "Time between messages with tokens.", buckets=ITL, registry=r
        )
        self.e2e = Histogram(
            "wisp:e2e_request_latency_seconds", "Open to last token.", buckets=E2E, registry=r
        )
        self.queue = Histogram(
            "wisp:request_queue_time_seconds", "Ready to dispatched, per verdict.", buckets=TTFT, registry=r
        )
        self.steps = Histogram(
            "wisp:engine_step_seconds", "Time of one engine step.", buckets=STEP, registry=r
        )
        self.slices = Counter("wisp:engine_slices", "Slices run.", registry=r)
        self.rows = Counter("wisp:engine_tokens", "Tokens fed to the engine.", registry=r)
        self.step_errors = Counter("wisp:engine_errors", "Steps and slices that failed.", registry=r)
        self.success = Counter("wisp:request_success", "Finished.", ["finished_reason"], registry=r)
        self.refused = Counter("wisp:request_refused", "Refused messages.", ["code"], registry=r)
        self.drafts = Counter("wisp:spec_decode_num_drafts", "Drafts verified.", registry=r)
        self.draft_tokens = Counter("wisp:spec_decode_num_draft_tokens", "Draft tokens verified.", registry=r)
        self.accepted = Counter("wisp:spec_decode_num_accepted_tokens", "Draft tokens accepted.", registry=r)
        self.per_position = Counter(
            "wisp:spec_decode_num_accepted_tokens_per_pos",
            "Accepted at each place.",
            ["position"],
            registry=r,
        )
        self.connections = Gauge("wisp:edge_connections", "Open session sockets.", registry=r)
        r.register(_KeyUsage(verifier))

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    def opened(self, now: float, open_: Open, key: str) -> None:
        """A session is opened or resumed."""
        if len(self._seen) > 2 * len(self._verifier.sessions) + 64:  # sessions that ended without a verdict
            live = {s.id for s in self._verifier.sessions.values()}
            self._seen = {id_: seen for id_, seen in self._seen.items() if id_ in live}
        self._seen.setdefault(open_.session, _Seen(now))

    def sent(self, now: float, message: Verdict | Refused) -> None:
        """A verdict or refusal leaves."""
        if isinstance(message, Refused):
            self.refused.labels(message.code).inc()
            if message.fatal:
                self._seen.pop(message.session, None)
            return
        seen = self._seen.get(message.session)
        if seen is None or message.base + len(message.tokens) <= seen.tokens:  # nothing new: a duplicate
            return
        if seen.tokens == 0:
            self.ttft.observe(now - seen.opened)
        else:
            self.itl.observe(now - seen.last)
        seen.last = now
        seen.tokens = message.base + len(message.tokens)
        self.queue.observe(message.queue_ms / 1e3)
        if message.finish:
            self.success.labels(message.finish).inc()
            self.e2e.observe(now - seen.opened)
            del self._seen[message.session]

    def cancelled(self, session: str) -> None:
        """Its user left, or has enough (a stop string)."""
        if self._seen.pop(session, None) is not None:
            self.success.labels("abort").inc()

    def step(self, run: Run, done: StepDone) -> None:
        """A step ended."""
        self.steps.observe(done.engine_ms / 1e3)
        self.slices.inc(len(run.slices))
        self.rows.inc(sum(len(s.tokens) for s in run.slices))
        if done.error:
            self.step_errors.inc()
            return
        self.step_errors.inc(sum(bool(r.error) for r in done.results))
        drafted = [(s, r) for s, r in zip(run.slices, done.results, strict=True) if s.n_draft]
        self.drafts.inc(len(drafted))
        self.draft_tokens.inc(sum(s.n_draft for s, _ in drafted))
        self._count_accepted([r.accepted for _, r in drafted])

    def _count_accepted(self, accepted: list[int]) -> None:
        """Draft tokens accepted, per draft: once per step and place, since counters are slow."""
        self.accepted.inc(sum(accepted))
        for position in range(max(accepted, default=0)):
            self.per_position.labels(str(position)).inc(sum(n > position for n in accepted))


_TOTALS = ("prompt_tokens", "output_tokens")


class _KeyUsage(Collector):
    """Usage per API key, read from admission when asked."""

    def __init__(self, verifier: Verifier) -> None:
        self._usage = verifier.admission.usage

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily("wisp:key_tokens", "Tokens per API key.", labels=["key", "kind"])
        requests = CounterMetricFamily(
            "wisp:key_requests", "Requests per API key.", labels=["key", "outcome"]
        )
        prompt, generated = (sum(getattr(u, name) for u in self._usage.values()) for name in _TOTALS)
        for key, usage in sorted(self._usage.items()):
            tokens.add_metric([key, "prompt"], usage.prompt_tokens)
            tokens.add_metric([key, "output"], usage.output_tokens)
            requests.add_metric([key, "admitted"], usage.requests)
            requests.add_metric([key, "refused"], usage.refused)
        return [
            tokens,
            requests,
            CounterMetricFamily(
                "wisp:prompt_tokens", "Prompt tokens computed (reused ones are not).", prompt
            ),
            CounterMetricFamily("wisp:generation_tokens", "Tokens committed.", generated),
        ]
