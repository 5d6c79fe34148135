"""OpenTelemetry traces, off unless an `OTEL_` variable asks for them; then a request's rounds are spans.

    edge:     a request > session > open, round > draft, flight > verify
    verifier: session > step

Spans are made by the processes, from what they see anyway. W3C's `traceparent` leads from the client's header through
the edge to `Open.trace`, also where nothing is recorded on the way. Without the variables, nothing of OpenTelemetry is
imported.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wisp import __version__

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger("wisp.tracing")

Attributes = dict[str, str | bool | int | float]

_EXPORTERS = "opentelemetry_traces_exporter"  # the packages' own group of entry points
_NO_TRACE, _NO_PARENT = "0" * 32, "0" * 16
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)

_tracer: otel.Tracer | None = None


class Span:
    """A span that is not recorded. Times are seconds of the clock that `start` was given.

    trace: a `traceparent` for those who go on with this work elsewhere; "" if there is none
    """

    recording = False

    def __init__(self, trace: str = "") -> None:
        self.trace = trace

    def child(self, name: str, begun: float, attributes: Attributes | None = None) -> Span:
        """Begin a span within this one."""
        return self

    def end(self, now: float, attributes: Attributes | None = None, *, error: str = "") -> None:
        """It is over. `error`: the code of what went wrong."""


NONE = Span()


class _Recorded(Span):
    recording = True

    def __init__(self, span: otel.Span, zero_ns: int) -> None:
        super().__init__(_header(span))
        self._span = span
        self._zero_ns = zero_ns  # what to add to times, for nanoseconds since 1970

    def child(self, name: str, begun: float, attributes: Attributes | None = None) -> Span:
        from opentelemetry import trace as otel

        assert _tracer is not None
        context = otel.set_span_in_context(self._span)
        at = self._zero_ns + int(begun * 1e9)
        return _Recorded(
            _tracer.start_span(name, context, attributes=attributes, start_time=at), self._zero_ns
        )

    def end(self, now: float, attributes: Attributes | None = None, *, error: str = "") -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(attributes or {})
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(self._zero_ns + int(now * 1e9))


def start(name: str, trace: str, now: float, *, served: bool) -> Span:
    """Begin a span, at `now` in seconds of a clock of the caller's choice.

    trace:  the `traceparent` of what it is part of; "": it begins a trace
    served: somebody asked this process; otherwise this process asks another
    """
    if _tracer is None:
        return Span(trace) if trace else NONE
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    zero_ns = time.time_ns() - int(now * 1e9)
    context = TraceContextTextMapPropagator().extract({"traceparent": trace})
    kind = SpanKind.SERVER if served else SpanKind.CLIENT
    span = _tracer.start_span(name, context, kind, start_time=zero_ns + int(now * 1e9))
    # One that is not sampled still says so to those who go on with the work
    return _Recorded(span, zero_ns) if span.is_recording() else Span(_header(span))


def recording() -> bool:
    """Does this process record traces?"""
    return _tracer is not None


def traceparent(header: str | None) -> str:
    """The header as it goes on, in version 00 of W3C's format; "" for one that is none."""
    found = _PARENT.fullmatch(header or "")
    if found is None or found[1] == "ff" or found[2] == _NO_TRACE or found[3] == _NO_PARENT:
        return ""
    if found[1] == "00" and found[5]:
        return ""
    return f"00-{found[2]}-{found[3]}-{found[4]}"


def set_up_tracing(service: str) -> None:
    """Record traces if the environment names an exporter, as a service of this name unless it has another.

    What cannot be done is warned of, and this process serves without traces: the variables may be meant for others.
    """
    names = _exporters(os.environ)
    if not names:
        return
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: F401 - is there an SDK?
    except ImportError:
        log.warning(
            "traces are asked for (OTEL_...), and OpenTelemetry is missing: pip install 'wisp-serve[otel]'"
        )
        return
    found = [exporter for exporter in map(_exporter, names) if exporter is not None]
    if found:
        record(service, found)
        log.info("traces go to: %s", ", ".join(names))


def record(service: str, exporters: list[SpanExporter]) -> None:
    """Record traces from now on. What is not exported yet when the process ends is exported then."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    global _tracer
    named = Resource.create().attributes  # of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    own = {} if not str(named["service.name"]).startswith("unknown_service") else {"service.name": service}
    provider = TracerProvider(resource=Resource.create(own))
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("wisp", __version__)


def _exporters(env: Mapping[str, str]) -> list[str]:
    """The names of the exporters that the environment asks for."""
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    addresses = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    usual = "otlp" if any(env.get(name) for name in addresses) else ""
    named = env.get("OTEL_TRACES_EXPORTER", "").strip() or usual
    return [name for part in named.split(",") if (name := part.strip()) not in ("", "none")]


def _exporter(name: str) -> SpanExporter | None:
    """The exporter of this name, if its package is there and takes what the environment says."""
    from importlib.metadata import entry_points

    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    package = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}.get(protocol, protocol)
    wanted = package if name == "otlp" else name
    try:
        found = next(iter(entry_points(group=_EXPORTERS, name=wanted)), None)
        if found is not None:
            made: SpanExporter = found.load()()
            return made
        problem = (
            "no package brings it; for OTLP over gRPC: pip install opentelemetry-exporter-otlp-proto-grpc"
        )
    except Exception as error:  # of any package, for any reason
        problem = str(error) or repr(error)
    log.warning("no traces go to %s (%s): %s", name, wanted, problem)
    return None


def _header(span: otel.Span) -> str:
    at = span.get_span_context()
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-{at.trace_flags:02x}"
