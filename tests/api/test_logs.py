"""Logs: JSON lines that a collector can read, and unknown words refused."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
from typing import Any

import pytest

from wisp.api.logs import JsonLines, set_up_logging
from wisp.api.process import event_loop_factory
from wisp.core.errors import ConfigError


def line(message: str, *args: object, who: str = "", **extra: object) -> dict[str, Any]:
    record = logging.makeLogRecord(
        {"name": "wisp.api", "levelno": 20, "levelname": "INFO", "msg": message, "args": args, **extra}
    )
    record.created = 1_700_000_000.25
    text = JsonLines(who).format(record)
    assert "\n" not in text
    return json.loads(text)  # type: ignore[no-any-return]


def test_a_line_is_one_object() -> None:
    assert line("replica %s is up", "r1", who="r1") == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "info",
        "logger": "wisp.api",
        "message": "replica r1 is up",
        "replica": "r1",
        "fields": {},
    }


def test_named_values_are_fields_with_their_types() -> None:
    found = line("request=%s status=%d ttft_ms=%.1f", "req-1", 200, 12.34)
    assert found["message"] == "request=req-1 status=200 ttft_ms=12.3"
    assert found["fields"] == {"request": "req-1", "status": 200, "ttft_ms": 12.34}
    assert line("one\ntwo", session="s1")["fields"] == {"session": "s1"}


@pytest.mark.parametrize(
    ("given", "said"), [({"form": "xml"}, "text, json"), ({"level": "loud"}, "debug, info")]
)
def test_unknown_words_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        set_up_logging(**given)


@pytest.mark.parametrize(
    ("error", "logged"), [(socket.gaierror(-2, "no such name"), False), (OSError("something else"), True)]
)
def test_a_name_that_nobody_waits_for_any_more_is_no_error(
    error: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A verifier's name that is looked up for long fails once its connection has been given up, which was said."""
    pytest.importorskip("uvloop")

    async def forgotten() -> None:
        asyncio.get_running_loop().create_future().set_exception(error)
        gc.collect()

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(forgotten())
    assert ("never retrieved" in caplog.text) == logged
