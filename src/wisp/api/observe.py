"""The observations of a request that metrics are made from."""

from __future__ import annotations

from typing import Protocol

import msgspec

from wisp.core.draft.stats import SpecStats
from wisp.core.protocol.slo import Served, Slo


class RequestRecord(msgspec.Struct, frozen=True):
    """One finished request. Times in seconds of `time.monotonic`; 0.0 for "never".

    endpoint:   "chat.completions" or "completions"
    key:        name of the caller's API key, "" where none is needed
    status:     HTTP status; 499 if the client left, and the error's status for one that came in mid-stream
    finish:     "stop", "length", "error" or "cancelled"
    code:       the error's code, "" if there was none
    gaps_s:     between arrivals of committed tokens: the inter-token latencies as a client sees chunks
    spec:       rounds of speculation, draft tokens, accepted draft tokens
    slo_class:  the named class that its targets come from, "" if none
    """

    endpoint: str
    request_id: str
    key: str
    status: int
    finish: str
    code: str
    stream: bool
    prompt_tokens: int
    completion_tokens: int
    arrived: float
    first: float
    last: float
    ended: float
    gaps_s: list[float]
    spec: SpecStats
    slo: Slo | None
    slo_class: str = ""

    def served(self) -> Served:
        """The request as `core.protocol.slo` counts it."""
        return Served(
            arrived=self.arrived,
            first=self.first,
            last=self.last,
            tokens=self.completion_tokens,
            slo=self.slo or Slo(),
            ended=self.ended,
            ok=self.status < 400,
        )


class Observer(Protocol):
    """Is told of every request to a generating endpoint, refused ones included. Must not block."""

    def request_finished(self, record: RequestRecord) -> None: ...
