"""An engine that will not run again: its sessions hear of it, and then the process is asked to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from waiting import run, until
from wisp.core.errors import EngineDeadError, EngineError
from wisp.core.protocol.messages import Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice, SliceResult
from wisp.core.verify.admission import Admission
from wisp.core.verify.events import Run, StepDone
from wisp.engines.in_order import LOST
from wisp.engines.null import ByteTokenizer, NullTarget
from wisp.server.engine_thread import EngineThread
from wisp.server.host import VerifierHost


class Failing(NullTarget):
    """Fails as it is told to, once for each error; then it works."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__(slots=4)
        self.errors = list(errors)

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        if self.errors:
            raise self.errors.pop(0)
        return super().run(batch)


def history(*errors: Exception) -> list[str]:
    """What one session hears, and when the host says that its engine has died, for two attempts."""

    async def scenario() -> list[str]:
        heard: list[str] = []

        def said(message: Verdict | Refused) -> None:
            heard.append(message.code if isinstance(message, Refused) else "verdict")

        host = VerifierHost(
            Failing(*errors),
            ByteTokenizer(),
            Admission(10),
            model="m",
            died=lambda error: heard.append(f"died: {error}"),
        )

        async def more_than(before: int) -> None:
            await until(lambda: len(heard) > before)

        connection = host.attach("key", said)
        for number in range(2):
            before = len(heard)
            host.receive(connection, Open(f"session-{number}", 1, [1, 2], Sampling(), 8, draft=[3]))
            await more_than(before)
        host.stop()
        return heard

    return run(scenario())


def test_a_step_that_fails_ends_its_sessions_and_nothing_else() -> None:
    assert history(EngineError("for testing")) == ["engine_error", "verdict"]


def test_a_dead_engine_is_told_of_once_and_after_its_sessions_and_gets_no_more() -> None:
    assert history(EngineDeadError("gone")) == ["engine_error", "died: gone", "shutting_down"]


def test_the_log_explains_a_failure_once_and_names_the_step_that_was_lost_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> list[str]:
        done: list[StepDone] = []
        loop = asyncio.get_running_loop()
        engine = EngineThread(Failing(EngineError("for testing")), loop, done.append, depth=2)
        for step in range(2):
            engine.submit(Run([], [Slice(1, 1, 0, [1, 2])], step), loop.time())
        await until(lambda: len(done) == 2)
        engine.stop()
        return [each.error for each in done]

    assert run(scenario()) == ["for testing", LOST]
    failed, lost = (record for record in caplog.records if record.name == "wisp.engine")
    assert failed.exc_info is not None
    assert (lost.levelno, lost.exc_info) == (logging.WARNING, None)
