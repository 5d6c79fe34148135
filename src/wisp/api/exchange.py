"""One request's life, as logs and metrics see it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from wisp.api import tracing
from wisp.api.errors import request_id, shutting_down, to_request_error
from wisp.api.observe import Observer, RequestRecord
from wisp.api.output import Output, together
from wisp.api.requests import GenerationRequest
from wisp.api.sse import ClientGoneError
from wisp.core.draft.stats import SpecStats

logger = logging.getLogger("wisp.api")

CLIENT_CLOSED = 499  # nginx's status for a client that left; never sent


class RequestContext:
    """What is known of a request so far: filled in as it is handled."""

    def __init__(self, request: Request, endpoint: str, observer: Observer | None) -> None:
        self.id = request_id(request)
        self.endpoint = endpoint
        self.arrived = time.monotonic()
        self.key = ""
        self.ask: GenerationRequest | None = None
        self.prompt_tokens = 0
        self.outputs: list[Output] = []
        self._observer = observer
        parent = tracing.traceparent(request.headers.get("traceparent"))
        self.span = tracing.start(endpoint, parent, self.arrived, served=True)

    @property
    def finish(self) -> str:
        """Why the first answer ended; "" while one of them goes on."""
        return self.outputs[0].finish if self.outputs and all(o.finish for o in self.outputs) else ""

    @contextmanager
    def accounted(self) -> Iterator[None]:
        """Around all of a request: whatever its end, it is logged and observed once.

        Every exception leaves as RequestError or ClientGoneError.
        """
        try:
            yield
        except (ClientGoneError, ClientDisconnect):
            if self.finish:  # it had its answer, and only hung up faster than we did
                self._end(200, self.finish)
            else:
                self._end(CLIENT_CLOSED, "cancelled")
            raise ClientGoneError from None
        except asyncio.CancelledError:  # the process ends, and waits no longer: clients can try another one
            ended = shutting_down()
            self._end(ended.status, "error", ended.code)
            raise ended from None
        except Exception as exc:
            error = to_request_error(exc, self.id)
            self._end(error.status, "error", error.code)
            raise error from exc
        else:
            self._end(200, self.finish)

    def _end(self, status: int, finish: str, code: str = "") -> None:
        record = self._record(status, finish, code)
        _log(record)
        if self.span.recording:
            _trace(self.span, record)
        if self._observer is None:
            return
        try:
            self._observer.request_finished(record)
        except Exception:  # metrics must not break what they measure
            logger.exception("request=%s: the observer failed", self.id)

    def _record(self, status: int, finish: str, code: str) -> RequestRecord:
        outputs, ask = self.outputs, self.ask
        return RequestRecord(
            endpoint=self.endpoint,
            request_id=self.id,
            key=self.key,
            status=status,
            finish=finish,
            code=code,
            stream=ask.stream if ask else False,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(o.tokens for o in outputs),
            arrived=self.arrived,
            first=min((o.first for o in outputs if o.first), default=0.0),
            last=max((o.last for o in outputs), default=0.0),
            ended=time.monotonic(),
            gaps_s=[gap for o in outputs for gap in o.gaps_s],
            spec=together(outputs) if outputs else SpecStats(),
            slo=ask.slo if ask else None,
            slo_class=ask.slo_class if ask else "",
        )


def _log(r: RequestRecord) -> None:
    """One line, without a word of what the client or the model said."""
    logger.info(
        "request=%s endpoint=%s key=%s status=%d finish=%s code=%s stream=%s prompt_tokens=%d "
        "completion_tokens=%d drafted=%d accepted=%d ttft_ms=%.1f total_ms=%.1f",
        r.request_id,
        r.endpoint,
        r.key or "-",
        r.status,
        r.finish,
        r.code or "-",
        str(r.stream).lower(),
        r.prompt_tokens,
        r.completion_tokens,
        r.spec.num_draft_tokens,
        r.spec.num_accepted_draft_tokens,
        (r.first - r.arrived) * 1e3 if r.first else 0.0,
        (r.ended - r.arrived) * 1e3,
    )


def _trace(span: tracing.Span, r: RequestRecord) -> None:
    """The same as the line of the log, in OpenTelemetry's names where it has them."""
    attributes: tracing.Attributes = {
        "http.response.status_code": r.status,
        "gen_ai.usage.input_tokens": r.prompt_tokens,
        "gen_ai.usage.output_tokens": r.completion_tokens,
        "wisp.request": r.request_id,
        "wisp.finish": r.finish,
        "wisp.stream": r.stream,
        "wisp.drafted": r.spec.num_draft_tokens,
        "wisp.accepted": r.spec.num_accepted_draft_tokens,
    }
    if r.first:
        attributes["wisp.ttft_ms"] = (r.first - r.arrived) * 1e3
    span.end(r.ended, attributes, error=(r.code or "error") if r.finish == "error" else "")
