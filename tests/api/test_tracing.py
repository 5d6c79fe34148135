"""Traces: off until the environment asks for them; then one request is one tree over edge and verifier."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from waiting import run
from wisp.api import tracing
from wisp.api.routes import openai_routes
from wisp.core.draft.patience import Patience
from wisp.core.draft.policies import Ahead, Policies
from wisp.core.draft.signals import Signal
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.messages import (
    Cancel,
    Draft,
    Message,
    Open,
    Verdict,
    Welcome,
    decode_edge_message,
    encode,
)
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice, SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.events import Received, Run, Send, StepDone, Tick
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import Listener, Redirects
from wisp.engines.base import Proposal, Tokenizer
from wisp.engines.null import ByteTokenizer, NullTarget, null_token
from wisp.server.host import VerifierHost
from wisp.server.spans import SessionSpans
from wisp.server.thin import ThinBackend

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
UNSAMPLED = f"00-{TRACE}-00f067aa0ba902b7-00"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The SDK's exporter in memory; `get_finished_spans` of it are those that have ended."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield memory
    provider.shutdown()


class Nearby:
    """`edge.backend.Link` to a verifier in this process. Messages pass through their bytes."""

    reconnects = 0
    problem = ""
    fatal: RequestError | None = None

    def __init__(self, host: VerifierHost) -> None:
        self.patience = Patience(600.0, 0.0)
        self.redirects = Redirects(pytest.fail)
        self.opens: list[Open] = []
        self._host = host
        self._listeners: dict[str, Listener] = {}
        self._connection = host.attach("", lambda m: self._listeners[m.session](m))

    @property
    def welcome(self) -> Welcome:
        return self._host.welcome()

    async def connected(self) -> Welcome:
        return self.welcome

    def gave_up(self) -> UnavailableError:
        raise AssertionError("it never does")

    def listen(self, session: str, listener: Listener) -> None:
        self._listeners[session] = listener

    def unlisten(self, session: str) -> None:
        self._listeners[session] = lambda message: None

    def send(self, message: Message) -> None:
        heard = decode_edge_message(encode(message))
        assert isinstance(heard, Open | Draft | Cancel)
        if isinstance(heard, Open):
            self.opens.append(heard)
        self._host.receive(self._connection, heard)


class Bytes:
    async def get(self, fingerprint: str) -> Tokenizer:
        return ByteTokenizer()


class Prophet:
    """Drafts what the verifier of no weights will say."""

    name = "prophet"

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal:
        return Proposal(null_token(sampling.seed, position), Signal(confidence=1.0))

    def forget(self, session: str) -> None:
        pass

    def close(self) -> None:
        pass


def asked(header: str, *, drafts: bool = True, edge: bool = True) -> list[Open]:
    """Ask an edge (or a verifier) for 12 tokens with this `traceparent`. Returns the Opens that the edge sent."""

    async def main() -> list[Open]:
        host = VerifierHost(NullTarget(slots=4), ByteTokenizer(), Admission(100), model="null")
        link = Nearby(host)
        device = EdgeBackend(link, Bytes(), Prophet() if drafts else None, Policies("fixed:3"), Ahead(0.0))
        app = Starlette(routes=openai_routes(device if edge else ThinBackend(host)))
        body = {"prompt": "Hi.", "max_tokens": 12, "seed": 7}
        try:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://edge"
            ) as client:
                headers = {"traceparent": header} if header else {}
                answer = await client.post("/v1/completions", json=body, headers=headers)
                assert answer.json()["usage"]["completion_tokens"] == 12
        finally:
            device.close()
            host.stop()
        return link.opens

    return run(main())


def named(spans: Any, name: str) -> list[Any]:
    return [s for s in spans.get_finished_spans() if s.name == name]


def parent_of(span: Any) -> int:
    return span.parent.span_id if span.parent is not None else 0


def test_a_request_is_one_tree_over_client_edge_and_verifier(spans: Any) -> None:
    asked(PARENT)
    assert {f"{s.context.trace_id:032x}" for s in spans.get_finished_spans()} == {TRACE}
    (request,) = named(spans, "completions")
    assert f"{parent_of(request):016x}" == "00f067aa0ba902b7"
    assert request.attributes["gen_ai.usage.output_tokens"] == 12
    assert request.attributes["wisp.accepted"] > 0
    on_edge, at_verifier = sorted(named(spans, "session"), key=lambda s: s.kind.name)
    assert (on_edge.kind.name, at_verifier.kind.name) == ("CLIENT", "SERVER")
    assert parent_of(on_edge) == request.context.span_id
    assert parent_of(at_verifier) == on_edge.context.span_id
    assert at_verifier.attributes["wisp.finish"] == "length"
    assert at_verifier.attributes["wisp.tokens"] == 12


def test_rounds_are_of_the_edge_and_steps_of_the_verifier(spans: Any) -> None:
    asked(PARENT)
    on_edge, at_verifier = sorted(named(spans, "session"), key=lambda s: s.kind.name)
    (opening,) = named(spans, "open")
    rounds = named(spans, "round")
    assert rounds
    assert {parent_of(r) for r in (opening, *rounds)} == {on_edge.context.span_id}
    flights = {s.context.span_id: s for s in named(spans, "flight")}
    assert {parent_of(f) for f in flights.values()} == {r.context.span_id for r in (opening, *rounds)}
    assert {parent_of(v) for v in (*named(spans, "verify"), *named(spans, "prefill"))} == set(flights)
    assert {parent_of(d) for d in named(spans, "draft")} <= {r.context.span_id for r in (opening, *rounds)}
    assert sum(r.attributes["wisp.accepted"] for r in rounds) > 0
    steps = named(spans, "step")
    assert {parent_of(s) for s in steps} == {at_verifier.context.span_id}
    assert {s.attributes["wisp.kind"] for s in steps} >= {"verify"}
    assert all(s.start_time <= s.end_time for s in spans.get_finished_spans())
    for span in (*rounds, opening):
        assert on_edge.start_time <= span.start_time <= span.end_time <= on_edge.end_time


def test_decoding_by_the_verifier_is_one_span(spans: Any) -> None:
    asked(PARENT, drafts=False)
    (served,) = named(spans, "served")
    (opening,) = named(spans, "open")
    assert served.attributes["wisp.verdicts"] >= 1
    assert opening.attributes["wisp.why"] == "no_drafter"
    assert not named(spans, "round")


def test_a_client_without_an_edge_has_its_session_at_the_verifier(spans: Any) -> None:
    asked(PARENT, edge=False)
    (request,) = named(spans, "completions")
    (session,) = named(spans, "session")
    assert parent_of(session) == request.context.span_id


def test_without_a_parent_a_request_begins_a_trace(spans: Any) -> None:
    asked("")
    (request,) = named(spans, "completions")
    assert request.parent is None
    assert {s.context.trace_id for s in spans.get_finished_spans()} == {request.context.trace_id}


def test_an_unsampled_trace_is_recorded_nowhere(spans: Any) -> None:
    (open_,) = asked(UNSAMPLED)
    assert not spans.get_finished_spans()
    assert open_.trace.startswith(f"00-{TRACE}-")
    assert open_.trace.endswith("-00")


def test_an_edge_that_records_nothing_passes_the_parent_on() -> None:
    assert [o.trace for o in asked(PARENT)] == [PARENT]
    assert [o.trace for o in asked("")] == [""]


def test_a_refused_request_says_why(spans: Any) -> None:
    async def main() -> None:
        host = VerifierHost(NullTarget(slots=4), ByteTokenizer(), Admission(100), model="null")
        app = Starlette(routes=openai_routes(ThinBackend(host)))
        try:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://edge"
            ) as client:
                assert (await client.post("/v1/completions", json={"prompt": ""})).status_code == 400
        finally:
            host.stop()

    run(main())
    (request,) = named(spans, "completions")
    assert request.attributes["http.response.status_code"] == 400
    assert not request.status.is_ok


def test_steps_in_flight_end_in_their_order(spans: Any) -> None:
    known: Any = SimpleNamespace(sessions={1: SimpleNamespace(id="session1")})
    look = SessionSpans(known)
    look(0.0, Received(1, "", Open("session1", 0, [1], Sampling(), 9)), [])
    look(1.0, Tick(), [Run([], [Slice(1, 0, 0, [5])])])
    look(2.0, Tick(), [Run([], [Slice(1, 0, 1, [6])])])
    look(3.0, StepDone([SliceResult(1)], 1.0), [])
    look(5.0, StepDone([], 1.0, "gone"), [Send(1, Verdict("session1", 0, 0, 0, [7], "stop"))])
    first, second = named(spans, "step")
    assert [s.end_time - s.start_time for s in (first, second)] == [2_000_000_000, 3_000_000_000]
    assert (first.status.is_ok, second.status.is_ok) == (True, False)
    (session,) = named(spans, "session")
    assert session.attributes["wisp.finish"] == "stop"


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (PARENT, PARENT),
        (f"01-{TRACE}-00f067aa0ba902b7-01-more", PARENT),
        (f"{PARENT}-more", ""),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", ""),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (PARENT.upper(), ""),
        (f"{PARENT}\n", ""),
        ("x" * 100_000, ""),
        (None, ""),
    ],
)
def test_only_a_traceparent_goes_on(header: str | None, taken: str) -> None:
    assert tracing.traceparent(header) == taken


# --- the environment decides

SET_UP = """
import sys
from wisp.api import tracing
from wisp.api.logs import set_up_logging
set_up_logging("info")
tracing.set_up_tracing("wisp-test")
print(tracing.recording(), any(m.startswith("opentelemetry") for m in sys.modules))
span = tracing.start("a", "", 1.0, served=True)
span.child("b", 1.5).end(2.0)
span.end(2.0)
"""


def set_up(program: str = SET_UP, **env: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=own | env, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "console"},
        {"OTEL_SERVICE_NAME": "mine"},
    ],
)
def test_unless_asked_for_nothing_is_recorded_or_imported(env: dict[str, str]) -> None:
    done = set_up(**env)
    assert done.stdout.split() == ["False", "False"]
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "service"), [("", "wisp-test"), ("mine", "mine")])
def test_the_environment_names_exporter_and_service(name: str, service: str) -> None:
    pytest.importorskip("opentelemetry.sdk")
    done = set_up(OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME=name)
    assert done.stdout.startswith("True True")
    assert done.stdout.count(f'"service.name": "{service}"') == 2, "all spans are exported before the end"
    assert "traces go to: console" in done.stderr


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "abacus"}, "no traces go to abacus"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"},
            "(carrier-pigeon)",
        ),
    ],
)
def test_an_exporter_that_there_is_not_is_warned_of(env: dict[str, str], said: str) -> None:
    pytest.importorskip("opentelemetry.sdk")
    done = set_up(**env)
    assert done.stdout.startswith("False")
    assert said in done.stderr


def test_without_the_packages_a_warning_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['opentelemetry'] = None" + SET_UP
    done = set_up(hidden, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.startswith("False")
    assert "pip install 'wisp-serve[otel]'" in done.stderr
