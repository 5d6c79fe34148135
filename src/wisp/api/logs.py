"""Logs on standard error: lines for people, or one JSON object a line for what collects them. Never prompts."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime

from wisp.core.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

# What uvicorn logs, some with a traceback, where a peer is at fault and has been told so: an upgrade that was refused
# with a status, a text frame that is no text, a request that is no HTTP. Anybody could fill the disk with these.
_PEERS_FAULTS = (
    "ASGI callable returned without completing handshake",
    "Invalid UTF-8 sequence received",
    "Invalid HTTP request received",
    "Unsupported upgrade request",
)
_PAIR = re.compile(r"(\w+)=%[-.\d]*[a-z]")


def set_up_logging(level: str = "info", *, form: str = "text", who: str = "") -> None:
    """Log to standard error as `form` says, with `who` named in each line. Raises ConfigError for unknown words."""
    if level.lower() not in LEVELS:
        raise ConfigError(f"unknown log level {level!r}; choose one of: {', '.join(LEVELS)}")
    if form not in FORMATS:
        raise ConfigError(f"unknown log format {form!r}; choose one of: {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"{who} " if who else ""
    plain = logging.Formatter(f"%(asctime)s %(levelname)-7s {prefix}%(name)s: %(message)s")
    handler.setFormatter(JsonLines(who) if form == "json" else plain)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "websockets", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn.error").addFilter(lambda r: not r.getMessage().startswith(_PEERS_FAULTS))


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message and fields; replica and exception where there is one.

    fields: what `extra` holds, and the values of a message that is written as `name=%s name=%d`.
    """

    _known = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = {"replica": who} if who else {}

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record) | {k: v for k, v in vars(record).items() if k not in self._known}
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._who,
            "fields": fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """The values of a message that is made of nothing but `name=%s`, by name."""
    words = str(record.msg).split()
    pairs = [_PAIR.fullmatch(word) for word in words]
    if not isinstance(record.args, tuple) or len(record.args) != len(words):
        return {}
    named = [pair[1] for pair in pairs if pair is not None]
    return dict(zip(named, record.args, strict=True)) if len(named) == len(words) else {}
