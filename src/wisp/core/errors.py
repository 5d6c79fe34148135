"""The tree of errors. Each message says what the user can do about it.

WispError
├── ConfigError          a flag, a file or an environment that cannot work
├── ModelError           a model that cannot be found, fetched, checked or loaded
├── EngineError          the engine failed, or was asked for something it cannot do
│   └── EngineDeadError  it will not run again in this process
├── InternalError        a fault of WISP's own, after which this process cannot go on
├── ProtocolError        the other side sent something it may not send
├── RequestError         a generation that cannot be served as asked (carries an OpenAI error shape)
└── UnavailableError     no verifier within the stated time
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
    """The engine will not run again: this process is of no more use as a verifier."""


class InternalError(WispError):
    """A fault of WISP's own, after which this process cannot go on. The log has its traceback."""


class ProtocolError(WispError):
    """The other side sent something it may not send; nothing changed on this side.

    `code` is the word that goes into `Refused.code`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RequestError(WispError):
    """A request that cannot be served as asked.

    `status` is the HTTP status; `code`, `param` and `type` fill OpenAI's error object (`code` is never null: without
    one it is the status's); `retry_after` (seconds) becomes the Retry-After header.
    """

    CODES: ClassVar = {400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found"}

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's name for it
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or self.CODES.get(status) or f"status_{status}"
        self.param = param
        self.type = type
        self.retry_after = retry_after


class UnavailableError(RequestError):
    """No verifier could be reached within the stated time."""

    def __init__(self, message: str, retry_after: float = 5.0) -> None:
        super().__init__(
            503, message, code="verifier_unavailable", type="server_error", retry_after=retry_after
        )
