"""Prometheus metrics of a verifier, under vLLM's names with our prefix.

Latencies here are the server's: from a message's arrival to its answer's departure. What a user sees is
measured where the user sits, at the edge.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from wisp.api.attainment import Attainment
from wisp.api.scrape import Registry
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.verify.cost import Load, load_of
from wisp.core.verify.events import Ended, Run, StepDone
from wisp.core.verify.planner import KINDS, kind_of
from wisp.core.verify.states import State
from wisp.core.verify.verifier import Verifier

# vLLM's bucket edges, seconds.
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
ITL = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
# Ours.
INTERFERENCE = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
SLACK = (-10.0, -2.5, -1.0, -0.5, -0.25, -0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
SLICES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROWS = (0, 1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Seen(msgspec.Struct):
    """What the metrics remember of a live session."""

    opened: float
    last: float = 0.0
    tokens: int = 0
    lost: bool = False  # its SLO


class Metrics:
    """Counters and histograms in a registry of their own; gauges are read from the verifier when asked."""

    def __init__(self, verifier: Verifier) -> None:
        self.registry = r = Registry()
        self._verifier = verifier
        self._seen: dict[str, _Seen] = {}
        self._in_flight: deque[tuple[Load, float]] = deque()  # steps: load, and when dispatched
        self._ended = 0.0  # when the last one ended
        self._evicted = 0
        self._gauges(r)
        self.connections = r.gauge("edge_connections", "Open session sockets.")
        self._requests(r)
        self._steps(r)
        self._speculation(r)
        self.event_log_lost = r.counter("event_log_lost", "1 once the event log cannot be written any more.")
        self.attainment = Attainment(r)
        r.register(_KeyUsage(verifier))

    def _gauges(self, r: Registry) -> None:
        v = self._verifier
        sessions = v.sessions.values()
        r.gauge("num_requests_running", "Sessions that hold a KV slot.", lambda: v.kv.owned_slots)
        r.gauge("num_requests_waiting", "Sessions that could run but have no KV slot.", lambda: v.n_waiting)
        text = "Sessions that wait for their edge to come back."
        r.gauge("num_requests_parked", text, lambda: sum(s.state is State.PARKED for s in sessions))
        text = "Sessions whose SLO can no longer be kept."
        r.gauge("num_requests_slo_lost", text, lambda: sum(s.targets.slo_lost for s in sessions))
        text = "KV tokens of live sessions over all (1 = full)."
        r.gauge("kv_cache_usage_perc", text, lambda: v.kv.owned_tokens / v.kv.kv_tokens)
        text = "Median relative error of recent predictions of a step's time."
        r.gauge("cost_model_relative_error", text, lambda: v.cost.error)
        text = "Multiplier that makes a prediction a p90 upper bound."
        r.gauge("cost_model_margin", text, lambda: v.cost.margin)
        text = "Congestion price: what one more draft token costs other sessions, in committed tokens."
        r.gauge("draft_token_price", text, lambda: v.policy.price)

    def _requests(self, r: Registry) -> None:
        self.ttft = r.histogram("time_to_first_token_seconds", "From Open to the first token.", TTFT)
        self.itl = r.histogram("inter_token_latency_seconds", "Time between messages with tokens.", ITL)
        self.e2e = r.histogram("e2e_request_latency_seconds", "From Open to the last token.", E2E)
        text = "From ready to dispatched, per verdict."
        self.queue = r.histogram("request_queue_time_seconds", text, TTFT)
        text = "Ended sessions: stop, length, abort or expired."
        self.success = r.counter("request_success", text, "finished_reason")
        self.refused = r.counter("request_refused", "Refused messages.", "code")
        text = "Opened sessions: admitted, resumed, or the code of the refusal."
        self.admissions = r.counter("admission", text, "outcome")
        self.slo_lost = r.counter("request_slo_lost", "Sessions whose SLO was given up.")
        self.preemptions = r.counter("num_preemptions", "Times that a session's KV was taken for others.")

    def _steps(self, r: Registry) -> None:
        self.steps = r.histogram("engine_step_seconds", "Time of one engine step.", STEP)
        self.predicted = r.counter("cost_model_predicted_seconds", "Predicted time of the steps.")
        self.slices = r.counter("engine_slices", "Slices run.")
        self.rows = r.counter("engine_tokens", "Tokens fed to the engine.")
        self.step_errors = r.counter("engine_errors", "Steps and slices that failed.")
        slices = r.histogram("engine_step_slices", "Slices of a step.", SLICES, "kind")
        rows = r.histogram("engine_step_rows", "Tokens fed in a step.", ROWS, "kind")
        self.step_slices = [slices.labels(kind) for kind in KINDS]
        self.step_rows = [rows.labels(kind) for kind in KINDS]
        self.interference = Tally(
            "wisp:verification_interference_seconds",
            "Per slice: dispatch to commit of its step, less the predicted time of the slice alone.",
            INTERFERENCE,
        )
        self.slack = Tally(
            "wisp:slack_at_dispatch_seconds",
            "Per slice of a session with an SLO: when its next token is due, less the time of dispatch.",
            SLACK,
            signed=True,
        )
        for tally in (self.interference, self.slack):
            r.register(tally)

    def _speculation(self, r: Registry) -> None:
        self.drafts = r.counter("spec_decode_num_drafts", "Drafts verified.")
        self.draft_tokens = r.counter("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self.accepted = r.counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        text = "Draft tokens accepted, by their position in the draft."
        self.per_position = r.counter("spec_decode_num_accepted_tokens_per_pos", text, "position")

    def opened(self, now: float, open_: Open, key: str) -> None:
        self._seen.setdefault(open_.session, _Seen(now))

    def sent(self, now: float, message: Verdict | Refused) -> None:
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

    def ended(self, ended: Ended) -> None:
        """A session ended without a message: its user left or has enough (a stop string), or its edge was gone."""
        if self._seen.pop(ended.session, None) is not None:
            self.success.labels(ended.why).inc()

    def admission(self, outcome: str) -> None:
        self.admissions.labels(outcome).inc()

    def dispatched(self, now: float, run: Run) -> None:
        self._in_flight.append((load_of(run.slices), now))
        self.preemptions.inc(self._verifier.evicted - self._evicted)
        self._evicted = self._verifier.evicted
        sessions = [self._verifier.sessions[s.session] for s in run.slices]
        self.slack.add([s.due - now for s in sessions if s.due < math.inf])
        for session in sessions:
            seen = self._seen.get(session.id)
            if session.targets.slo_lost and seen is not None and not seen.lost:
                seen.lost = True
                self.slo_lost.inc()
        counts, rows = [0, 0, 0], [0, 0, 0]
        for s in run.slices:
            kind = kind_of(s)
            counts[kind] += 1
            rows[kind] += len(s.tokens)
        for i in range(len(KINDS)):
            self.step_slices[i].observe(counts[i])
            self.step_rows[i].observe(rows[i])

    def step(self, now: float, run: Run, done: StepDone) -> None:
        """A step ended; the verifier has not been told yet, so its cost model is still that of the dispatch."""
        cost = self._verifier.cost
        load, dispatched = self._in_flight.popleft()
        self.predicted.inc(cost.ms(load) / 1e3)
        took = now - max(dispatched, self._ended)
        self._ended = now
        alone = (cost.ms(Load().plus(len(s.tokens), s.start)) / 1e3 for s in run.slices)
        self.interference.add([max(0.0, took - a) for a in alone])  # below 0 is noise
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


class Tally(Collector):
    """A histogram that takes many observations at once: prometheus_client's own takes a microsecond or two for each.

    signed: there may be negative ones; then there is no sum, since Prometheus takes a sum that falls for a restart.
    """

    def __init__(self, name: str, about: str, edges: Sequence[float], *, signed: bool = False) -> None:
        self.name, self.about, self.signed = name, about, signed
        self.edges = np.array(edges)
        self.counts = np.zeros(len(edges) + 1, np.int64)
        self.sum = 0.0

    def add(self, values: Sequence[float]) -> None:
        """Count them. A value that equals an edge belongs to the bucket below it."""
        if values:
            self.sum += math.fsum(values)
            self.counts += np.bincount(self.edges.searchsorted(values), minlength=len(self.counts))

    def collect(self) -> Iterable[Metric]:
        names = [*(str(float(edge)) for edge in self.edges), "+Inf"]
        buckets = list(zip(names, np.cumsum(self.counts).tolist(), strict=True))
        total = None if self.signed else self.sum
        return [HistogramMetricFamily(self.name, self.about, buckets=buckets, sum_value=total)]


class _KeyUsage(Collector):
    """Usage per API key, read from admission when asked."""

    def __init__(self, verifier: Verifier) -> None:
        self._usage = verifier.admission.usage

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily
        tokens = family("wisp:key_tokens", "Tokens per API key.", labels=["key", "kind"])
        requests = family("wisp:key_requests", "Requests per API key.", labels=["key", "outcome"])
        prompt = output = 0
        for key, usage in sorted(self._usage.items()):
            prompt, output = prompt + usage.prompt_tokens, output + usage.output_tokens
            tokens.add_metric([key, "prompt"], usage.prompt_tokens)
            tokens.add_metric([key, "output"], usage.output_tokens)
            requests.add_metric([key, "admitted"], usage.requests)
            requests.add_metric([key, "refused"], usage.refused)
        computed = family("wisp:prompt_tokens", "Prompt tokens computed (reused ones are not).", prompt)
        return [tokens, requests, computed, family("wisp:generation_tokens", "Tokens committed.", output)]
