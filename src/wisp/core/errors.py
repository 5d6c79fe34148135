"""The tree of errors. Each message says what the user can do.

WispError
├── ConfigError          a flag, a file or an environment that cannot work
├── ModelError           a model that cannot be found, fetched, checked or loaded
├── EngineError          the engine failed, or was asked for something it cannot do
│   ├── EngineDeadError  it will not run again in this process
│   └── StepLostError    a step before this one failed
├── GrammarError         a grammar that cannot be compiled, or asks for more work than is allowed
│   └── GrammarBusyError there is no memory or no process to compile it now
├── InternalError        a bug in WISP, after which this process cannot go on
├── ProtocolError        the peer sent a message that the protocol does not allow
├── RequestError         a request that cannot be served (carries an OpenAI error object)
└── UnavailableError     no verifier could be reached in time
"""

from __future__ import annotations

from typing import ClassVar


class WispError(Exception):
    """Base of every error that WISP raises on purpose."""


class ConfigError(WispError):
    """A flag, a file or an environment that cannot work."""


class ModelError(WispError):
    """A model that cannot be found, fetched, checked or loaded."""


class EngineError(WispError):
    """The engine failed, or was asked for something it cannot do."""


class EngineDeadError(EngineError):
    """The engine will not run again, so this process can no longer be a verifier."""


class StepLostError(EngineError):
    """A step before this one failed, and with it all KV that this one was planned on."""


class GrammarError(WispError):
    """A grammar that cannot be compiled, or asks for more work than is allowed. The message names the part."""


class GrammarBusyError(GrammarError):
    """There is no memory or no process to compile a grammar now. The grammar may be right: try again."""


class InternalError(WispError):
    """A bug in WISP, after which this process cannot go on. The log has the traceback."""


class ProtocolError(WispError):
    """The peer sent a message that the protocol does not allow. Nothing has changed on this side.

    code: for `Refused.code`
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RequestError(WispError):
    """A request that cannot be served.

    status:            the HTTP status
    code, param, type: for OpenAI's error object; `code` is never null, its default follows from the status
    retry_after:       seconds, for the Retry-After header
    """

    CODES: ClassVar = {400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found"}

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's name
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or self.CODES.get(status) or f"status_{status}"
        self.param = param
        self.type = type
        self.retry_after = retry_after


class UnavailableError(RequestError):
    """No verifier could be reached in time."""

    def __init__(self, message: str, retry_after: float = 5.0) -> None:
        super().__init__(
            503, message, code="verifier_unavailable", type="server_error", retry_after=retry_after
        )
