"""What an edge does about a verifier's refusal: which ones it answers by opening again, and what the client is told."""

from __future__ import annotations

from wisp.core.errors import RequestError
from wisp.core.protocol.messages import MODEL_CHANGED

REOPEN = frozenset({"unknown_session", "unknown_base", "out_of_turn", "engine_error", "stale_epoch"})
BUSY = {"overloaded": 429, "rate_limit_exceeded": 429, "shutting_down": 503}  # and the HTTP status for each
MAX_REOPENINGS = 5  # in a row without a new token
LONGEST_WAIT_S = 60.0  # before a session is opened again, whatever the verifier says


def busy_error(code: str, message: str, retry_after: float) -> RequestError:
    """The client's error for a temporary refusal; `code` is one of BUSY."""
    kind = "rate_limit_error" if code == "rate_limit_exceeded" else "server_error"
    return RequestError(BUSY[code], message, code=code, type=kind, retry_after=max(1.0, wait_s(retry_after)))


def wait_s(retry_after: float) -> float:
    """The wait that a verifier asks for, within bounds: a peer may send any number."""
    return min(max(0.0, retry_after), LONGEST_WAIT_S)


def model_changed() -> RequestError:
    """The client's error when the verifier's model is not the one that wrote the committed tokens."""
    return RequestError(502, MODEL_CHANGED, code="model_changed", type="server_error")
