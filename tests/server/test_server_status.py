"""What the page of a verifier is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from test_server_metrics import Client, opening, text, with_host
from wisp.core.protocol.messages import Device, Draft, Verdict
from wisp.core.protocol.slo import Slo
from wisp.server.host import VerifierHost
from wisp.server.log_page import write_log_page
from wisp.server.status import loading_status, verifier_status

SNAPSHOT = {
    "kind", "version", "state", "model", "engine", "mode", "digest", "batching", "connections", "now", "clock",
    "width_s", "series", "sessions", "n_sessions", "devices", "n_devices", "classes", "kv", "cost_model",
}  # fmt: skip


def test_a_verifier_says_what_it_is_and_what_it_does() -> None:
    async def scenario(host: VerifierHost) -> None:
        edge, thin = Client(host), Client(host)
        edge.connection = host.attach("alice", edge.inbox.put_nowait, close=lambda: None)
        slo = Slo(60_000.0, 5_000.0)
        first = await edge.ask(opening("session-1", slo=slo, device=Device(10.0, 30.0)))
        assert isinstance(first, Verdict)
        draft = [text(7, len(first.tokens) + i) for i in range(4)]
        await edge.ask(Draft("session-1", 1, len(first.tokens), draft))
        await thin.ask(opening("session-2"))
        status = verifier_status(host, 0.0)
        assert set(status) == SNAPSHOT
        assert (status["kind"], status["state"], status["model"]) == ("verifier", "ok", "fast")
        assert (status["connections"], status["n_sessions"], status["n_devices"]) == (1, 2, 2)
        rows = {row["id"]: row for row in status["devices"]}
        assert rows[edge.connection]["accepted"] == 4
        assert rows[edge.connection]["rtt_ms"] == 30.0
        assert rows[-1]["thin"]
        assert {s["waits_for"] for s in status["sessions"]} == {"edge"}
        host.detach(edge.connection)
        status = verifier_status(host, 0.0)
        assert [d["thin"] for d in status["devices"]] == [True]
        assert "edge_gone" in {s["waits_for"] for s in status["sessions"]}
        host.draining = True
        assert verifier_status(host, 0.0)["state"] == "draining"

    with_host(scenario)


def test_a_recorder_that_fails_takes_nothing_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(host: VerifierHost) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("of the page")

        host.recorder._dispatch = fail  # type: ignore[method-assign, assignment]
        client = Client(host)
        for i in range(2):
            assert isinstance(await client.ask(opening(f"session-{i}")), Verdict)
        assert host.failed is None
        assert caplog.text.count("the recorder failed") == 1, "said once"

    with_host(scenario)


def test_a_verifier_that_loads_or_has_failed_says_so() -> None:
    assert loading_status("m", "")["state"] == "loading"
    failed = loading_status("m", "no such file")
    assert (failed["state"], failed["problem"]) == ("failed", "no such file")


def test_an_event_log_becomes_a_page(tmp_path: Path) -> None:
    log = tmp_path / "events.log"

    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        await client.ask(opening("session-1", slo=Slo(60_000.0, 5_000.0), max_tokens=1))
        host.detach(client.connection)
        await asyncio.sleep(0)

    with_host(scenario, log)
    page = tmp_path / "page.html"
    assert write_log_page(log, page) > 3
    text = page.read_text()
    assert '"kind":"run"' in text
    assert '"ended":1,"met":1' in text
    assert '"key":"alice"' in text, "a device that has gone is still part of the run"
