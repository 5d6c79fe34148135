"""Prometheus metrics of a verifier, under vLLM's names with our prefix.

Latencies here are the server's: from a message's arrival to its answer's departure. What a user sees is
measured where the user sits, at the edge.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from wisp.api.attainment import Attainment
from wisp.api.scrape import Registry
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.verify.cost import Load
from wisp.core.verify.events import Ended, Run, StepDone
from wisp.core.verify.planner import KINDS, kind_of
from wisp.core.verify.session import Session
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
        text = "Tokens of past and present texts, for drafts of the verifier's own."
        r.gauge("history_tokens", text, lambda: v.own_drafts.histories.held)
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
        self.step_slices = r.histograms("engine_step_slices", "Slices of a step.", SLICES, "kind", KINDS)
        self.step_rows = r.histograms("engine_step_rows", "Tokens fed in a step.", ROWS, "kind", KINDS)
        text = "Per slice: dispatch to commit of its step, less the predicted time of the slice alone."
        self.interference = r.histogram("verification_interference_seconds", text, INTERFERENCE)
        text = "Per slice of a session with an SLO: when its next token is due, less the time of dispatch."
        self.slack = r.histogram("slack_at_dispatch_seconds", text, SLACK, signed=True)

    def _speculation(self, r: Registry) -> None:
        self.drafts = r.counter("spec_decode_num_drafts", "Drafts verified.")
        self.draft_tokens = r.counter("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self.accepted = r.counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        text = "Draft tokens accepted, by their position in the draft."
        self.per_position = r.counter("spec_decode_num_accepted_tokens_per_pos", text, "position")

    def opened(self, now: float, open_: Open) -> None:
        self._seen.setdefault(open_.session, _Seen(now))

    def sent(self, now: float, message: Verdict | Refused) -> None:
        if isinstance(message, Refused):
            self.refused.add(1.0, message.code)
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
            self.success.add(1.0, message.finish)
            self.e2e.observe(now - seen.opened)
            del self._seen[message.session]

    def ended(self, ended: Ended) -> None:
        """A session ended without a message: its user left or has enough (a stop string), or its edge was gone."""
        if self._seen.pop(ended.session, None) is not None:
            self.success.add(1.0, ended.why)

    def admission(self, outcome: str) -> None:
        self.admissions.add(1.0, outcome)

    def dispatched(self, now: float, run: Run) -> None:
        verifier = self._verifier
        self._in_flight.append((verifier.planner.load, now))
        if (evicted := verifier.evicted) > self._evicted:
            self.preemptions.add(evicted - self._evicted)
            self._evicted = evicted
        counts, rows = [0, 0, 0], [0, 0, 0]
        for s in run.slices:
            kind = kind_of(s)
            counts[kind] += 1
            rows[kind] += len(s.tokens)
            session = verifier.sessions[s.session]
            targets = session.targets
            if targets.slo is not None or targets.slo_lost:  # an infeasible one was dropped, and is lost
                self._dispatched_with_slo(now, session)
        for n, series in zip(counts, self.step_slices, strict=True):
            series.observe(n)
        for n, series in zip(rows, self.step_rows, strict=True):
            series.observe(n)

    def _dispatched_with_slo(self, now: float, session: Session) -> None:
        if (due := session.due) < math.inf:
            self.slack.observe(due - now)
        if session.targets.slo_lost:
            seen = self._seen.get(session.id)
            if seen is not None and not seen.lost:
                seen.lost = True
                self.slo_lost.add()

    def step(self, now: float, run: Run, done: StepDone) -> None:
        """A step ended; the verifier has not been told yet, so its cost model is still that of the dispatch."""
        cost = self._verifier.cost
        load, dispatched = self._in_flight.popleft()
        self.predicted.add(cost.ms(load) / 1e3)
        took = now - max(dispatched, self._ended)
        self._ended = now
        alone_ms, interference = cost.now.ms_of, self.interference
        for s in run.slices:
            n = len(s.tokens)
            waited = took - alone_ms(n, n * (s.start + n), s.start, 1) / 1e3
            interference.observe(waited if waited > 0.0 else 0.0)  # below 0 is noise
        self.steps.observe(done.engine_ms / 1e3)
        self.slices.add(load.slices)
        self.rows.add(load.new)
        if done.error:
            self.step_errors.add()
            return
        accepted = []
        for s, result in zip(run.slices, done.results, strict=True):
            if result.error:
                self.step_errors.add()
            if s.n_draft:
                self.draft_tokens.add(s.n_draft)
                accepted.append(result.accepted)
        if accepted:
            self._count_accepted(accepted)

    def _count_accepted(self, accepted: list[int]) -> None:
        """Draft tokens accepted, per draft: once per step and place."""
        self.drafts.add(len(accepted))
        self.accepted.add(sum(accepted))
        for position in range(max(accepted)):
            self.per_position.add(sum(n > position for n in accepted), str(position))


class _KeyUsage(Collector):
    """Usage per API key and in all, read from the verifier when asked."""

    def __init__(self, verifier: Verifier) -> None:
        self._usage = verifier.admission.usage
        self._own = verifier.own_drafts

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
        committed = family("wisp:generation_tokens", "Tokens committed.", output)
        drafts, accepted = "Draft tokens of the verifier's own verified.", "The same accepted."
        return [
            tokens, requests, computed, committed,
            family("wisp:own_draft_tokens", drafts, self._own.proposed),
            family("wisp:own_draft_tokens_accepted", accepted, self._own.accepted),
        ]  # fmt: skip
