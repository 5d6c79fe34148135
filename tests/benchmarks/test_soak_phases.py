"""The soak: its judgement of texts and slopes, and a short run of real processes with one fault of each kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import parties
from benchmarks.soak.faults import DEATHS, KINDS
from benchmarks.soak.http import Line
from benchmarks.soak.measure import Life, least_squares, quantile
from benchmarks.soak.overload import Outcome, arrivals
from benchmarks.soak.parties import Tally
from benchmarks.soak.stack import Door
from benchmarks.soak.texts import HashDraft, flaw, hashed
from waiting import run
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice
from wisp.engines.emulated import EmulatedTarget, hardware

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("said", "whole", "kind"),
    [
        ("one two three four", True, ""),
        ("one two", False, ""),
        ("one two", True, "lost"),
        ("one three four", False, "lost"),
        ("one two two three", False, "doubled"),
        ("one two three four four", True, "doubled"),
        ("one two threw", False, "wrong"),
        ("", False, ""),
        ("", True, "lost"),
    ],
)
def test_what_is_wrong_with_a_text_has_a_name(said: str, whole: bool, kind: str) -> None:
    assert flaw(said, "one two three four", whole=whole) == kind


def test_a_wrong_text_is_counted_and_told() -> None:
    tally, job = Tally(), hashed(random.Random(1), 8)
    tally.judge(job, job.text, whole=True, who="a customer")
    tally.judge(job, job.tokens[:3], whole=False, who="a device")
    assert (tally.lost, tally.doubled, tally.wrong, tally.findings) == (0, 0, 0, [])
    tally.judge(job, (*job.tokens[:3], *job.tokens[2:]), whole=True, who="a device")
    assert (tally.lost, tally.doubled, tally.wrong) == (0, 1, 0)
    assert tally.findings[0].startswith("a device: doubled")


@pytest.mark.parametrize("late", [True, False])
def test_a_request_that_came_in_time_is_not_said_to_have_been_late(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 408 is no fault of the server's only where this client held back its request, over a connection just made."""
    monkeypatch.setattr(parties, "HEAD_S", 0.0 if late else 600.0)
    monkeypatch.setattr(parties, "AGAIN_S", (0.0, 0.0))
    job, tally = hashed(random.Random(1), 8), Tally()
    requests, handlers = 0, set[asyncio.Task[Any] | None]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        handlers.add(asyncio.current_task())
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                requests += 1
                said = {"choices": [{"text": job.text, "finish_reason": "length"}]}
                body = json.dumps({"error": {"code": "request_timeout"}} if requests == 1 else said)
                status = "408 Request Timeout" if requests == 1 else "200 OK"
                writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())

    async def scenario() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            door = Door("router")
            door.port = server.sockets[0].getsockname()[1]
            line = Line(door.port, "key")
            await parties.answered(line, door, job, tally, random.Random(1))
            line.close()
            await asyncio.gather(*filter(None, handlers))

    run(scenario())
    assert (tally.lost, tally.refused["408 request_timeout"], requests) == ((0, 1, 2) if late else (1, 0, 1))


def test_the_emulated_target_says_what_a_job_expects_and_a_device_drafts() -> None:
    job = hashed(random.Random(2), 6)
    target = EmulatedTarget("t", hardware("a100-qwen3-32b"), sleep=lambda _: None)
    device, context, said = HashDraft(1), list(job.prompt.encode()), list[int]()
    fed = context
    while len(said) < len(job.tokens):
        sampling = Sampling(seed=job.seed)
        start = len(context) + len(said) - len(fed)
        (result,) = target.run([Slice(1, 0, start, fed, position=len(said), sampling=sampling)])
        drafts = {device.propose("s", [*context, *said], len(said), sampling).token for _ in range(20)}  # type: ignore[union-attr]
        assert drafts == {result.tokens[0], (result.tokens[0] + 1) % 256}
        said += result.tokens
        fed = result.tokens
    assert tuple(said) == job.tokens


def test_a_slope_is_of_what_comes_after_the_warm_up() -> None:
    grows_at_first = [(n, min(n, 1000) / 100) for n in range(0, 10_001, 100)]
    assert Life("router", 1, samples=grows_at_first).slope() == pytest.approx(0.0)
    assert Life(
        "router", 1, samples=[(n, 50 + n / 5000) for n in range(0, 9000, 7)]
    ).slope() == pytest.approx(2.0)
    assert Life("router", 1, samples=[(0, 50.0), (0, 51.0)]).slope() is None
    assert least_squares([(0, 1), (1, 1), (2, 4)]) == pytest.approx(1.5)


def test_quantiles_are_of_values_that_were_seen() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.25, 0.5, 0.99, 1.0)] == [1.0, 2.0, 4.0, 4.0]


def test_requests_come_at_the_rates_of_their_keys() -> None:
    found = list(arrivals({"a": 10.0, "b": 1.0}, 1000.0, random.Random(1)))
    counts = [sum(key == name for _, key in found) for name in "ab"]
    assert counts[0] == pytest.approx(10_000, rel=0.05)
    assert counts[1] == pytest.approx(1_000, rel=0.15)
    assert all(0 <= at < 1000.0 for at, _ in found)


def test_a_refused_request_meets_no_slo() -> None:
    assert Outcome(0.0, "a", "", 100.0, 50.0, 24).met
    assert not Outcome(0.0, "a", "", 100.0, 5000.0, 24).met
    assert not Outcome(0.0, "a", "overloaded").met


@pytest.mark.slow
@pytest.mark.extended
def test_a_short_soak_loses_doubles_and_leaves_nothing(tmp_path: Path) -> None:
    words = ["soak", "--sessions", "400", "--quick", "--phases", "steady,faults,pair", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "WISP_CACHE": str(tmp_path / "cache"), "WISP_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    phases = {p["phase"]: p for p in json.loads(ran.stdout)["phases"]}
    for p in phases.values():
        assert (p["lost"], p["doubled"], p["wrong"]) == (0, 0, 0)
        assert p["left_behind"] == {}
    assert set(KINDS) <= set(phases["faults"]["faults"])
    assert set(DEATHS) <= set(phases["pair"]["faults"])
    assert "0 lost, 0 doubled, 0 wrong" in (tmp_path / "soak.md").read_text()
